"""The CUDA backend against the numpy reference: every operation, dtype and number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cuda import OPTIONS, assert_close, compare, load, needs_gpu, reference

from adaptrt.bench.shapes import random_tensor
from adaptrt.model.architecture import TensorSpec
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Logits, Norm, Rope
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.testing import programs
from adaptrt.testing.programs import (
    DTYPES,
    OPERATIONS,
    VOCABULARY,
    Run,
    batch,
    linear_model,
    probe,
    random,
    run_tokens,
    weight,
)


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
    for rows, cols, n_tokens in ((272, 512, 300), (128, 320, 4100), (1024, 1024, 512)):
        compare(linear_model(rows, cols, dtype), n_tokens, page_tokens=64)


PRODUCTS = [  # of an 8B model, and of sizes that fill no tile
    *((rows, cols, "nf4") for rows, cols in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
    *((rows, cols, dtype) for rows, cols in ((257, 14336), (131, 1000), (257, 4104)) for dtype in DTYPES[2:]),
    (8192, 4096, "int8"),
    (131, 28672, "int8"),  # 16 tokens are too long for the shared memory of four blocks of threads
    (131, 28672, "nf4"),
    (34001, 256, "nf4"),  # more rows than all warps take at once
    (8470, 768, "int8"),  # so many that some are left over where 132 multiprocessors have the same number
    (8470, 768, "nf4"),
]
TOKENS = (1, 2, 3, 4, 7, 8, 9, 12, 16, 17, 32, 33, 64, 65, 112, 113, 128, 200, 300, 400, 512, 1100, 2048)


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
    for n_tokens in TOKENS:
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
