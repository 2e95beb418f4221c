"""int8 with one bfloat16 scale per 64 weights of a row: 8.25 bits a weight. The numpy truth.

w = f32(code) * f32(scale). The scale is f32(absmax / 127) rounded up to bfloat16: no code leaves ±127.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptrt.quant.bf16 import bf16_to_f32
from adaptrt.quant.finite import require_finite
from adaptrt.tensor import BLOCK, Int8Layout, Tensor, rows_cols

Floats = NDArray[np.float32]


class Int8Parts(NamedTuple):
    """The parts of an int8 tensor of rows × cols."""

    codes: NDArray[np.int8]  # [rows, cols]
    scales: NDArray[np.uint16]  # [rows, ceil(cols / 64)], bfloat16 bits


def parts(tensor: Tensor) -> Int8Parts:
    """Views of the parts of an int8 tensor."""
    rows, cols = rows_cols(tensor.shape)
    layout = Int8Layout(rows, cols)
    return Int8Parts(
        tensor.data[: rows * cols].view(np.int8).reshape(rows, cols),
        tensor.data[layout.scale_offset :].view(np.uint16).reshape(rows, layout.row_blocks),
    )


def quantize(x: Floats) -> Tensor:
    """Quantize float32 `x`, a row being its last dimension. Raises ValueError for a NaN or an infinity."""
    rows, cols = rows_cols(x.shape)
    tensor = Tensor("int8", x.shape, np.zeros(Int8Layout(rows, cols).nbytes, np.uint8))
    codes, scales = parts(tensor)
    codes[:], scales[:] = quantize_rows(np.asarray(x, np.float32).reshape(rows, cols))
    return tensor


def quantize_rows(x: Floats) -> Int8Parts:
    """Weights [rows, cols] -> codes and scales. Raises ValueError for a NaN or an infinity."""
    require_finite(x)
    rows, cols = x.shape
    codes = np.zeros((rows, cols), np.int8)
    scales = np.zeros((rows, -(-cols // BLOCK)), np.uint16)
    for block in range(scales.shape[1]):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        scales[:, block] = _scale(np.abs(x[:, columns]).max(axis=1))
        codes[:, columns] = _encode(x[:, columns], bf16_to_f32(scales[:, block]))
    return Int8Parts(codes, scales)


def _scale(absmax: Floats) -> NDArray[np.uint16]:
    """absmax / 127 rounded up to bfloat16: a positive float32's bits are ordered as the numbers are."""
    bits: NDArray[np.uint32] = (absmax / np.float32(127)).view(np.uint32)
    upper: NDArray[np.uint16] = ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    return upper


def _encode(x: Floats, scale: Floats) -> NDArray[np.int8]:
    """x [rows, n] over scale [rows], to the nearest integer, ties to even; a zero scale makes zeros."""
    ratio = np.divide(x, scale[:, None], out=np.zeros_like(x), where=scale[:, None] > 0)
    return np.rint(ratio).astype(np.int8)


def dequantize(tensor: Tensor) -> Floats:
    """The float32 weights of an int8 tensor, of its shape."""
    return dequantize_rows(*parts(tensor)).reshape(tensor.shape)


def dequantize_rows(codes: NDArray[np.int8], scales: NDArray[np.uint16]) -> Floats:
    """The float32 weights of whole rows: codes [rows, cols] and scales [rows, ceil(cols / 64)]."""
    weights = codes.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a file may hold any scale
        weights *= np.repeat(bf16_to_f32(scales), BLOCK, axis=1)[:, : codes.shape[1]]
    return weights
