"""The CUDA backend against the numpy reference: every operation, dtype, kind of adapter term and size of batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptrt.adapters.normal import Kronecker, Lowered, LoweredAdapter, LowRank, Sparse
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cuda import CudaBackend
from adaptrt.backends.native import ProgramStructs, native_module, open_table
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.bench.shapes import random_tensor
from adaptrt.errors import BackendError
from adaptrt.model.architecture import TensorSpec
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Logits, Norm, Rope
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.testing import programs
from adaptrt.testing.programs import (
    OPERATIONS,
    VOCABULARY,
    Model,
    Pages,
    Run,
    Sizes,
    adapter,
    batch,
    decoder,
    model,
    probe,
    random,
    relative_error,
    run_tokens,
    weight,
)

UNAVAILABLE = CudaBackend().unavailable()
needs_gpu = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"needs a GPU: {UNAVAILABLE}")
OPTIONS = LoadOptions(page_tokens=4)
TOLERANCE = 5e-3  # of one operation: its operands are rounded to bfloat16
DTYPES = ("f32", "f16", "bf16", "int8", "nf4")


def load(model: Model, **options: Any) -> Any:
    return CudaBackend().load(model.program, model.tensors, replace(OPTIONS, **options))


def reference(model: Model, **options: Any) -> Any:
    return ReferenceBackend().load(model.program, model.tensors, replace(OPTIONS, **options))


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """All values together within the tolerance, and no token far from it. Values are of size 1; one may be near 0."""
    size = max(float(np.linalg.norm(expected)), max(expected.size, 16) ** 0.5)
    assert np.linalg.norm(found - expected) < tolerance * size
    assert relative_error(found, expected, size=1.0) < 4 * tolerance


def compare(model: Model, n_tokens: int, tolerance: float = TOLERANCE, **options: Any) -> None:
    tokens = np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens).tolist()
    page_tokens = options.get("page_tokens", OPTIONS.page_tokens)
    found = run_tokens(load(model, **options), tokens, page_tokens)
    expected = run_tokens(reference(model, **options), tokens, page_tokens)
    assert_close(found, expected, tolerance)


def linear_model(rows: int, cols: int, dtype: str, bias: bool = False) -> Model:
    """The identity at the end rounds once more, so the error is that of two products."""
    tensors = {}
    weight("w", rows, cols, dtype, tensors, seed=rows)
    if bias:
        tensors["b"] = from_float32(random(9, rows), "bf16")
    linear = Linear("out", "x", "w", "b" if bias else None, "w")
    return probe([linear], "out", {"x": cols, "out": rows}, tensors)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 31, 64, 65, 192, 256, 1088])
def test_linear(dtype: str, cols: int) -> None:
    for rows in (1, 16, 65):  # few outputs: what is off by chance is not averaged
        model = linear_model(rows, cols, dtype, bias=rows == 16)
        executable, expected = load(model), reference(model)
        for n_tokens in (1, 2, 7, 8, 9, 17, 64, 65):
            tokens = np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens).tolist()
            found = run_tokens(executable, tokens, OPTIONS.page_tokens)
            wanted = run_tokens(expected, tokens, OPTIONS.page_tokens)
            assert_close(found, wanted)


@needs_gpu
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_linear_of_many_tokens(dtype: str) -> None:
    for rows, cols, n_tokens in ((272, 512, 300), (128, 320, 2100), (1024, 1024, 512)):
        compare(linear_model(rows, cols, dtype), n_tokens, page_tokens=64)


PRODUCTS = [  # of an 8B model, and of sizes that fill no tile
    *((rows, cols, "nf4") for rows, cols in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
    *((rows, cols, dtype) for rows, cols in ((257, 14336), (131, 1000), (257, 4104)) for dtype in DTYPES[2:]),
    (8192, 4096, "int8"),
    (34001, 256, "nf4"),  # more rows than all warps take at once
]


@needs_gpu
@pytest.mark.parametrize(("rows", "cols", "dtype"), PRODUCTS)
def test_products_of_real_sizes(rows: int, cols: int, dtype: str) -> None:
    """The head alone, for every number of tokens at which another kernel or another way to share the work begins."""
    role = {"int8": "embedding", "nf4": "linear"}.get(dtype)
    if role:  # bits that need no quantizing
        w = random_tensor(TensorSpec("w", "w", (rows, cols), role), np.random.default_rng(1))
    else:
        w = from_float32(random(1, rows, cols, scale=cols**-0.5), dtype)
    table = from_float32(random(2, 67, cols), "bf16")
    expected = to_float32(table) @ to_float32(w).T
    ops = (Embed("x", "table", "embed"), Logits("x", "w", None, "head"))
    executable = load(programs.model(ops, {"x": cols}, {"table": table, "w": w}), page_tokens=64)
    for n_tokens in (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 40, 64, 65, 100, 113, 128, 200, 300, 512, 1100, 2048):
        tokens = np.random.default_rng(n_tokens).integers(0, 67, n_tokens)
        assert_close(run_tokens(executable, tokens.tolist(), 64), expected[tokens])
    executable.close()


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "int8", "nf4"])
def test_linear_of_few_long_tokens(dtype: str) -> None:
    """So long that several blocks share the columns of a tile."""
    model = linear_model(72, 14400, dtype)
    executable, expected = load(model), reference(model)
    for n_tokens in (1, 5, 7, 12, 16):
        tokens = np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens).tolist()
        found = run_tokens(executable, tokens, OPTIONS.page_tokens)
        assert_close(found, run_tokens(expected, tokens, OPTIONS.page_tokens))


CASES = OPERATIONS | {  # and what this backend fuses
    "wide norm": ([Norm("x", "x", "w", 1e-3)], "x", {"x": 9001}, ("w", 1, 9001)),
    "sum and norm": ([Add("y", "x", "y"), Norm("z", "y", "w", 1e-3), Add("x", "y", "z")], "x",
                     {"x": 77, "y": 77, "z": 77}, ("w", 1, 77)),
    "wide sum and norm": ([Add("y", "x", "y"), Norm("x", "y", "w", 1e-3)], "x", {"x": 9001, "y": 9001},
                          ("w", 1, 9001)),
    "linears together": (
        [Linear("y", "x", "w", None, "w"), Linear("z", "x", "w", None, "v"), Gated("x", "y", "z", "silu")], "x",
        {"x": 64, "y": 64, "z": 64}, ("w", 64, 64)
    ),
    "rope alone": ([Rope("x", 2, 16, "inv", 1.5), Rope("x", 2, 16, "inv")], "x", {"x": 32}, None),
}  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_operation(name: str) -> None:
    ops, out, widths, tensor = CASES[name]
    tensors = {}
    if tensor:
        weight(*tensor, "bf16", tensors)
        if tensor[1] == 1:
            tensors["w"] = from_float32(random(3, tensor[2]), "f32")
    constants = {"inv": (0.5 ** np.arange(8)).astype(np.float32)}
    for n_tokens in (1, 9):
        compare(probe(list(ops), out, widths, tensors, constants), n_tokens)


@needs_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 2), (6, 2, 20), (4, 4, 64), (8, 1, 80), (8, 2, 128), (40, 2, 32), (2, 1, 256)],
)
@pytest.mark.parametrize("page_tokens", [1, 4, 8, 32])
def test_attention(heads: int, kv_heads: int, head_dim: int, page_tokens: int) -> None:
    kv = kv_heads * head_dim
    widths = {"x": heads * head_dim, "y": kv, "z": kv, "out": heads * head_dim}
    inv = (0.5 ** np.arange(head_dim // 2)).astype(np.float32)
    for cap in (0.0, 1.5):
        ops = [Rope("x", heads, head_dim, "inv", 1.25), Rope("y", kv_heads, head_dim, "inv", 0.5)]
        ops.append(Attention("out", "x", "y", "z", 0, heads, kv_heads, head_dim, head_dim**-0.5, cap))
        model = probe(ops, "out", widths, {}, {"inv": inv})
        for n_tokens in (1, 4, 21, 150):
            compare(model, n_tokens, page_tokens=page_tokens)


@needs_gpu
def test_attention_over_a_long_context_joins_its_splits() -> None:
    widths = {"x": 128, "y": 32, "z": 32, "out": 128}
    model = probe([Attention("out", "x", "y", "z", 0, 4, 1, 32, 0.2)], "out", widths, {})
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 3001).tolist()
    results = []
    for executable in (load(model, page_tokens=32), reference(model, page_tokens=32)):
        pages = list(range(94))[::-1]
        executable.reserve(94)
        executable.step(batch([Run(tokens[:-1], 0, pages, wanted=[])]))
        results.append(executable.step(batch([Run(tokens[-1:], 3000, pages)])))
    assert_close(*results)


def plain(
    rank: int, out: int, inner: int, seed: int, u: str = "bf16", v: str = "bf16", **fields: Any
) -> LowRank:
    """A low-rank term with U in dtype `u`, stored transposed when that is quantized."""
    values = random(seed, out, rank, scale=rank**-0.5)
    stored = values.T if u in ("int8", "nf4") else values
    return LowRank(
        from_float32(stored, u),
        from_float32(random(seed + 1, rank, inner, scale=inner**-0.5), v),
        0.8,
        **fields,
    )


def sparse(rows: int, cols: int, seed: int) -> Sparse:
    chosen = np.random.default_rng(seed).random((rows, cols)) < 0.2
    starts = np.concatenate([[0], np.cumsum(chosen.sum(1))]).astype(np.int32)
    columns = np.nonzero(chosen)[1].astype(np.int32)
    return Sparse(starts, columns, random(seed, len(columns)), 0.6)


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
    weight("w", 128, cols, "nf4", tensors)
    weight("v", 128, cols, "nf4", tensors, seed=2)
    ops = [Linear("y", "x", "w", None, "w"), Linear("z", "x", "v", None, "v"), Add("z", "y", "z")]
    model = probe(ops, "z", {"x": cols, "y": 128, "z": 128}, tensors)
    first = plain(16, 128, cols, 1, dtype, dtype)
    adapters: list[LoweredAdapter] = [
        {"w": Lowered((first,)), "v": Lowered((replace(first, d=random(5, 16), e=random(6, 128)),))},
        {"v": Lowered((plain(33, 128, cols, 7, dtype, dtype),), g_out=random(8, 128))},
        {"w": Lowered((plain(1, 128, cols, 9, dtype, dtype),)), "v": Lowered(g_out=random(10, 128))},
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
    ):
        compare_stacks(wide, adapters, runs, TOLERANCE)


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
        one_kind = [{"w": Lowered((plain(1 + i, out, IN, i),))} for i in range(20)]
        compare_stacks(linear_model(out, IN, "nf4"), one_kind, runs[:20], TOLERANCE)
    runs = [Run([i % VOCABULARY] * (1 + i % 3), stack=(0,) * (i % 3)) for i in range(50)]
    compare_stacks(adapted_model(), adapters, runs, TOLERANCE)


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


SIZES = {
    "even": Sizes(),
    "odd": Sizes(width=75, heads=3, kv_heads=1, head_dim=10, mlp=43, vocabulary=37),
    "wide": Sizes(width=256, heads=4, kv_heads=4, head_dim=64, mlp=384, vocabulary=300, layers=1),
}


@needs_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 8, 64), (8, 1, 64), (6, 2, 128), (2, 1, 128)]
)
def test_decoding_by_one_token(heads: int, kv_heads: int, head_dim: int) -> None:
    """From no context on, past the tiles of one pass over it, alone and with others of the same beginning."""
    model = decoder(Sizes(heads=heads, kv_heads=kv_heads, head_dim=head_dim))
    pages = [3, 1, 6, 0, 2, 4]
    runs = [[Run([3 * i], i, pages)] for i in range(5)]
    for start, end in ((5, 31), (35, 127), (131, 160)):
        runs.append([Run([5 * i % 37 for i in range(start, end)], start, pages)])
        runs += [[Run([3 * i % 37], i, pages)] for i in range(end, end + 4)]
    others = [Run([5, 9, 2], 128, [*pages[:4], 7]), Run([4, 8], 160, [*pages[:5], 8]), Run([8], 0, [9])]
    runs.append(others)
    runs += [[Run([i], o.start + len(o.tokens) + i, o.pages) for o in others] for i in range(3)]
    results = []
    for executable in (reference(model, page_tokens=32), load(model, page_tokens=32)):
        executable.reserve(16)
        results.append(np.concatenate([executable.step(batch(step)) for step in runs]))
        executable.close()
    assert np.linalg.norm(results[1] - results[0]) < 2e-2 * np.linalg.norm(results[0])
    assert relative_error(results[1], results[0]) < 5e-2


@needs_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "nf4"])
def test_decoder_with_ragged_stacks(size: str, dtype: str) -> None:
    """Prefill, then decode three times (the last as a graph), of five sequences with different stacks in one batch."""
    model = decoder(SIZES[size], dtype)
    adapters = [
        adapter(model, 1, "f32", rank=5),
        adapter(model, 2, "bf16", rank=16, skip=("embed", "0.q", "head")),
        adapter(model, 3, "f16", rank=1),
    ]
    stacks = [(), (0,), (1, 0, 2), (1,), (1,)]
    lengths = [1, 6, 3, 9, 2]
    results = []
    for executable in (reference(model), load(model)):
        handles = [executable.attach(a) for a in adapters]
        pages = Pages(OPTIONS.page_tokens, 64)
        executable.reserve(64)
        taken = [pages.take(length + 4) for length in lengths]
        runs = [
            Run([(7 * i + j) % 37 for j in range(length)], 0, taken[i], [handles[s] for s in stacks[i]])
            for i, length in enumerate(lengths)
        ]
        runs[3].wanted = [0, 8, 8, 3]
        logits = [executable.step(batch(runs))]
        for more in range(4):
            decoded = [
                Run([i + more], length + more, taken[i], runs[i].stack) for i, length in enumerate(lengths)
            ]
            logits.append(executable.step(batch(decoded)))
        results.append(np.concatenate(logits))
        executable.close()
    assert np.linalg.norm(results[1] - results[0]) < 2e-2 * np.linalg.norm(results[0])
    assert relative_error(results[1], results[0]) < 5e-2


@needs_gpu
@pytest.mark.parametrize(("page_tokens", "head_dim"), [(4, 32), (32, 64)])
def test_runs_that_share_pages_see_each_other(page_tokens: int, head_dim: int) -> None:
    """Decoding, and one sequence's next tokens as runs of their own: then all are stored before any attends."""
    model = decoder(Sizes(head_dim=head_dim))
    results = []
    for executable in (reference(model, page_tokens=page_tokens), load(model, page_tokens=page_tokens)):
        executable.reserve(8)
        logits = [executable.step(batch([Run([5, 9, 2], 0, [0, 1]), Run([7, 1, 3], 0, [2, 3])]))]
        for _ in range(3):
            logits.append(
                executable.step(batch([Run([4], 3, [0, 1]), Run([6], 4, [0, 1]), Run([8], 3, [2, 3])]))
            )
            logits.append(executable.step(batch([Run([9], 5, [0, 1]), Run([3], 4, [2, 3])])))
        results.append(np.concatenate(logits))
    assert relative_error(results[1], results[0]) < 3e-2


