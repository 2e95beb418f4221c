"""Any floating dtype to float32 and back; integers as int64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptrt.quant import int8, nf4
from adaptrt.quant.bf16 import bf16_to_f32, f32_to_bf16
from adaptrt.tensor import PLAIN_ITEM_BYTES, Tensor

Floats = NDArray[np.float32]


def to_float32(tensor: Tensor) -> Floats:
    """A tensor's values as float32, of its shape; a view for f32. Raises ValueError for an integer dtype."""
    if tensor.dtype == "nf4":
        return nf4.dequantize(tensor)
    if tensor.dtype == "int8":
        return int8.dequantize(tensor)
    if tensor.dtype == "bf16":
        return bf16_to_f32(tensor.data.view(np.uint16)).reshape(tensor.shape)
    if tensor.dtype == "f16":
        return tensor.data.view(np.float16).reshape(tensor.shape).astype(np.float32)
    if tensor.dtype == "f32":
        return tensor.data.view(np.float32).reshape(tensor.shape)
    raise ValueError(f"dtype {tensor.dtype} holds no real numbers, expected f32, f16, bf16, nf4 or int8")


def rows_to_float32(tensor: Tensor, start: int, stop: int) -> Floats:
    """Rows start … stop - 1 of a matrix as float32, leaving the others alone."""
    rows, cols = stop - start, tensor.shape[1]
    if tensor.dtype == "nf4":
        return nf4.dequantize_range(tensor, start * cols, stop * cols).reshape(rows, cols)
    if tensor.dtype == "int8":
        part = int8.parts(tensor)
        return int8.dequantize_rows(part.codes[start:stop], part.scales[start:stop])
    item = PLAIN_ITEM_BYTES[tensor.dtype] * cols
    return to_float32(Tensor(tensor.dtype, (rows, cols), tensor.data[start * item : stop * item]))


def to_int64(tensor: Tensor) -> NDArray[np.int64]:
    """The values of an integer tensor, or of whole numbers as f32, of its shape. Raises ValueError for other dtypes."""
    items = {"u8": np.uint8, "i32": np.int32, "f32": np.float32}
    if tensor.dtype not in items:
        raise ValueError(f"dtype {tensor.dtype} holds no whole numbers, expected {', '.join(items)}")
    return tensor.data.view(items[tensor.dtype]).reshape(tensor.shape).astype(np.int64)


def from_float32(x: Floats, dtype: str) -> Tensor:
    """A tensor of `dtype` nearest to `x`; a view for f32.

    f16 and bf16 round to nearest, ties to even, and keep NaN and infinity. Raises ValueError for an integer
    dtype, for a finite value beyond the range of f16 or bf16, and for NaN or infinity in nf4 and int8.
    """
    if dtype == "nf4":
        return nf4.quantize(x)
    if dtype == "int8":
        return int8.quantize(x)
    return Tensor(dtype, x.shape, plain_bytes(x, dtype))


def plain_bytes(x: Floats, dtype: str) -> NDArray[np.uint8]:
    """The bytes of `x` as f32, f16 or bf16; errors as in `from_float32`."""
    x = np.ascontiguousarray(x, np.float32).reshape(-1)
    if dtype == "f32":
        return x.view(np.uint8)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        return _in_range(x, np.isinf(half), dtype, half.view(np.uint8))
    if dtype == "bf16":
        bits = f32_to_bf16(x)
        return _in_range(x, bits & 0x7FFF == 0x7F80, dtype, bits.view(np.uint8))
    raise ValueError(f"cannot store real numbers as {dtype}, expected f32, f16, bf16, nf4 or int8")


def _in_range(
    x: Floats, infinite: NDArray[np.bool_], dtype: str, stored: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    lost = np.flatnonzero(infinite & np.isfinite(x))
    if lost.size:
        raise ValueError(f"value {x[lost[0]]} at flat index {lost[0]} is beyond the range of {dtype}")
    return stored
