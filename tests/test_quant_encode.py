"""The streaming encoder: whatever the chunks, the bytes of the whole."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptrt.backends.native_quant import best_kernels
from adaptrt.quant.encode import NUMPY, Encoder
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import DTYPES

WEIGHT_DTYPES = [dtype for dtype in DTYPES if dtype not in ("u8", "i32")]
SHAPES = [(), (1,), (64,), (65,), (300,), (3, 7), (5, 64), (4, 130), (2, 3, 65), (10, 0), (0, 9), (70, 300)]


def encode(x: np.ndarray, dtype: str, cuts: list[int]) -> bytes:
    encoder = Encoder(dtype, x.shape)
    flat = x.reshape(-1)
    edges = [0, *sorted(min(cut, flat.size) for cut in cuts), flat.size]
    written = [bytes(encoder.feed(flat[a:b])) for a, b in pairwise(edges)]
    return b"".join([*written, bytes(encoder.finish())])


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from(WEIGHT_DTYPES),
    shape=st.sampled_from(SHAPES),
    cuts=st.lists(st.integers(0, 21000) | st.integers(0, 400), max_size=12),
)
def test_chunks_make_the_bytes_of_the_whole(dtype, shape, cuts):
    x = np.random.default_rng([7, *shape]).standard_normal(shape).astype(np.float32)
    assert encode(x, dtype, cuts) == from_float32(x, dtype).data.tobytes()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_one_weight_at_a_time(dtype):
    x = np.random.default_rng(1).standard_normal((3, 67)).astype(np.float32)
    assert encode(x, dtype, list(range(x.size))) == from_float32(x, dtype).data.tobytes()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_chunk_may_be_reused_after_feed(dtype):
    x = np.random.default_rng(2).standard_normal((4, 50)).astype(np.float32)
    encoder, chunk, written = Encoder(dtype, x.shape), np.empty(10, np.float32), b""
    for start in range(0, x.size, 10):
        chunk[:] = x.reshape(-1)[start : start + 10]
        written += bytes(encoder.feed(chunk))
    assert written + bytes(encoder.finish()) == from_float32(x, dtype).data.tobytes()


@pytest.mark.parametrize("kernels", [NUMPY, best_kernels()], ids=["numpy", "best"])
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_memory_is_a_fraction_of_the_weights(dtype, kernels):
    shape, chunk = (1024, 4096), np.ones(1 << 16, np.float32)
    tracemalloc.start()
    try:
        encoder = Encoder(dtype, shape, kernels)
        for _ in range(prod(shape) // chunk.size):
            encoder.feed(chunk)
        encoder.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * prod(shape) / 3


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
@pytest.mark.parametrize("position", [0, 63, 64, 199, 200, 256, 399])
def test_a_value_without_a_code_is_named_by_its_place_in_the_whole(dtype, position):
    x = np.zeros((2, 200), np.float32)
    x.flat[position] = np.inf
    with pytest.raises(ValueError, match=f"flat index {position} is inf"):
        encode(x, dtype, [37, 101, 250])


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_too_many_and_too_few_weights_are_refused(dtype):
    encoder = Encoder(dtype, (2, 70))
    encoder.feed(np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="got 100 weights, expected 140"):
        encoder.finish()
    with pytest.raises(ValueError, match="got 141 weights, expected 140"):
        encoder.feed(np.zeros(41, np.float32))


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match="cannot store real numbers as i32"):
        Encoder("i32", (3,)).feed(np.zeros(3, np.float32))
