"""Variant conformance: an adapter method against its author's own dense formula, on every installed backend.

    class TestGain(VariantConformance):
        variant = GainVariant()
        config = {"peft_type": "GAIN"}

        def reference(self, x, weight, bias, params, tensors, scale):
            gain = 1 + scale * (tensors["gain"] - 1)
            return gain * (x @ weight.T) + bias

The kit draws random tensors of the shapes that the variant declares, writes them as a PEFT folder for a tiny base,
and takes the whole road from there: import, storage, lowering, backends. Class attributes say what else it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptrt.adapters.base import SECTION, BaseTarget, BaseView
from adaptrt.adapters.carried import CARRIED
from adaptrt.adapters.check import PEFT_PREFIX, sizes
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import read_adapter, write_adapter
from adaptrt.adapters.variant import Adapter, Module, Variant
from adaptrt.backends.base import Backend, Executable, LoadOptions
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdapterError
from adaptrt.format import Writer, open_file
from adaptrt.plugins import Registry, load_registry
from adaptrt.program import Embed, Linear, Logits, Norm, Op
from adaptrt.quant.plain import from_float32, to_float32, to_int64
from adaptrt.tensor import Tensor
from adaptrt.testing.folders import tiny_base, write_peft
from adaptrt.testing.programs import (
    VOCABULARY,
    Floats,
    Model,
    Run,
    batch,
    model,
    probe,
    random,
    relative_error,
)

Arrays = dict[str, NDArray[Any]]
TOKENS = [3, 1, 4, 1, 5, 9, 2]
EPS = 1e-5


FAULTS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "shape": lambda array: array[None],
    "NaN": lambda array: np.full(array.shape, np.nan, np.float32),
    "dtype": lambda array: np.ones(array.shape, np.float16 if array.dtype == np.int32 else np.int32),
}


@cache
def installed() -> Registry:
    """What is installed, found once."""
    return load_registry()


class VariantConformance:
    """Subclass it, set `variant` and `config`, and write `reference`; every method is a test."""

    variant: ClassVar[Variant]
    config: ClassVar[Mapping[str, Any]]  # an adapter_config.json of the method
    sizes: ClassVar[Mapping[str, int]] = {}  # of named dimensions that are neither the base's nor params
    targets: ClassVar[tuple[str, ...]] = ("blk.0.attn_q", "blk.1.attn_q", "blk.0.ffn_down")
    tolerance: ClassVar[float] = 2e-5  # relative error per token

    def reference(
        self,
        x: Floats,
        weight: Floats,
        bias: Floats,
        params: Mapping[str, Any],
        tensors: Mapping[str, Floats],
        scale: float,
    ) -> Floats:
        """The method's own formula: y [n, out] of inputs x [n, in] with weight [out, in] and bias [out].

        `tensors` are by role: float32, those in `variant.integers` int64; those of `variant.derived` are among them.
        An embedding comes transposed, x one-hot; a norm as its diagonal matrix, x already normalized.
        """
        raise NotImplementedError

    def tensor(self, role: str, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
        """A random tensor of a role, never at rest; override it when its values must obey a rule."""
        return np.asarray(
            rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5), np.float32
        )

    def names(self, module: Module) -> Mapping[str, str]:
        """Role → suffix after the module's path, or shared key (`base_model.…`).

        Override it when `resolve` has to look at tensors: here it sees a module without any.
        """
        return self.variant.resolve(self.config, module, Problems())[1]

    # What the tests are made of

    @pytest.fixture
    def registry(self) -> Registry:
        """What is installed."""
        return installed()

    @pytest.fixture
    def base(self, tmp_path: Path, registry: Registry) -> BaseView:
        """A tiny random model."""
        return tiny_base(tmp_path / "base.adrt", registry.architectures["llama"])

    @pytest.fixture(params=["cpu", "reference", "others"])
    def backends(self, request: pytest.FixtureRequest, registry: Registry) -> list[Backend]:
        """Every installed backend that can run here: the two built-ins, then all others."""
        builtin = ("cpu", "reference")
        names = registry.backends.keys() - {*builtin} if request.param == "others" else {request.param}
        found = [registry.backends[name] for name in sorted(names & registry.backends.keys())]
        if not (found := [backend for backend in found if backend.unavailable() is None]):
            pytest.skip(f"backends: {request.param}: none can run here")
        return found

    def entries(self, base: BaseView) -> Iterator[tuple[str, BaseTarget, str, tuple[int, ...]]]:
        """(key in the folder, attach point, role, shape) of every tensor; a shared key comes once a target."""
        for target in self.targets:
            attach = base.targets[target]
            module = Module(attach.module, attach, {}, {})
            params, _ = self.variant.resolve(self.config, module, Problems())
            known = {**self.sizes, **{k: v for k, v in params.items() if type(v) is int}, **sizes(attach)}
            for role, suffix in self.names(module).items():
                if role in CARRIED:
                    shape = tuple(CARRIED[role].shape(params, attach))
                else:
                    dims = self.variant.roles[role]
                    shape = tuple(known[dim] if isinstance(dim, str) else dim for dim in dims)
                shared = suffix.startswith("base_model.")
                yield suffix if shared else f"{PEFT_PREFIX}{attach.module}.{suffix}", attach, role, shape

    def arrays(self, base: BaseView, seed: int) -> Arrays:
        """The tensors of a folder: random ones for every target, shared ones once."""
        rng, made = np.random.default_rng(seed), Arrays()
        for key, _, role, shape in self.entries(base):
            if key not in made:
                made[key] = self.tensor(role, shape, rng)
        return made

    def adapter(self, base: BaseView, path: Path, seed: int = 1) -> Adapter:
        """An adapter with random tensors, through a PEFT folder."""
        folder = path / f"a{seed}"
        if not folder.exists():
            write_peft(folder, self.config, self.arrays(base, seed))
        return import_peft(folder, self.variants, base)

    @property
    def variants(self) -> dict[str, Variant]:
        """The variant alone, as a registry holds it."""
        return {self.variant.name: self.variant}

    def lowered(self, base: BaseView, adapter: Adapter, target: str, scale: float = 1.0) -> Lowered:
        """One target of an adapter in the normal form."""
        return lower(adapter, self.variants, base, scale)[target]

    def expected(self, base: BaseView, adapter: Adapter, target: str, scale: float) -> tuple[Floats, Floats]:
        """The inputs of a target, [tokens, in], and the author's y for them."""
        x, weight, bias = _dense(base.targets[target])
        (found,) = [t for t in adapter.targets if t.target == target]
        tensors: dict[str, Any] = {
            role: (to_int64 if role in self.variant.integers else to_float32)(adapter.tensors[name])
            for role, name in found.tensors.items()
        }
        return x, self.reference(x, weight, bias, found.params, tensors, scale)

    # Tests

    def test_the_config_is_claimed_by_this_variant_alone(self, registry: Registry) -> None:
        """Two variants that claim one config would both be refused."""
        claims = {name for name, v in registry.variants.items() if v.claims(self.config)}
        assert self.variant.claims(self.config)
        assert claims <= {self.variant.name}

    @pytest.mark.parametrize("scale", [1.0, 0.5, -0.3])
    def test_lowering_is_the_reference(
        self, base: BaseView, tmp_path: Path, backends: list[Backend], scale: float
    ) -> None:
        """What a backend computes from the normal form is what the author's formula gives."""
        adapter = self.adapter(base, tmp_path)
        for target in self.targets:
            _, expected = self.expected(base, adapter, target, scale)
            for backend in backends:
                with _attached(backend, base.targets[target]) as run:
                    found = run([self.lowered(base, adapter, target, scale)])
                error = relative_error(found, expected, size=0.1)
                assert error < self.tolerance, f"{target} at scale {scale} on backend {backend.name}"

    def test_scale_zero_is_no_effect(self, base: BaseView, tmp_path: Path) -> None:
        """The adapter is left out altogether."""
        assert lower(self.adapter(base, tmp_path), self.variants, base, 0.0) == {}

    def test_the_adapter_does_something(self, base: BaseView, tmp_path: Path) -> None:
        """Tensors at rest would prove nothing."""
        adapter = self.adapter(base, tmp_path)
        for target in self.targets:
            x, weight, bias = _dense(base.targets[target])
            _, changed = self.expected(base, adapter, target, 1.0)
            assert relative_error(changed, x @ weight.T + bias, size=0.1) > 100 * self.tolerance

    def test_storage_keeps_everything(self, base: BaseView, tmp_path: Path) -> None:
        """Params, tensors and their sharing; lowered from the file, no bit differs."""
        adapter = self.adapter(base, tmp_path)
        with Writer(tmp_path / "a.adrt", {}) as writer:
            write_adapter(writer, replace(adapter, base=base.record()))
        with open_file(tmp_path / "a.adrt") as file:
            stored = read_adapter(file, f"adapter/{adapter.name}")
            assert stored.targets == adapter.targets
            for before, after in zip(
                lower(adapter, self.variants, base, 0.5).items(),
                lower(stored, self.variants, base, 0.5).items(),
                strict=True,
            ):
                assert before[0] == after[0]
                _same(before[1], after[1])

    def test_a_mixed_batch_equals_each_alone(
        self, base: BaseView, tmp_path: Path, backends: list[Backend]
    ) -> None:
        """Two adapters, one of them at two scales, and none, in one step."""
        adapters = [self.adapter(base, tmp_path, seed) for seed in (1, 2)]
        for target in self.targets:
            first, second = (self.lowered(base, adapter, target) for adapter in adapters)
            stacks = [[first], [], [second], [self.lowered(base, adapters[0], target, 0.5)], [first, second]]
            for backend in backends:
                with _attached(backend, base.targets[target]) as run:
                    together, alone = run(*stacks), np.concatenate([run(stack) for stack in stacks])
                assert relative_error(together, alone, size=0.1) < 1e-5, f"{target} on backend {backend.name}"

    def test_stacked_with_lora(self, base: BaseView, tmp_path: Path, backends: list[Backend]) -> None:
        """A LoRA stacked on it adds to the formula; stacked on a LoRA, every backend agrees with the reference."""
        adapter = self.adapter(base, tmp_path)
        reference = ReferenceBackend()
        for target in self.targets:
            attach = base.targets[target]
            if attach.kind == "norm":
                continue
            x, expected = self.expected(base, adapter, target, 1.0)
            u, v = random(5, expected.shape[1], 3), random(6, 3, x.shape[1], scale=0.1)
            lora = Lowered((LowRank(from_float32(u, "f32"), from_float32(v, "f32"), 0.5),))
            mine = self.lowered(base, adapter, target)
            with _attached(reference, attach) as run:
                over = run([lora, mine])
            for backend in backends:
                with _attached(backend, attach) as run:
                    found = run([mine, lora], [lora, mine])
                wanted = np.concatenate([expected + 0.5 * (x @ v.T @ u.T), over])
                assert relative_error(found, wanted, size=0.1) < self.tolerance, f"{target} on {backend.name}"

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_broken_tensor_is_refused(self, base: BaseView, tmp_path: Path, fault: str) -> None:
        """Each tensor of the folder in turn is broken; the refusal is one line that names it."""
        sound = self.arrays(base, 1)
        for number, key in enumerate(sound):
            broken = sound | {key: FAULTS[fault](sound[key])}
            folder = write_peft(tmp_path / str(number), self.config, broken)
            self._refused(base, folder, key.removeprefix(PEFT_PREFIX))

    def test_a_missing_tensor_is_refused(self, base: BaseView, tmp_path: Path) -> None:
        """Unless it may be absent, or is all that its module has: then the module is not adapted."""
        sound = self.arrays(base, 1)
        for number, (key, attach, role, _) in enumerate(self.entries(base)):
            left = {name: array for name, array in sound.items() if name != key}
            if role in self.variant.optional or not any(f"{attach.module}." in name for name in left):
                continue
            self._refused(base, write_peft(tmp_path / str(number), self.config, left), key.split(".")[-1])

    def test_an_extra_tensor_or_option_is_refused(self, base: BaseView, tmp_path: Path) -> None:
        """Nothing in a folder is silently left aside."""
        sound = self.arrays(base, 1)
        module = base.targets[self.targets[0]].module
        extra = {f"{PEFT_PREFIX}{module}.surprise": np.ones(3, np.float32)}
        self._refused(base, write_peft(tmp_path / "a", self.config, sound | extra), "surprise")
        shared = {"base_model.surprise": np.ones(3, np.float32)}
        self._refused(base, write_peft(tmp_path / "b", self.config, sound | shared), "surprise")
        option = {**self.config, "surprise": True}
        self._refused(base, write_peft(tmp_path / "c", option, sound), "surprise")

    def _refused(self, base: BaseView, folder: Path, name: str) -> None:
        with pytest.raises(AdapterError) as caught:
            lower(import_peft(folder, self.variants, base), self.variants, base, 1.0)
        assert name in str(caught.value) and "\n" not in str(caught.value)


