"""The CPU backend against the numpy reference: every operation, dtype, instruction set and precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.isas import BYTE_ISAS, FLOAT_ISAS, INTEGER_ISAS, ISAS, load_on_cpu

from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import Lowered
from adaptrt.backends.base import LoadOptions, Peaks, Reads
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.errors import BackendError
from adaptrt.program import Attention, Gated, Linear, Rope
from adaptrt.quant.plain import from_float32
from adaptrt.testing.programs import (
    DTYPES,
    OPERATIONS,
    VOCABULARY,
    Model,
    Pages,
    Run,
    Sizes,
    adapter,
    batch,
    decoder,
    linear_model,
    low_rank,
    operation_model,
    probe,
    random,
    relative_error,
    run_tokens,
    weight,
)

EXACT = 2e-6  # float32 sums of a few hundred products in another order
FAST = {"nf4": 5e-4, "int8": 5e-4}  # 13-bit activations; the other dtypes have no fast kernel
BYTES = 1e-2  # what a gated activation reads: bytes times bytes
TOKEN_COUNTS = (*range(1, 18), 25, 64, 100, 131)
OPTIONS = LoadOptions(threads=2, precision="exact", page_tokens=4, kv_dtype="f32")


def load(model: Model, **options: Any) -> Any:
    return load_on_cpu(model, OPTIONS, **options)


def reference(model: Model, **options: Any) -> Any:
    return ReferenceBackend().load(model.program, model.tensors, replace(OPTIONS, **options))


def compare(model: Model, tolerance: float, counts: Sequence[int] = (7,), **options: Any) -> None:
    """Sequences of so many tokens, each in a step of its own, against the first tokens of the reference's longest."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, max(counts)).tolist()
    page_tokens = options.get("page_tokens", OPTIONS.page_tokens)
    executable = load(model, **options)
    expected = run_tokens(reference(model, **options), tokens, page_tokens)
    for n in counts:
        found = run_tokens(executable, tokens[:n], page_tokens)
        assert relative_error(found, expected[:n], size=1.0) < tolerance


@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 31, 64, 65, 128, 172, 256, 512])
def test_linear(isa: str, dtype: str, cols: int) -> None:
    for rows in (1, 3, 65):
        model = linear_model(rows, cols, dtype, bias=rows == 3)
        for precision, tolerance in (("exact", EXACT), ("fast", FAST.get(dtype, EXACT))):
            compare(model, tolerance, (1, 2, 5, 17), isa=isa, precision=precision)


@pytest.mark.parametrize("isa", INTEGER_ISAS)
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("rows", [16, 31, 48, 65])
def test_integer_products_of_any_number_of_tokens(isa: str, rows: int, dtype: str) -> None:
    """Every size of tile, rows that end inside a panel, and columns that end inside a chunk of the kernel."""
    for cols in (64, 320, 1088):
        model = linear_model(rows, cols, dtype)
        compare(model, FAST[dtype], TOKEN_COUNTS, isa=isa, precision="fast")


@pytest.mark.parametrize("isa", BYTE_ISAS)
@pytest.mark.parametrize("rows", [16, 31, 48, 65])
def test_products_of_bytes(isa: str, rows: int) -> None:
    """nf4 weights whose product a gated activation reads: every size of tile, odd rows, chunks cut short."""
    widths = {"x": 0, "y": rows, "z": rows}
    for cols in (64, 320, 1088):
        tensors: dict[str, Any] = {}
        weight("w", rows, cols, "nf4", tensors, seed=rows)
        ops = [Linear("y", "x", "w", None, "w"), Gated("y", "z", "y", "silu")]
        model = probe(ops, "y", widths | {"x": cols}, tensors)
        compare(model, BYTES, TOKEN_COUNTS, isa=isa, precision="fast")
        with pytest.raises(AssertionError):  # and it is bytes that were multiplied
            compare(model, FAST["nf4"], (17,), isa=isa, precision="fast")