@needs_gpu
def test_steps_of_changing_shapes_and_adapters_stay_right() -> None:
    """Graphs are made for shapes that repeat: none may outlive what it was made of."""
    model = decoder()
    first, second = adapter(model, 1, "bf16", rank=4), adapter(model, 2, "bf16", rank=4)
    ours, theirs = load(model), reference(model)
    for executable in (ours, theirs):
        executable.reserve(8)

    def agree(*runs: Run) -> None:
        for _ in range(3):
            found, expected = (executable.step(batch(runs)) for executable in (ours, theirs))
            assert relative_error(found, expected) < 3e-2

    agree(Run([1], 0, [0]))
    agree(Run([1], 0, [0]), Run([2], 0, [1]))
    handle = ours.attach(first)
    assert theirs.attach(first) == handle
    agree(Run([1], 0, [0], [handle]))
    for executable in (ours, theirs):
        executable.attach(second)
    agree(Run([1], 0, [0], [handle + 1]))
    for executable in (ours, theirs):
        executable.detach(handle)
        executable.reserve(300)
    agree(Run([4], 0, [299], [handle + 1]))
    agree(Run(list(range(40)), 0, list(range(20, 30)), [handle + 1]))
    agree(Run([1], 0, [0]))


@needs_gpu
def test_no_logits_and_logits_in_any_order() -> None:
    executable = load(decoder())
    executable.reserve(8)
    runs = [Run([5, 9, 2, 30], 0, [0]), Run([8, 8], 0, [5])]
    every = executable.step(batch(runs))
    rows = np.array([5, 0, 4, 4, 3], np.int32)
    np.testing.assert_array_equal(executable.step(replace(batch(runs), logit_rows=rows)), every[rows])
    assert executable.step(replace(batch(runs), logit_rows=rows[:0])).shape == (0, every.shape[1])


