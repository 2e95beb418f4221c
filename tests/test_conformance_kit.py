"""The conformance kits can fail: each way of being wrong is caught by the test that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adaptrt.adapters.lora import LoraVariant
from adaptrt.adapters.normal import Lowered, LoweredAdapter, Sparse
from adaptrt.backends.base import Batch, LoadOptions
from adaptrt.backends.reference import ReferenceBackend, ReferenceExecutable
from adaptrt.plugins import load_registry
from adaptrt.program import Program
from adaptrt.tensor import Tensor
from adaptrt.testing import BackendConformance, VariantConformance
from adaptrt.testing.folders import tiny_base

Spoil = Callable[[Lowered], Lowered]


class SpoiltBackend:
    """The reference, with something done to every adapter it is given or to every batch."""

    name = "spoilt"

    def __init__(self, lowered: Spoil = lambda x: x, batch: Callable[[Batch], Batch] = lambda x: x) -> None:
        self.lowered, self.batch = lowered, batch

    def unavailable(self) -> None:
        return None

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> Any:
        spoilt = self

        class Executable(ReferenceExecutable):
            def attach(self, adapter: LoweredAdapter) -> int:
                return super().attach({target: spoilt.lowered(low) for target, low in adapter.items()})

            def step(self, batch: Batch) -> Any:
                return super().step(spoilt.batch(batch))

        return Executable(program, tensors, options)


def kit(backend: Any) -> BackendConformance:
    made = BackendConformance()
    made.backend = backend  # type: ignore[misc]
    return made


def first_term(**changes: Any) -> Spoil:
    return lambda low: replace(low, terms=(replace(low.terms[0], **changes), *low.terms[1:]))


SPOILT: dict[str, tuple[str, Spoil]] = {
    "d forgotten": ("low rank with d and e", first_term(d=None)),
    "e forgotten": ("low rank with d and e", first_term(e=None)),
    "scale forgotten": ("dense", first_term(scale=1.0)),
    "rotation forgotten": ("rotation", lambda low: replace(low, rotation=None)),
    "bias not scaled": ("g_out on the bias", lambda low: replace(low, scales_bias=False)),
    "bias scaled": ("g_out", lambda low: replace(low, scales_bias=True)),
    "c forgotten": ("c", lambda low: replace(low, c=None)),
    "sparse left out": (
        "sparse",
        lambda low: replace(low, terms=tuple(t for t in low.terms if not isinstance(t, Sparse))),
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_backend_that_forgets_a_part_is_caught(name: str) -> None:
    part, spoil = SPOILT[name]
    kit(SpoiltBackend()).test_part_of_the_normal_form("linear", part, "exact")
    with pytest.raises(AssertionError):
        kit(SpoiltBackend(spoil)).test_part_of_the_normal_form("linear", part, "exact")


def test_a_backend_that_stacks_the_other_way_round_is_caught() -> None:
    spoilt = SpoiltBackend(batch=lambda batch: replace(batch, stacks=batch.stacks[::-1].copy()))
    with pytest.raises(AssertionError):
        kit(spoilt).test_part_of_the_normal_form("linear", "g_out", "exact")


def test_a_backend_that_mixes_up_pages_is_caught() -> None:
    spoilt = SpoiltBackend(batch=lambda batch: replace(batch, positions=batch.positions // 2 * 2))
    with pytest.raises(AssertionError):
        kit(spoilt).test_pages_are_shared_and_reordered()


@pytest.mark.parametrize("name", ["handle", "logit row", "token"])
def test_a_backend_that_trusts_its_batch_is_caught(name: str) -> None:
    with pytest.raises((KeyError, IndexError, pytest.fail.Exception)):
        kit(SpoiltBackend()).test_an_impossible_batch_is_refused_and_nothing_breaks(name)


class Lora(VariantConformance):
    """LoRA, to be spoilt: an attribute of this class is the fault."""

    variant = LoraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}

    def reference(self, x: Any, weight: Any, bias: Any, params: Any, tensors: Any, scale: float) -> Any:
        return x @ (weight + 2 * scale * tensors["B"] @ tensors["A"]).T + bias


class ScaleSquared(LoraVariant):
    def at_scale(self, lowered: Lowered, params: Any, tensors: Any, base: Any, scale: float) -> Lowered:
        return lowered.scaled(scale * scale)


class AnyOption(LoraVariant):
    def check_config(self, config: Any, problems: Any) -> None:
        pass


class Jealous(LoraVariant):
    name = "jealous"


def test_a_variant_that_is_wrong_is_caught(tmp_path: Path) -> None:
    registry = load_registry()
    base = tiny_base(tmp_path / "base.adrt", registry.architectures["llama"])
    backends: list[Any] = [ReferenceBackend()]
    spoilt = Lora()
    spoilt.test_lowering_is_the_reference(base, tmp_path / "sound", backends, 0.5)
    spoilt.variant = ScaleSquared()  # type: ignore[misc]
    spoilt.test_lowering_is_the_reference(base, tmp_path / "one", backends, 1.0)
    with pytest.raises(AssertionError):
        spoilt.test_lowering_is_the_reference(base, tmp_path / "half", backends, 0.5)
    spoilt.variant = AnyOption()  # type: ignore[misc]
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        spoilt.test_an_extra_tensor_or_option_is_refused(base, tmp_path / "options")
    spoilt.variant = Jealous()  # type: ignore[misc]
    with pytest.raises(AssertionError):
        spoilt.test_the_config_is_claimed_by_this_variant_alone(registry)


def test_tensors_at_rest_are_caught(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base.adrt", load_registry().architectures["llama"])
    resting = Lora()
    resting.tensor = lambda role, shape, rng: rng.random(shape, "f4") * (role == "A")  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        resting.test_the_adapter_does_something(base, tmp_path)