@pytest.mark.parametrize("isa", ISAS)
def test_long_rows_and_offsets(isa: str) -> None:
    """More blocks in a row than one expansion of scales holds, and more than one nested group."""
    for cols in (64 * 300, 64 * 301 + 2):
        for dtype in ("int8", "nf4"):
            compare(linear_model(5, cols, dtype), 1e-5, (3,), isa=isa)
            compare(linear_model(17, cols, dtype), FAST[dtype], (1, 9), isa=isa, precision="fast")


@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(isa: str, name: str) -> None:
    compare(operation_model(name), EXACT, (1, 9), isa=isa)


@pytest.mark.parametrize("isa", FLOAT_ISAS)
def test_gates_at_extreme_values(isa: str) -> None:
    values = np.array(
        [0, -0.0, 1e-30, 1e-3, 5, 30, 88, 89, 1e4, 3e38, -1e-3, -5, -30, -88, -89, -1e4], np.float32
    )
    for activation in ("silu", "gelu_tanh"):
        model = probe([Gated("x", "x", "y", activation)], "x", {"x": 16, "y": 16}, {})
        model.tensors["table_x"] = from_float32(np.tile(values, (VOCABULARY, 1)), "f32")
        model.tensors["table_y"] = from_float32(np.ones((VOCABULARY, 16), np.float32), "f32")
        found = run_tokens(load(model, isa=isa), [3], 4)[0]
        x = values.astype(np.float64)
        if activation == "silu":
            expected = x / (1 + np.exp(np.minimum(-x, 700)))
        else:
            inner = np.sqrt(2 / np.pi) * (x + 0.044715 * np.clip(x, -1e3, 1e3) ** 3)
            expected = 0.5 * x * (1 + np.tanh(inner))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 20), (4, 4, 64), (8, 1, 80)])