@needs_gpu
def test_shared_tensors_survive_the_detaching_of_one_adapter() -> None:
    model = decoder()
    executable = load(model)
    shared = adapter(model, 4)
    first, second = executable.attach(shared), executable.attach(dict(shared))
    expected = run_tokens(executable, [3, 1], 4, [second])
    executable.detach(first)
    np.testing.assert_array_equal(run_tokens(executable, [3, 1], 4, [second]), expected)


@needs_gpu
def test_what_is_not_offered_is_refused_in_one_line() -> None:
    model = linear_model(3, 8, "f32")
    for options, message in (
        ({"precision": "exact"}, "precision exact"),
        ({"kv_dtype": "f32"}, "KV in f32"),
        ({"device": "99"}, "device 99"),
    ):
        with pytest.raises(BackendError, match=message) as caught:
            load(model, **options)
        assert "\n" not in str(caught.value)


@needs_gpu
def test_peaks_leave_the_executable_as_it_was() -> None:
    executable = load(decoder())
    before = run_tokens(executable, [1, 2, 3], 4)
    peaks = executable.peaks()
    assert peaks.bytes_per_second > 1e10 and peaks.device_bytes > 1e6
    assert peaks.operations_per_second == 0 or peaks.operations_per_second > 1e12  # without cuBLAS not known
    np.testing.assert_array_equal(run_tokens(executable, [1, 2, 3], 4), before)