Stacked = Callable[..., Floats]


@contextmanager
def _attached(backend: Backend, attach: BaseTarget) -> Iterator[Stacked]:
    """A Program of this one attach point; the function in the block gives y of TOKENS for each stack it gets."""
    made = _program(attach)
    executable = backend.load(made.program, made.tensors, LoadOptions(precision="exact", threads=1))
    executable.reserve(16)
    try:
        yield lambda *stacks: _run(executable, attach.target, stacks)
    finally:
        executable.close()


def _run(executable: Executable, target: str, stacks: Sequence[Sequence[Lowered]]) -> Floats:
    handles = [[executable.attach({target: lowered}) for lowered in stack] for stack in stacks]
    logits = executable.step(batch([Run(TOKENS, 0, [i], stack) for i, stack in enumerate(handles)]))
    for handle in (handle for stack in handles for handle in stack):
        executable.detach(handle)
    return logits


def _program(attach: BaseTarget) -> Model:
    """The attach point alone, on rows of a random table; its output is the logits."""
    out, inner = (size[1] for size in sorted(sizes(attach).items(), reverse=True))
    names = [("w", attach.weight_name), ("b", attach.bias_name)]
    tensors = {ours: attach.file.tensor(SECTION, theirs) for ours, theirs in names if theirs}
    bias = "b" if "b" in tensors else None
    if attach.kind == "embedding":
        identity = {"identity": from_float32(np.eye(out, dtype=np.float32), "f32")}
        ops: list[Op] = [Embed("x", "w", attach.target), Logits("x", "identity", None, "none")]
        return model(ops, {"x": out}, tensors | identity)
    if attach.kind == "norm":
        return probe([Norm("x", "x", "w", EPS, attach.target)], "x", {"x": out}, tensors)
    linear = Linear("y", "x", "w", bias, attach.target)
    return probe([linear], "y", {"x": inner, "y": out}, tensors)


def _dense(attach: BaseTarget) -> tuple[Floats, Floats, Floats]:
    """What `reference` is given of an attach point: the x of TOKENS, the weight [out, in] and the bias [out]."""
    weight, bias = attach.weight(), attach.bias()
    out, inner = (size[1] for size in sorted(sizes(attach).items(), reverse=True))
    x = random(0, VOCABULARY, inner)[TOKENS]
    if attach.kind == "embedding":
        x, weight = np.eye(inner, dtype=np.float32)[TOKENS], weight.T
    if attach.kind == "norm":
        x, weight = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(EPS)), np.diag(weight)
    return x, weight, np.zeros(out, np.float32) if bias is None else bias


def _same(before: Lowered, after: Lowered) -> None:
    """Two lowered targets are equal in every number."""
    left, right = (list(_numbers(lowered)) for lowered in (before, after))
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def _numbers(value: object) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield from (value.dtype, value.shape, value.data)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    else:
        yield value