def test_attention(isa: str, kv_dtype: str, heads: int, kv_heads: int, head_dim: int) -> None:
    widths = {
        "x": heads * head_dim,
        "y": kv_heads * head_dim,
        "z": kv_heads * head_dim,
        "out": heads * head_dim,
    }
    inv = (0.5 ** np.arange(head_dim // 2)).astype(np.float32)
    for cap in (0.0, 1.5):
        ops = [Rope("x", heads, head_dim, "inv", 1.25), Rope("y", kv_heads, head_dim, "inv", 0.5)]
        ops.append(Attention("out", "x", "y", "z", 0, heads, kv_heads, head_dim, head_dim**-0.5, cap))
        model = probe(ops, "out", widths, {}, {"inv": inv})
        for page_tokens, counts in ((4, (1, 4, 21)), (1, (21,)), (32, (75,))):
            tolerance = 1e-5 if kv_dtype == "f32" else 1e-3
            compare(model, tolerance, counts, isa=isa, kv_dtype=kv_dtype, page_tokens=page_tokens)


def test_rope_at_far_positions_is_as_exact_as_float32_angles_allow() -> None:
    inv = np.array([1.0, 0.3], np.float32)
    model = probe([Rope("x", 1, 4, "inv")], "x", {"x": 4}, {}, {"inv": inv})
    executable = load(model, page_tokens=65536)
    executable.reserve(4)
    position = 131071
    found = executable.step(batch([Run([2], position, [0, 1])]))[0]
    x = random(0, VOCABULARY, 4)[2].astype(np.float64)
    angle = (np.float32(position) * inv).astype(np.float64)
    rotated = [x[:2] * np.cos(angle) - x[2:] * np.sin(angle), x[2:] * np.cos(angle) + x[:2] * np.sin(angle)]
    np.testing.assert_allclose(found, np.concatenate(rotated), rtol=0, atol=3e-7)


SIZES = {
    "even": Sizes(),
    "odd": Sizes(width=75, heads=3, kv_heads=1, head_dim=10, mlp=43, vocabulary=37),
    "wide": Sizes(width=256, heads=4, kv_heads=4, head_dim=64, mlp=384, vocabulary=300, layers=1),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "nf4"])
def test_decoder_with_ragged_stacks(isa: str, size: str, dtype: str) -> None:
    """Prefill, then decode, of five sequences with different stacks of adapters in one batch."""
    model = decoder(SIZES[size], dtype)
    adapters = [
        adapter(model, 1, "f32", rank=5),
        adapter(model, 2, "bf16", rank=16, skip=("embed", "0.q", "head")),
        adapter(model, 3, "f16", rank=1),
    ]
    stacks = [(), (0,), (1, 0, 2), (1,), (1,)]
    lengths = [1, 6, 3, 9, 2]
    results = {}
    for name, tolerance in (("reference", 0.0), ("exact", 2e-4), ("fast", 3e-2)):  # of the worst token
        executable = reference(model) if name == "reference" else load(model, isa=isa, precision=name)
        handles = [executable.attach(a) for a in adapters]
        pages = Pages(OPTIONS.page_tokens, 32)
        executable.reserve(32)
        taken = [pages.take(length + 1) for length in lengths]
        runs = [
            Run([(7 * i + j) % 37 for j in range(length)], 0, taken[i], [handles[s] for s in stacks[i]])
            for i, length in enumerate(lengths)
        ]
        runs[3].wanted = [0, 8, 8, 3]
        first = executable.step(batch(runs))
        more = [Run([i], length, taken[i], runs[i].stack) for i, length in enumerate(lengths)]
        results[name] = np.concatenate([first, executable.step(batch(more))])
        if tolerance:
            assert relative_error(results[name], results["reference"]) < tolerance
        executable.close()


def test_embedding_gain_follows_the_normal_form() -> None:
    """An embedding's x is one-hot, so g_in multiplies the picked row."""
    from adaptrt.adapters.normal import Lowered

    model = probe([], "x", {"x": 20}, {})
    executable = load(model)
    gain = random(4, VOCABULARY)
    handle = executable.attach({"embed_x": Lowered(g_in=gain)})
    plain, scaled = run_tokens(executable, [3, 8], 4), run_tokens(executable, [3, 8], 4, [handle])
    np.testing.assert_array_equal(scaled, plain * gain[[3, 8], None])


def test_two_executables_share_a_process_and_close_twice() -> None:
    models = [linear_model(9, 64, "nf4"), linear_model(5, 31, "f16")]
    executables = [load(m, threads=3) for m in models]
    for model, executable in zip(models * 2, executables * 2, strict=True):
        found, expected = run_tokens(executable, [1, 2], 4), run_tokens(reference(model), [1, 2], 4)
        assert relative_error(found, expected) < 1e-3
    for executable in executables:
        executable.close()
        executable.close()


def test_peaks_are_those_of_the_threads_and_may_be_unknown() -> None:
    executable = load(decoder())
    assert executable.peaks().bytes_per_second > 1e8 and executable.peaks().device_bytes == 0
    calls = executable._calls
    calls.table = calls.ffi.new("adrt_backend *", calls.table[0])
    calls.table.peaks = calls.ffi.NULL
    calls.table.read_step = calls.ffi.NULL
    assert executable.peaks() == Peaks() and executable.read_step([]) == Reads()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("rank", [4, 64])
def test_the_reads_of_a_step_with_what_targets_share(precision: str, rank: int) -> None:
    executable = load(decoder(), precision=precision)
    shared = low_rank(1, AttachPoint("linear", 128, 128), rank, "bf16", d=True, e=True)
    one = executable.attach({"0.q": Lowered((shared,))})
    assert executable.read_step([one]).shared_seconds == 0
    executable.detach(one)
    all_three = executable.attach({name: Lowered((shared,)) for name in ("0.q", "0.o", "1.q")})
    both = [all_three, executable.attach({"0.q": Lowered((shared,))})]
    for handles in ([all_three], both):
        reads = executable.read_step(handles)
        assert 0 < reads.shared_seconds < 1 and reads.bytes_per_second > 1e6
    assert executable.read_step([]).shared_seconds == 0
    for wrong in ([one], [-1], [9]):
        with pytest.raises(BackendError, match=f"no adapter with handle {wrong[0]}"):
            executable.read_step(wrong)


def test_describe_names_kernels_precision_and_threads() -> None:
    model = linear_model(1, 1, "f32")
    assert load(model, isa="portable", threads=1).describe() == "cpu: portable exact, 1 thread"
    assert (
        load(model, isa="portable", precision="fast", threads=3).describe() == "cpu: portable fast, 3 threads"
    )
