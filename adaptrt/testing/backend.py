"""Backend conformance: a backend against the numpy reference, on random Programs, batches and adapters.

    class TestMine(BackendConformance):
        backend = MyBackend()

Every test is a method, so pytest names what fails; override a class attribute to declare another tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import Lowered, LoweredAdapter
from adaptrt.backends.base import Backend, Batch, Executable, LoadOptions, attach_points
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.errors import BackendError, ClosedError
from adaptrt.program import Attention, Linear, Logits, Norm, Rope
from adaptrt.quant.plain import from_float32
from adaptrt.testing.programs import (
    DTYPES,
    OPERATIONS,
    VOCABULARY,
    Floats,
    Model,
    Pages,
    Run,
    Sizes,
    batch,
    decoder,
    dense,
    everything,
    everything_at,
    kronecker,
    linear_model,
    low_rank,
    operation_model,
    probe,
    random,
    relative_error,
    rotation,
    run_tokens,
    sparse,
)

PRECISIONS = ("exact", "fast")
SMALL = Sizes(width=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocabulary=41, layers=1)
LENGTHS = (7, 1, 4, 1, 2, 9, 1, 3)  # tokens of the sequences of a ragged batch
PAGE_TOKENS = 4

Work = Callable[[Executable], Floats]
Part = Callable[[int, AttachPoint], Lowered]

PARTS: Mapping[str, Part] = {
    **{
        f"low rank, {dtype}": lambda s, p, dtype=dtype: Lowered((low_rank(s, p, 5, dtype),))  # type: ignore[misc]
        for dtype in DTYPES
    },
    "low rank with d and e": lambda s, p: Lowered((low_rank(s, p, 3 + s % 2, "f32", d=True, e=True),)),
    "low rank, larger U and V": lambda s, p: Lowered((low_rank(s, p, 4, "f16", beyond=3),)),
    "dense": lambda s, p: Lowered((dense(s, p, "bf16"),)),
    "dense, int8": lambda s, p: Lowered((dense(s, p, "int8"),)),
    "dense, nf4": lambda s, p: Lowered((dense(s, p, "nf4"),)),
    "dense with d and e": lambda s, p: Lowered((dense(s, p, "f32", vectors=True),)),
    "sparse": lambda s, p: Lowered((sparse(s, p, 0.1),)),
    "sparse, empty": lambda s, p: Lowered((sparse(s, p, 0.0),)),
    "Kronecker": lambda s, p: Lowered((kronecker(s, p, "f32", 6, 8),)),
    "g_in": lambda s, p: Lowered(g_in=1 + random(s, p.inner, scale=0.3)),
    "rotation": lambda s, p: Lowered(rotation=rotation(s, p.inner, 16)),
    "g_out": lambda s, p: Lowered(g_out=1 + random(s, p.out, scale=0.3)),
    "g_out on the bias": lambda s, p: Lowered(g_out=1 + random(s, p.out, scale=0.3), scales_bias=True),
    "c": lambda s, p: Lowered(c=random(s, p.out)),
    "everything": everything_at,
}
TAKEN = {"embedding": PARTS.keys() - {"Kronecker", "rotation"}, "norm": {"g_out", "everything"}}
CASES = [(k, p) for k in ("linear", "head", "embedding", "norm") for p in PARTS if p in TAKEN.get(k, PARTS)]

ADAPTERS = 6
DISTRIBUTIONS: Mapping[str, Callable[[np.random.Generator], Sequence[int]]] = {
    "identical": lambda rng: [0] * len(LENGTHS),
    "distinct": lambda rng: [i % ADAPTERS for i in range(len(LENGTHS))],
    "Zipf": lambda rng: (np.minimum(rng.zipf(1.5, len(LENGTHS)), ADAPTERS) - 1).tolist(),
}


class BackendConformance:
    """Subclass it and set `backend`; every method is a test."""

    backend: ClassVar[Backend]
    device: ClassVar[str] = ""
    tolerance: ClassVar[Mapping[str, float]] = {"exact": 1e-5, "fast": 1e-2}  # of one operation, per token
    whole: ClassVar[Mapping[str, float]] = {"exact": 2e-4, "fast": 5e-2}  # of a whole model
    independence: ClassVar[float] = (
        0.0  # in `exact`, of a token from the rest of its batch; 0: to the last bit
    )

    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        """Skip where the backend cannot run."""
        if reason := self.backend.unavailable():
            pytest.skip(f"backend {self.backend.name}: {reason}")

    def load(self, model: Model, precision: str = "exact", **options: Any) -> Executable:
        """The model on the backend."""
        return self.backend.load(model.program, model.tensors, self.options(precision, **options))

    def options(self, precision: str = "exact", **options: Any) -> LoadOptions:
        """Small pages, and keys and values in float32 unless a test says otherwise."""
        given: dict[str, Any] = {
            "page_tokens": PAGE_TOKENS,
            "kv_dtype": "f32",
            "device": self.device,
            "threads": 1,
        }
        return LoadOptions(**given | {"precision": precision} | options)

    def error(self, model: Model, precision: str, work: Work, size: float = 0.0, **options: Any) -> float:
        """How far `work` on the backend is from `work` on the reference, per token; `size` as in relative_error."""
        reference = ReferenceBackend().load(model.program, model.tensors, self.options(**options))
        found, expected = work(self.load(model, precision, **options)), work(reference)
        assert found.dtype == np.float32 and found.shape == expected.shape
        return relative_error(found, expected, size)

    def sequence(self, model: Model, precision: str, n_tokens: int, **options: Any) -> float:
        """The error over one sequence without adapters."""
        tokens = np.random.default_rng(1).integers(0, VOCABULARY, n_tokens).tolist()
        return self.error(
            model, precision, lambda executable: run_tokens(executable, tokens, PAGE_TOKENS), 1.0, **options
        )

    # Operations

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linear(self, dtype: str, precision: str) -> None:
        """Sizes around the quantization blocks of 64, with and without a bias."""
        for rows, cols in ((1, 1), (3, 31), (65, 64), (16, 65), (7, 256)):
            for n_tokens in (1, 3, 17):
                model = linear_model(rows, cols, dtype, bias=rows == 3)
                assert self.sequence(model, precision, n_tokens) < self.tolerance[precision]

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_operation(self, name: str, precision: str) -> None:
        """Each operation alone, on one token and on several."""
        for n_tokens in (1, 9):
            assert self.sequence(operation_model(name), precision, n_tokens) < self.tolerance[precision]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_embedding(self, dtype: str) -> None:
        """Rows picked from a table of any dtype."""
        model = probe([], "x", {"x": 70}, {})
        model.tensors["table_x"] = from_float32(random(2, VOCABULARY, 70), dtype)
        assert self.sequence(model, "exact", 5) < self.tolerance["exact"]

    @pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
    @pytest.mark.parametrize("cap", [0.0, 1.5])
    @pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 20), (8, 1, 64)])
    def test_rope_and_attention(
        self, heads: int, kv_heads: int, head_dim: int, cap: float, kv_dtype: str
    ) -> None:
        """Grouped queries over several pages."""
        q, kv = heads * head_dim, kv_heads * head_dim
        ops = [Rope("x", heads, head_dim, "inv", 1.25), Rope("y", kv_heads, head_dim, "inv", 0.5)]
        attention = Attention("out", "x", "y", "z", 0, heads, kv_heads, head_dim, head_dim**-0.5, cap)
        inv = (0.5 ** np.arange(head_dim // 2)).astype(np.float32)
        model = probe([*ops, attention], "out", {"x": q, "y": kv, "z": kv, "out": q}, {}, {"inv": inv})
        for n_tokens in (1, 4, 21):
            tolerance = max(self.tolerance["exact"], 1e-3 if kv_dtype == "f16" else 1e-5)
            assert self.sequence(model, "exact", n_tokens, kv_dtype=kv_dtype) < tolerance

    # Adapters

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize(("kind", "part"), CASES)
    def test_part_of_the_normal_form(self, kind: str, part: str, precision: str) -> None:
        """One part at one kind of attach point: alone, twice, and around another adapter, in one batch."""
        model, target = attach_model(kind)
        point = attach_points(model.program, model.tensors)[target]
        other = Lowered(g_out=1 + random(8, point.out, scale=0.2))
        if kind != "norm":
            other = replace(other, terms=(low_rank(7, point, 3, "f32"),), c=random(9, point.out))

        def work(executable: Executable) -> Floats:
            executable.reserve(8)
            lowered = (PARTS[part](50, point), PARTS[part](101, point), other)
            a, b, c = (executable.attach({target: one}) for one in lowered)
            stacks = [(a,), (), (c, a), (b, c), (b, a), (a,)]
            pages = [[0], [1], [2], [3], [6, 7], [5]]
            lengths = [1, 2, 3, 4, 5, 1]
            return executable.step(
                batch(
                    [
                        Run([3, 1, 4, 1, 5][:n], 0, p, s)
                        for n, p, s in zip(lengths, pages, stacks, strict=True)
                    ]
                )
            )

        assert self.error(model, precision, work, size=0.1) < self.tolerance[precision]

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_ragged_batch_of_stacks(self, distribution: str, precision: str) -> None:
        """Prefill, then decode, of sequences whose adapters hold every kind of term, on scattered pages."""
        model = decoder(SMALL)
        picked = DISTRIBUTIONS[distribution](np.random.default_rng(3))
        error = self.error(model, precision, lambda executable: self._ragged(executable, model, picked))
        assert error < self.whole[precision]

    def _ragged(self, executable: Executable, model: Model, picked: Sequence[int]) -> Floats:
        handles = [executable.attach(everything(model, seed)) for seed in range(1, ADAPTERS + 1)]
        stacks = [(handles[first],) + ((handles[0],) if i % 3 == 1 else ()) for i, first in enumerate(picked)]
        stacks[3] = ()
        pages = Pages(PAGE_TOKENS, 32)
        executable.reserve(32)
        taken = [pages.take(length + 1) for length in LENGTHS]
        prompts = zip(LENGTHS, taken, stacks, strict=True)
        runs = [Run([(7 * n + j) % 41 for j in range(n)], 0, own, stack) for n, own, stack in prompts]
        runs[5].wanted = [0, 8, 8, 3]
        first = executable.step(batch(runs))
        more = [Run([i], len(run.tokens), run.pages, run.stack) for i, run in enumerate(runs)]
        return np.concatenate([first, executable.step(batch(more))])

    def test_an_adapter_attached_late_detached_and_shared(self) -> None:
        """Adapters come and go between steps; one that shares tensors with a detached one still works."""
        model = decoder(SMALL)
        shared = everything(model, 4)

        def work(executable: Executable) -> Floats:
            first, second = executable.attach(shared), executable.attach(dict(shared))
            before = run_tokens(executable, [3, 1], PAGE_TOKENS, [second])
            executable.detach(first)
            third = executable.attach(everything(model, 5))
            after = [run_tokens(executable, [3, 1], PAGE_TOKENS, stack) for stack in ([second], [third], [])]
            return np.concatenate([before, *after])

        assert self.error(model, "exact", work) < self.whole["exact"]

    # Batches

    def test_a_token_does_not_depend_on_its_batch(self) -> None:
        """The same sequences alone, together, and cut into pieces, in `exact`."""
        model = decoder(SMALL)
        executable = self.load(model)
        handles = [executable.attach(everything(model, seed)) for seed in (1, 2, 3)]
        stacks = [(handles[i % 3], handles[0]) if i % 4 else () for i in range(len(LENGTHS))]
        sequences = [[(5 * i + j * j) % 41 for j in range(length)] for i, length in enumerate(LENGTHS)]
        executable.reserve(32)
        taken = [Pages(PAGE_TOKENS, 32).take(12)[:3] for _ in sequences]
        whole = [
            Run(tokens, 0, pages, stack)
            for tokens, pages, stack in zip(sequences, taken, stacks, strict=True)
        ]
        alone = [executable.step(batch([run])) for run in whole]
        own = Pages(PAGE_TOKENS, 32)
        whole = [replace(run, pages=own.take(len(run.tokens))) for run in whole]
        self._same(executable.step(batch(whole)), np.concatenate(alone))
        halves = [(run.tokens[:2], run.tokens[2:]) for run in whole]
        executable.step(
            batch([replace(run, tokens=head) for run, (head, _) in zip(whole, halves, strict=True)])
        )
        rest = [(i, replace(whole[i], tokens=tail, start=2)) for i, (_, tail) in enumerate(halves) if tail]
        found = executable.step(batch([run for _, run in rest]))
        self._same(found, np.concatenate([alone[i][2:] for i, _ in rest]))

    def _same(self, found: Floats, expected: Floats) -> None:
        if self.independence == 0:
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
        else:
            assert relative_error(found, expected) <= self.independence

    def test_pages_are_shared_and_reordered(self) -> None:
        """Two sequences continue one prefix on its pages; one of them changes its adapter on the way."""
        model = decoder(SMALL)

        def work(executable: Executable) -> Floats:
            executable.reserve(10)
            handle = executable.attach(everything(model, 1))
            prefix, pages = [5, 6, 7, 8, 9, 10, 11, 12], [9, 2]
            steps = [
                [Run(prefix, 0, pages)],
                [Run([1, 2, 3], 8, [*pages, 0], (handle,)), Run([4], 8, [*pages, 7])],
                [Run([5], 9, [*pages, 7]), Run([6, 7], 10, [*pages, 7], (handle,))],
            ]
            return np.concatenate([executable.step(batch(runs)) for runs in steps])

        assert self.error(model, "exact", work) < self.whole["exact"]

    def test_logits_in_any_order_and_none(self) -> None:
        """`logit_rows` picks tokens freely."""
        executable = self.load(decoder(SMALL))
        executable.reserve(4)
        every = executable.step(batch([Run([1, 2, 3, 4, 5, 6], 0, [3, 1])]))
        rows = np.array([5, 0, 3, 3], np.int32)
        picked = replace(batch([Run([1, 2, 3, 4, 5, 6], 0, [3, 1])]), logit_rows=rows)
        found = executable.step(picked)
        assert relative_error(found, every[rows]) < self.tolerance["exact"]
        assert executable.step(replace(picked, logit_rows=rows[:0])).shape == (0, every.shape[1])

    # Refusals

    @pytest.mark.parametrize("name", ["token", "position", "page", "handle", "logit row", "run", "length"])
    def test_an_impossible_batch_is_refused_and_nothing_breaks(self, name: str) -> None:
        """Each raises BackendError in one line, and the next step works."""
        executable = self.load(decoder(SMALL))
        executable.reserve(3)
        good = batch([Run([1, 2, 3, 4, 5], 0, [0, 1]), Run([6], 3, [2])])
        before = executable.step(good)
        for hostile in _hostile(name, good):
            _refused(lambda hostile=hostile: executable.step(hostile))  # type: ignore[misc]
        np.testing.assert_array_equal(executable.step(good), before)

    @pytest.mark.parametrize("name", ["no such target", "U and V", "g_out", "NaN"])
    def test_an_impossible_adapter_is_refused(self, name: str) -> None:
        """A target, a shape or a number that cannot be."""
        model, target = attach_model("linear")
        point = attach_points(model.program, model.tensors)[target]
        wrong = AttachPoint("linear", point.out + 1, point.inner + 2)
        low = Lowered((low_rank(1, point, 3, "f32"),))
        adapters: dict[str, LoweredAdapter] = {
            "no such target": {"nowhere": low},
            "U and V": {target: Lowered((low_rank(1, replace(wrong, inner=point.inner - 1), 3, "f32"),))},
            "g_out": {target: replace(low, g_out=np.ones(wrong.out, np.float32))},
            "NaN": {target: Lowered((replace(low.terms[0], scale=float("nan")),))},
        }
        _refused(lambda: self.load(model).attach(adapters[name]))

    def test_unknown_handles_and_closing(self) -> None:
        """A handle works until it is detached; closing twice is safe, and nothing works afterwards."""
        model = decoder(SMALL)
        executable = self.load(model)
        handle = executable.attach(everything(model, 1))
        executable.detach(handle)
        for unknown in (handle, -1, 1000):
            _refused(lambda unknown=unknown: executable.detach(unknown))  # type: ignore[misc]
        assert executable.describe() and "\n" not in executable.describe()
        executable.close()
        executable.close()
        with pytest.raises(ClosedError):
            executable.step(batch([Run([1], 0, [0])]))

    def test_a_device_that_is_not_there_is_refused(self) -> None:
        """A backend that takes a device says which it cannot have."""
        if not getattr(self.backend, "takes_device", False):
            pytest.skip("this backend takes no device")
        model = linear_model(3, 4, "f32")
        options = replace(self.options(), device="abacus:99")
        _refused(lambda: self.backend.load(model.program, model.tensors, options))


def attach_model(kind: str) -> tuple[Model, str]:
    """A small Program with one attach point of this kind, out 48 and in 64, whose output is the logits."""
    tensors = {
        "w": from_float32(random(1, 48, 64, scale=0.125), "f32"),
        "b": from_float32(random(2, 48), "f32"),
    }
    if kind == "embedding":
        return probe([], "x", {"x": 48}, {}), "embed_x"
    if kind == "norm":
        norm = {"w": from_float32(1 + random(3, 48, scale=0.1), "f32")}
        return probe([Norm("x", "x", "w", 1e-5, "norm")], "x", {"x": 48}, norm), "norm"
    made = probe([Linear("y", "x", "w", "b", "linear")], "y", {"x": 64, "y": 48}, tensors)
    if kind == "linear":
        return made, "linear"
    ops = (made.program.ops[0], Logits("x", "w", "b", "head"))
    return Model(replace(made.program, ops=ops, registers={"x": 64}), made.tensors), "head"


def _hostile(name: str, good: Batch) -> list[Batch]:
    changes: Mapping[str, Sequence[tuple[str, int, int]]] = {
        "token": [("tokens", 2, 41), ("tokens", 0, -1)],
        "position": [
            ("positions", 5, -3),
            ("positions", 1, 7),
            ("positions", 5, 4),
            ("positions", 5, 2**31 - 1),
        ],
        "page": [("pages", 0, 3), ("pages", 2, -1)],
        "logit row": [("logit_rows", 0, 6), ("logit_rows", 1, -1)],
        "run": [("run_start", 0, 1), ("run_start", 2, 7), ("run_start", 1, 8), ("page_start", 1, -1)],
    }
    if name == "handle":
        return [batch([Run([1], 0, [0], (handle,))]) for handle in (-1, 0, 77)]
    if name == "length":
        return [
            replace(good, positions=good.positions[:2]),
            replace(good, pages=good.pages[:1]),
            replace(good, page_start=good.page_start[:2]),
            batch([]),
        ]
    made = []
    for array, index, value in changes[name]:
        made.append(copy.deepcopy(good))
        getattr(made[-1], array)[index] = value
    return made


def _refused(call: Callable[[], object]) -> None:
    with pytest.raises(BackendError) as caught:
        call()
    assert str(caught.value) and "\n" not in str(caught.value)