@needs_gpu
def test_memory_that_is_not_there_is_refused_and_the_rest_stays() -> None:
    model = decoder()
    executable = load(model, page_tokens=65536)
    before = run_tokens(executable, [1, 2, 3], 65536)
    with pytest.raises(BackendError, match=r"KV pages: \d+ bytes do not fit"):
        executable.reserve(10_000)
    np.testing.assert_array_equal(run_tokens(executable, [1, 2, 3], 65536), before)


@needs_gpu
def test_hostile_programs_batches_and_adapters_are_refused() -> None:
    """The checks are those of native/common, tested with the CPU backend; here that they are made."""
    model, backend = decoder(), CudaBackend()
    calls = backend._calls()
    loaded = ProgramStructs(calls, model.program, model.tensors)
    loaded.program.ops[2].out = 1000
    options = calls.ffi.new("adrt_options *", {"threads": 1, "precision": 1, "kv_dtype": 1, "page_tokens": 4})
    out = calls.ffi.new("adrt_executable **")
    with pytest.raises(BackendError, match="register 1000"):
        calls("load", loaded.program, options, out)
    assert out[0] == calls.ffi.NULL
    executable = load(model)
    executable.reserve(2)
    for run, message in (
        (Run([101], 0, [0]), "token 0 is 101"),
        (Run([1], 0, [2]), "KV page 2 is not reserved"),
        (Run([1], 0, [0], [7]), "no adapter with handle 7"),
    ):
        with pytest.raises(BackendError, match=message):
            executable.step(batch([run]))
    for lowered, message in (
        (Lowered((plain(4, 63, 128, 1),)), "do not fit"),
        (Lowered((plain(4, 64, 128, 1, "int8"), plain(4, 64, 127, 1))), "do not fit"),
        (Lowered(rotation=random(1, 2, 64, 64)[:1]), "rotation"),
        (Lowered((replace(sparse(64, 128, 1), columns=sparse(64, 128, 1).columns[::-1]),)), "column"),
    ):
        with pytest.raises(BackendError, match=message):
            executable.attach({"0.k": lowered})
    with pytest.raises(BackendError, match="no adapter with handle 3"):
        executable.detach(3)


def test_a_library_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    module = native_module("cuda")
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"no library")
    for path in (broken, Path(module.__file__)):  # the second one is sound, but has no such symbol
        with pytest.raises(BackendError, match=r"backend cuda: .* cannot be loaded") as caught:
            open_table(module, path, "adrt_cuda_backend", "cuda")
        assert "\n" not in str(caught.value)


def test_a_device_that_is_no_number_is_refused() -> None:
    with pytest.raises(BackendError, match="device 'x', expected the number of a GPU"):
        load(linear_model(3, 8, "f32"), device="x")


def test_the_reason_why_there_is_no_gpu_is_one_line() -> None:
    assert UNAVAILABLE is None or (UNAVAILABLE and "\n" not in UNAVAILABLE and "backend" not in UNAVAILABLE)
