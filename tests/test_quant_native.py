"""The quantizers in C against numpy's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptrt.quant import int8, nf4
from adaptrt.quant.encode import Encoder
from adaptrt.quant.plain import from_float32
from adaptrt.quant.tables import DYNAMIC_MAP, NF4_CODEBOOK

pytest.importorskip("adaptrt.backends._native", reason="needs the native library", exc_type=ImportError)

from adaptrt.backends.native_quant import best_kernels, native_kernels

NATIVE = native_kernels()
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SPECIAL = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**127, *map(float, NF4_CODEBOOK)]
)
ELEMENTS = FINITE | SPECIAL


def weights(max_size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, st.integers(0, max_size), elements=ELEMENTS, fill=st.nothing()) | arrays(
        np.float32, st.integers(0, max_size), elements=ELEMENTS
    )


def same(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> bool:
    """Equal in dtype, shape and every bit."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(ours, theirs, strict=True)
    )


def around(values: np.ndarray) -> np.ndarray:
    """The values with their float32 neighbours on both sides."""
    return np.concatenate([values, *(np.nextafter(values, np.float32(to)) for to in (-np.inf, np.inf))])


def test_the_native_kernels_are_the_best():
    assert type(best_kernels().nf4_blocks) is type(NATIVE.nf4_blocks)


@settings(deadline=None, max_examples=300)
@given(weights(200))
def test_nf4_blocks(x):
    assert same(NATIVE.nf4_blocks(x), nf4.quantize_blocks(x))


@settings(deadline=None, max_examples=300)
@given(weights(600), FINITE.map(lambda v: np.float32(abs(v) / 2)))
def test_nf4_absmax(absmax, offset):
    absmax = np.abs(absmax) / 2  # so that no difference overflows
    assert same(NATIVE.nf4_absmax(absmax, offset), nf4.quantize_absmax(absmax, offset))


@settings(deadline=None, max_examples=300)
@given(weights(300), st.integers(1, 140))
def test_int8_rows(x, cols):
    x = x[: x.size // cols * cols].reshape(-1, cols)
    assert same(NATIVE.int8_rows(x), int8.quantize_rows(x))


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.7, 1e-30, 1e30, 1.1e-38, 1e-38, 1e-39, 1e-44, 3e38])
def test_nf4_boundaries_and_their_neighbours(scale):
    halfway = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / np.float32(2)
    x = around(around(np.concatenate([halfway, NF4_CODEBOOK[1:-1]])) * np.float32(scale))
    for others in (63, 62):  # whole blocks multiply by the inverse, partial ones divide
        for start in range(0, x.size, others):
            block = np.append(np.float32(scale), x[start : start + others])
            assert same(NATIVE.nf4_blocks(block), nf4.quantize_blocks(block))


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.7, 1e-30, 1e30, 1e-38, 1e-42])
def test_dynamic_map_boundaries_and_their_neighbours(scale):
    halfway = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
    x = around(around(halfway) * np.float32(scale))
    for start in range(0, x.size, 255):
        group = np.append(np.float32(scale), x[start : start + 255])
        assert same(NATIVE.nf4_absmax(group, np.float32(0)), nf4.quantize_absmax(group, np.float32(0)))


@pytest.mark.parametrize("absmax", [127.0, 1.0, 1e-30, 1e-38, 1e-40, 1e-43, 1e-45, 3.4e38])
def test_int8_halves_and_their_neighbours(absmax):
    scale = np.float32(absmax) / np.float32(127)
    x = np.append(
        around((np.arange(-126, 127) + np.float32(0.5)).astype(np.float32) * scale), np.float32(absmax)
    )
    x = np.clip(x, -np.float32(absmax), np.float32(absmax))
    assert same(NATIVE.int8_rows(x[None]), int8.quantize_rows(x[None]))


@pytest.mark.parametrize("size", [100_000, 1 << 20, (1 << 20) + 77])
def test_large_tensors(size):
    x = (np.random.default_rng(size).standard_t(3, size) * 0.02).astype(np.float32)
    codes, absmax = NATIVE.nf4_blocks(x)
    assert same((codes, absmax), nf4.quantize_blocks(x))
    offset = nf4.absmax_offset(absmax)
    assert same(NATIVE.nf4_absmax(absmax, offset), nf4.quantize_absmax(absmax, offset))
    matrix = x[: size // 100 * 100].reshape(-1, 100)
    assert same(NATIVE.int8_rows(matrix), int8.quantize_rows(matrix))


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(64, 64), (33, 65), (7,), (0, 5), (5, 0), (3, 200)], ids=str)
def test_encoder_with_native_kernels(dtype, shape):
    x = np.random.default_rng([3, *shape]).standard_normal(shape).astype(np.float32)
    encoder = Encoder(dtype, shape, NATIVE)
    written = [encoder.feed(chunk) for chunk in np.array_split(x.reshape(-1), 3)]
    joined = b"".join(map(bytes, [*written, encoder.finish()]))
    assert joined == from_float32(x, dtype).data.tobytes()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 63, 64, 130, 149])
def test_a_value_without_a_code_is_named(value, position):
    x = np.linspace(-1, 1, 150, dtype=np.float32)
    x[position] = value
    x[149] = np.nan if position < 149 else value  # only the first is named
    for quantize in (NATIVE.nf4_blocks, lambda x: NATIVE.int8_rows(x.reshape(3, 50))):
        with pytest.raises(ValueError, match=f"flat index {position} is {value}"):
            quantize(x)


def test_strided_and_read_only_input():
    x = np.random.default_rng(4).standard_normal((40, 130)).astype(np.float32)[:, ::2]
    assert same(NATIVE.int8_rows(x), int8.quantize_rows(x))
    flat = np.ascontiguousarray(x).reshape(-1)
    flat.flags.writeable = False
    assert same(NATIVE.nf4_blocks(flat), nf4.quantize_blocks(flat))
