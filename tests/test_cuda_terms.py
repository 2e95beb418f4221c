"""The CUDA backend against the numpy reference: every kind of adapter term, alone, stacked and in mixed batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.cuda import TOLERANCE, assert_close, load, needs_gpu, plain, reference, sparse

from adaptrt.adapters.normal import Kronecker, Lowered, LoweredAdapter, LowRank
from adaptrt.program import Add, Embed, Gated, Linear, Logits, Norm, Op
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import Tensor
from adaptrt.testing.programs import (
    DTYPES,
    VOCABULARY,
    Model,
    Pages,
    Run,
    batch,
    linear_model,
    model,
    probe,
    random,
    weight,
)

OUT, IN = 96, 128
TERMS = {
    **{f"u {u} v {v}": plain(8, OUT, IN, 1, u, v) for u in DTYPES for v in (u, "bf16")},
    "odd rank": plain(13, OUT, IN, 1),
    "wide rank": plain(256, OUT, IN, 1, "f32", "f32"),
    "d and e": plain(8, OUT, IN, 1, d=1 + random(2, 8), e=1 + random(3, OUT)),
    "leading parts": LowRank(
        from_float32(random(1, OUT + 40, 4), "bf16"),
        from_float32(random(2, 4, IN + 3, scale=0.1), "bf16"), 1.0, random(3, 4), random(4, OUT)
    ),
    "dense": LowRank(None, from_float32(random(1, OUT, IN, scale=0.1), "bf16"), 0.5),
    "dense with vectors": LowRank(
        None, from_float32(random(1, OUT, IN, scale=0.1), "int8"), 0.5, random(2, OUT), random(3, OUT)
    ),
    "sparse": sparse(OUT, IN, 1),
    "kronecker": Kronecker(
        from_float32(random(1, 12, 8), "f16"), from_float32(random(2, 8, 16, scale=0.1), "f32"), 0.7
    ),
    "odd kronecker": Kronecker(
        from_float32(random(1, 96, 128, scale=0.1), "bf16"), from_float32(random(2, 1, 1), "f32"), 0.7
    ),
}  # fmt: skip
LOWERED = {
    **{name: Lowered((term,)) for name, term in TERMS.items()},
    "vectors": Lowered(g_in=1 + random(1, IN), g_out=random(2, OUT), c=random(3, OUT)),
    "scaled bias": Lowered(g_out=random(2, OUT), c=random(3, OUT), scales_bias=True),
    "rotation": Lowered(rotation=random(1, IN // 8, 8, 8, scale=0.35)),
    "rotation after g_in": Lowered((plain(4, OUT, IN, 5),), random(2, IN), random(1, 2, IN // 2, IN // 2, scale=0.1)),
    "several terms": Lowered((TERMS["sparse"], TERMS["d and e"], TERMS["kronecker"], TERMS["odd rank"])),
}  # fmt: skip


def adapted_model(dtype: str = "nf4") -> Model:
    tensors = {}
    weight("w", OUT, IN, dtype, tensors)
    tensors["b"] = from_float32(random(9, OUT), "f32")
    return probe([Linear("out", "x", "w", "b", "w")], "out", {"x": IN, "out": OUT}, tensors)


def compare_stacks(model: Model, adapters: list[LoweredAdapter], runs: list[Run], tolerance: float) -> None:
    """`runs` have indices into `adapters` as their stacks, and pages of a token each."""
    results = []
    for executable in (load(model, page_tokens=1), reference(model, page_tokens=1)):
        handles = [executable.attach(one) for one in adapters]
        pages = Pages(1, 4096)
        executable.reserve(4096)
        made = [
            replace(run, pages=pages.take(run.start + len(run.tokens)), stack=[handles[i] for i in run.stack])
            for run in runs
        ]
        results.append(executable.step(batch(made)))
    assert_close(*results, tolerance)


@needs_gpu
@pytest.mark.parametrize("name", LOWERED)
def test_term(name: str) -> None:
    adapters: list[LoweredAdapter] = [
        {"w": LOWERED[name]},
        {"w": Lowered((plain(3, OUT, IN, 40),), g_out=random(5, OUT))},
    ]
    runs = [
        Run([1, 2, 3], 0, stack=(0,)),
        Run([4], stack=()),
        Run([5], stack=(0, 1)),
        Run([6] * 19, stack=(1, 0)),
    ]
    compare_stacks(adapted_model(), adapters, runs, TOLERANCE)
    few = [Run([4], stack=()), Run([1], stack=(0,)), Run([5, 2], stack=(0, 1)), Run([7, 8, 9], stack=(1, 0))]
    compare_stacks(adapted_model(), adapters, few, TOLERANCE)
    compare_stacks(adapted_model(), adapters, few[1:2], TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cols", [64, 1088, 14400]
)  # the last is too long for 8 tokens in one block of threads
def test_adapters_beside_the_product(cols: int, dtype: str) -> None:
    """Few tokens with stacks of adapters or none, on two layers with one input: steps that repeat and change."""
    tensors: dict[str, Any] = {}
    rows = 120 if cols == 64 else 128  # which are two products or one
    base = "nf4" if dtype == "bf16" else dtype
    weight("w", rows, cols, base, tensors)
    weight("v", rows, cols, base, tensors, seed=2)
    ops = [Linear("y", "x", "w", None, "w"), Linear("z", "x", "v", None, "v"), Add("z", "y", "z")]
    model = probe(ops, "z", {"x": cols, "y": rows, "z": rows}, tensors)
    first = plain(16, rows, cols, 1, dtype, dtype)
    adapters: list[LoweredAdapter] = [
        {"w": Lowered((first,)), "v": Lowered((replace(first, d=random(5, 16), e=random(6, rows)),))},
        {"v": Lowered((plain(33, rows, cols, 7, dtype, dtype),), g_out=random(8, rows))},
        {"w": Lowered((plain(1, rows, cols, 9, dtype, dtype),)), "v": Lowered(g_out=random(10, rows))},
    ]
    alone = [
        [(1, (0,))],
        [(1, (1,)), (1, (0,))],
        [(1, (i,) if i < 3 else ()) for i in (3, 2, 0, 1, 2, 3, 1, 0)],
    ]
    shared = [[(3, (0,)), (1, ()), (2, (1, 0)), (1, (2, 1, 0))], [(8, (1,))], [(1, (0, 1, 2))]]
    more = [[(1, (i,) if i < 3 else ()) for i in (0, 3, 1, 2, 2, 0, 3) * 4]]
    more += [[(9, (1, 2))], [(1, (i % 3,)) for i in range(13)]]
    ours, theirs = load(model), reference(model)
    for executable in (ours, theirs):
        executable.reserve(84)
        assert [executable.attach(one) for one in adapters] == [0, 1, 2]
    for chosen in (alone + shared + more) * 3:
        runs = [
            Run([i % VOCABULARY] * n, 0, range(3 * i, 3 * i + 3), stack)
            for i, (n, stack) in enumerate(chosen)
        ]
        assert_close(ours.step(batch(runs)), theirs.step(batch(runs)))


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_adapters_of_a_large_head(dtype: str) -> None:
    """More outputs than all warps of a GPU have tiles: some tiles are one warp's alone."""
    rows, cols = 40_000, 64
    tensors = {"table": from_float32(random(0, VOCABULARY, cols), "f32")}
    weight("w", rows, cols, dtype, tensors)
    wide = model([Embed("x", "table", "embed"), Logits("x", "w", None, "head")], {"x": cols}, tensors)
    adapters: list[LoweredAdapter] = [
        {"head": Lowered((plain(5, rows, cols, 1),), g_out=random(5, rows))},
        {
            "head": Lowered(
                (plain(70, rows, cols, 2, "f32", "f16"), plain(2, rows, cols, 3)), c=random(6, rows)
            )
        },
        {"head": Lowered((plain(64, rows, cols, 4),))},  # for 8 tokens more than shared memory takes at once
    ]
    for runs in (
        [Run([i], stack=(2, 0) if i == 5 else (2,)) for i in range(8)],
        [Run([1], stack=(0,))],
        [Run([2, 3], stack=(1, 0)), Run([4], stack=()), Run([5], stack=(1,))],
        [Run([i % VOCABULARY], stack=((), (0,), (2,))[i % 3]) for i in range(20)],
    ):
        compare_stacks(wide, adapters, runs, TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("tokens", [2, 8, 9, 16])
def test_few_streams_with_stacks_of_their_own(tokens: int, dtype: str) -> None:
    """An adapter each, or one or two in common, or none, or gains, or stacks of up to three; and the same again."""
    rows, cols = 320, 1088
    tensors: dict[str, Any] = {}
    weight("w", rows, cols, "nf4", tensors)
    weight("v", rows, cols, "nf4", tensors, seed=2)
    ops = [Linear("y", "x", "w", None, "w"), Linear("z", "x", "v", None, "v"), Add("z", "y", "z")]
    both = probe(ops, "z", {"x": cols, "y": rows, "z": rows}, tensors)

    def low_rank(i: int) -> Lowered:
        e = random(i, rows) if i % 4 == 1 else None
        term = replace(plain(16 if i < 24 else i - 23, rows, cols, 2 * i, dtype, dtype), e=e)
        return Lowered((term,), g_out=random(i, rows) if i % 3 == 2 else None)

    adapters: list[LoweredAdapter] = [{"w": low_rank(i), "v": low_rank(i + 16)} for i in range(16)]
    adapters[3] = {"v": low_rank(3)}
    each = [(i,) for i in range(tokens)]
    batches = [
        each,
        [() if i % 3 == 1 else stack for i, stack in enumerate(each)],
        [(0,)] * tokens,
        [(i % 2,) for i in range(tokens)],
        [tuple((i + k) % 5 for k in range(i % 4)) for i in range(tokens)],
        [(0,) if i < tokens // 3 else () for i in range(tokens)],
        [(0,) if i >= tokens // 3 else () for i in range(tokens)],
    ]
    ours, theirs = load(both), reference(both)
    for executable in (ours, theirs):
        executable.reserve(tokens)
        assert [executable.attach(one) for one in adapters] == list(range(16))
    for stacks in batches * 2:
        runs = [Run([i % VOCABULARY], 0, range(i, i + 1), stack) for i, stack in enumerate(stacks)]
        assert_close(ours.step(batch(runs)), theirs.step(batch(runs)))


@needs_gpu
def test_many_adapters_in_one_batch() -> None:
    adapters: list[LoweredAdapter] = [
        {"w": Lowered((plain(1 + i % 9, OUT, IN, 3 * i, DTYPES[i % 5], DTYPES[i % 5]),))} for i in range(100)
    ]
    runs = [Run([i % VOCABULARY], stack=(i,)) for i in range(100)]
    compare_stacks(adapted_model(), adapters, runs, TOLERANCE)
    alike = linear_model(OUT, IN, "nf4")
    compare_stacks(alike, adapters, runs, TOLERANCE)
    gained = [{"w": replace(one["w"], g_out=random(i, OUT))} for i, one in enumerate(adapters[:20])]
    compare_stacks(alike, gained, runs[:20], TOLERANCE)
    for out in (OUT, 102):  # a row of outputs is a multiple of 16 bytes, or not
        for dtype in DTYPES[2:]:
            one_kind = [{"w": Lowered((plain(1 + i, out, IN, i, dtype, dtype),))} for i in range(20)]
            compare_stacks(linear_model(out, IN, "nf4"), one_kind, runs[:20], TOLERANCE)
    runs = [Run([i % VOCABULARY] * (1 + i % 3), stack=(0,) * (i % 3)) for i in range(50)]
    compare_stacks(adapted_model(), adapters, runs, TOLERANCE)


@needs_gpu
def test_many_adapters_with_longer_factors() -> None:
    """V with more columns than there are inputs and more than 16 ranks, U with more rows than outputs."""
    adapters: list[LoweredAdapter] = [{"w": Lowered((plain(20, OUT + 40, IN + 3, i),))} for i in range(20)]
    runs = [Run([i % VOCABULARY], stack=(i,)) for i in range(20)]
    compare_stacks(linear_model(OUT, IN, "nf4"), adapters, runs, TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize(("out", "tokens", "kept"), [(192, 40, False), (192, 40, True), (1088, 700, False)])
def test_gates_of_many_adapters(out: int, tokens: int, kept: bool, dtype: str) -> None:
    """A gate whose inputs nobody else wants, or somebody does; and more tokens than the warps of a GPU do at once."""
    tensors: dict[str, Any] = {}
    for name in ("w", "v"):
        weight(name, out, IN, "nf4", tensors)
    activation = "gelu_tanh" if kept else "silu"
    ops: list[Op] = [Linear("gate", "x", "w", None, "w"), Linear("up", "x", "v", None, "v")]
    ops += [Gated("gate", "gate", "up", activation), *[Add("gate", "gate", "up")] * kept]
    model = probe(ops, "gate", {"x": IN, "gate": out, "up": out}, tensors)

    def lowered(rank: int, seed: int, **vectors: Any) -> Lowered:
        term = plain(rank, out, IN, seed, dtype, dtype)
        return Lowered((replace(term, d=1 + random(seed, rank)),), **vectors)

    adapters: list[LoweredAdapter] = [
        {"w": lowered(16, 1), "v": lowered(8, 2)},
        {"w": lowered(33, 3, g_out=random(4, out))},
        {"v": lowered(1, 5), "w": Lowered(g_out=random(6, out))},
    ]
    runs = [Run([i % VOCABULARY], stack=((0,), (1,), (2,), ())[i % 4]) for i in range(tokens)]
    compare_stacks(model, adapters, runs, 2 * TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("out", [96, 102])  # the first are one product
@pytest.mark.parametrize(("rank", "dtype"), [(1, "f32"), (13, "bf16"), (64, "bf16"), (256, "f32")])
def test_factors_in_common(rank: int, dtype: str, out: int) -> None:
    """Adapters with one U and V (VeRA), and others, in stacks and runs of all kinds, on two layers with one input."""
    tensors: dict[str, Any] = {}
    weight("w", out, IN, "nf4", tensors)
    weight("v", out, IN, "nf4", tensors, seed=2)
    tensors["b"] = from_float32(random(9, out), "f32")
    ops = [Linear("y", "x", "w", None, "w"), Linear("z", "x", "v", "b", "v"), Add("z", "y", "z")]
    model = probe(ops, "z", {"x": IN, "y": out, "z": out}, tensors)
    u = from_float32(random(1, 130, rank, scale=rank**-0.5), dtype)
    v = from_float32(random(2, rank, IN + 3, scale=IN**-0.5), dtype)

    def vera(seed: int) -> LoweredAdapter:
        term = LowRank(u, v, 0.8, 1 + random(seed, rank), 1 + random(seed + 1, out))
        return {"w": Lowered((term,)), "v": Lowered((replace(term, d=None),))}

    adapters: list[LoweredAdapter] = [vera(3 * i + 1) for i in range(12)]
    plain_only = [Run([i % VOCABULARY], stack=(i,)) for i in range(12)]
    compare_stacks(model, adapters, plain_only, TOLERANCE)
    adapters.append({name: Lowered((plain(5, out, IN, 7),)) for name in ("w", "v")})
    several = (LowRank(u, v, 0.3), plain(2, out, IN, 8))
    adapters.append({"v": Lowered(several, g_out=random(5, out), c=random(6, out))})
    adapters.append({"w": Lowered(g_out=random(7, out))})
    stacks = [(12,), (), (13,), (0, 14), (14, 0), (12, 1), (2, 3), (13, 4), (0, 13, 12)]
    mixed = [Run([j] * (1 + j % 5 * 9), stack=stack) for j, stack in enumerate(stacks)]
    compare_stacks(model, adapters, plain_only + mixed, TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_large_factors_in_common(dtype: str) -> None:
    """More outputs, inputs, ranks and tokens than blocks take at a time; two layers with one U and each its own V."""
    out, cols, rank = 1100, 3136, 320
    tensors: dict[str, Any] = {}
    weight("w", out, cols, "nf4", tensors)
    weight("v", out, cols, "nf4", tensors, seed=2)
    ops = [Linear("y", "x", "w", None, "w"), Linear("z", "x", "v", None, "v"), Add("z", "y", "z")]
    model = probe(ops, "z", {"x": cols, "y": out, "z": out}, tensors)
    u = from_float32(random(1, out, rank, scale=rank**-0.5), "bf16")
    vs = {
        name: from_float32(random(i, rank, cols, scale=cols**-0.5), dtype) for i, name in enumerate("wv", 2)
    }

    def vera(seed: int) -> LoweredAdapter:
        d, e = 1 + random(seed, rank), 1 + random(seed + 1, out)
        return {name: Lowered((LowRank(u, v, 0.8, d, e),)) for name, v in vs.items()}

    adapters = [vera(2 * i) for i in range(3)]
    for tokens in (2, 13):  # of each of ten runs
        runs = [Run([i % VOCABULARY] * tokens, stack=(i % 4,) if i % 4 < 3 else ()) for i in range(10)]
        compare_stacks(model, adapters, runs, TOLERANCE)


@needs_gpu
@pytest.mark.parametrize(
    ("rank", "out", "tokens"), [(256, 1088, 100), (30, 192, 40), (300, 192, 30), (64, 6400, 10)]
)
@pytest.mark.parametrize("kept", [False, True])
def test_gates_of_factors_in_common(kept: bool, rank: int, out: int, tokens: int) -> None:
    """A gate whose inputs nobody else wants, or somebody does, where U and V are in common, one U or two."""
    tensors: dict[str, Any] = {}
    for name in ("w", "v"):
        weight(name, out, IN, "nf4", tensors)
    ops: list[Op] = [Linear("gate", "x", "w", None, "w"), Linear("up", "x", "v", None, "v")]
    ops += [Gated("gate", "gate", "up", "silu"), *[Add("gate", "gate", "up")] * kept]
    model = probe(ops, "gate", {"x": IN, "gate": out, "up": out}, tensors)
    v = from_float32(random(2, rank, IN, scale=IN**-0.5), "bf16")
    us = [from_float32(random(i, out, rank, scale=rank**-0.5), "bf16") for i in (1, 3)]

    def vera(seed: int, u: Tensor) -> Lowered:
        return Lowered((LowRank(u, v, 0.8, 1 + random(seed, rank), 1 + random(seed + 1, out)),))

    adapters: list[LoweredAdapter]
    for second in us[: 2 - kept]:
        adapters = [{"w": vera(4 * i, us[0]), "v": vera(4 * i + 2, second)} for i in range(9)]
        runs = [Run([i % VOCABULARY], stack=(i % 10,) if i % 10 < 9 else ()) for i in range(tokens)]
        compare_stacks(model, adapters, runs, 2 * TOLERANCE)


EMBEDDED = {
    "low rank": Lowered((LowRank(from_float32(random(1, 20, 3), "f32"), from_float32(random(2, 3, VOCABULARY), "f32"),
                                 0.5, random(3, 3), random(4, 20)),)),
    "dense": Lowered((LowRank(None, from_float32(random(2, 20, VOCABULARY), "bf16"), 0.5),)),
    "sparse": Lowered((sparse(VOCABULARY, 20, 3),)),
    "vectors": Lowered(g_in=random(4, VOCABULARY), g_out=random(5, 20), c=random(6, 20)),
}  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("name", EMBEDDED)
def test_embedding(name: str) -> None:
    runs = [Run([3, 8], stack=(0,)), Run([3], stack=()), Run([5], stack=(0, 0))]
    compare_stacks(probe([], "x", {"x": 20}, {}), [{"embed_x": EMBEDDED[name]}], runs, TOLERANCE)


@needs_gpu
def test_norm_gain() -> None:
    tensors = {"w": from_float32(random(3, 77), "f32")}
    model = probe([Norm("x", "x", "w", 1e-3, "norm")], "x", {"x": 77}, tensors)
    runs = [Run([3, 8], stack=(0,)), Run([3], stack=()), Run([5], stack=(0, 0))]
    compare_stacks(model, [{"norm": Lowered(g_out=random(1, 77))}], runs, 2 * TOLERANCE)
