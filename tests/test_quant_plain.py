"""Conversions between float32 and every dtype, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.tensor import Tensor

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def patterns() -> np.ndarray:
    """Float32 values of all kinds: every upper half with several lower halves, ties among them."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).reshape(-1).view(np.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_equals_torch(dtype):
    x = patterns()
    theirs = torch.from_numpy(x).to(FLOATS[dtype])
    kept = ~(torch.isinf(theirs).numpy() & np.isfinite(x))
    ours = from_float32(x[kept].reshape(2, -1), dtype)
    stored = torch.from_numpy(ours.data.copy()).view(FLOATS[dtype])
    theirs = theirs[torch.from_numpy(kept)]
    assert ours.shape == (2, stored.numel() // 2)
    nan = torch.isnan(theirs)
    assert torch.equal(torch.isnan(stored), nan)
    assert torch.equal(stored[~nan], theirs[~nan])
    assert torch.equal(torch.signbit(stored), torch.signbit(torch.from_numpy(x[kept])))


def test_bf16_nan_is_quiet():
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert from_float32(signalling, "bf16").data.view(np.uint16).tolist() == [0x7FC0, 0xFFC0, 0x7FFF]


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("f16", -1e6), ("bf16", 3.4e38)])
def test_a_value_out_of_range_is_named(dtype, value):
    x = np.float32([[1, 2, 3], [4, value, np.inf]])
    with pytest.raises(ValueError, match=f"at flat index 4 is beyond the range of {dtype}"):
        from_float32(x, dtype)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_widening_equals_torch(dtype):
    stored = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    tensor = Tensor(dtype, (256, 256), stored.numpy().view(np.uint8))
    wide = stored.view(FLOATS[dtype]).float().reshape(256, 256).numpy()
    assert np.array_equal(to_float32(tensor), wide, equal_nan=True)


def test_f32_is_not_copied():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = from_float32(x, "f32")
    assert np.shares_memory(tensor.data, x)
    assert np.shares_memory(to_float32(tensor), x)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 70), (2, 3, 64), (0, 8)], ids=str)
def test_every_dtype_keeps_the_shape_and_nearly_the_values(dtype, shape):
    x = np.random.default_rng(len(shape)).uniform(-1, 1, shape).astype(np.float32)
    back = to_float32(from_float32(x, dtype))
    assert back.shape == shape
    assert back.dtype == np.float32
    step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "int8": 1 / 250, "nf4": 0.16}[dtype]
    assert np.all(np.abs(back - x) <= step)


@pytest.mark.parametrize("order", [np.transpose, lambda x: x[::-1, ::2]], ids=["transposed", "strided"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "nf4", "int8"])
def test_views_are_taken_in_row_major_order(dtype, order):
    x = order(np.random.default_rng(0).standard_normal((40, 66)).astype(np.float32))
    assert np.array_equal(from_float32(x, dtype).data, from_float32(x.copy(order="C"), dtype).data)


def test_integer_dtypes_hold_no_weights():
    with pytest.raises(ValueError, match="i32"):
        to_float32(Tensor.from_numpy(np.arange(3, dtype=np.int32)))
    with pytest.raises(ValueError, match="u8"):
        from_float32(np.zeros(3, np.float32), "u8")
