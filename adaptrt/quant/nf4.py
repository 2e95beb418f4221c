"""NF4 with double quantization (QLoRA, arXiv:2305.14314): 4.127 bits a weight. The numpy truth.

A weight is one of 16 codebook values times its block's absmax; the absmax is one of 256 dynamic-map values
times its group's nested absmax, plus one offset per tensor. Every step is one float32 rounding, so that any
machine computes the same bits. The layout, the codes and the rounding are those of bitsandbytes.
"""

from __future__ import annotations

from itertools import chain
from math import fsum, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptrt.quant.finite import require_finite
from adaptrt.quant.tables import (
    DYNAMIC_BOUNDARIES,
    DYNAMIC_MAP,
    NF4_BOUNDARIES,
    NF4_CODEBOOK,
    Floats,
)
from adaptrt.tensor import BLOCK, NESTED_BLOCK, Nf4Layout, Tensor

Bytes = NDArray[np.uint8]

SMALLEST_SCALE = np.float32(1e-38)  # keeps the inverse finite
_SLICE = 1 << 18  # values handled at a time, so that intermediate arrays stay in the cache
# [256, 2]: the values of a byte's high and low nibble; `take` looks them up many times faster than an index does
_BYTE_VALUES = np.stack([np.repeat(NF4_CODEBOOK, 16), np.tile(NF4_CODEBOOK, 16)], axis=1)


class Nf4Parts(NamedTuple):
    """The parts of an nf4 tensor of n elements in blocks = ceil(n / 64)."""

    codes: Bytes  # [ceil(n / 2)]; element 2j is the high nibble of byte j
    absmax: Bytes  # [blocks], indices into the dynamic map
    nested: Floats  # [ceil(blocks / 256)]
    offset: np.float32


def parts(tensor: Tensor) -> Nf4Parts:
    """Views of the parts of an nf4 tensor; only the offset is copied."""
    layout = Nf4Layout(prod(tensor.shape))
    floats = tensor.data[layout.nested_offset :].view(np.float32)
    return Nf4Parts(
        tensor.data[: layout.code_bytes],
        tensor.data[layout.absmax_offset : layout.absmax_offset + layout.blocks],
        floats[:-1],
        floats[-1],
    )


def assemble(shape: tuple[int, ...], made_of: Nf4Parts) -> Tensor:
    """An nf4 tensor from its parts, with zeros between them. Raises ValueError when a size is wrong."""
    layout = Nf4Layout(prod(shape))
    sizes = tuple(part.size for part in made_of)
    expected = (layout.code_bytes, layout.blocks, layout.nested_blocks, 1)
    if sizes != expected:
        raise ValueError(f"nf4 parts for shape {list(shape)} have sizes {sizes}, expected {expected}")
    data = np.zeros(layout.nbytes, np.uint8)
    codes, absmax, nested, _ = parts(Tensor("nf4", shape, data))
    codes[:], absmax[:], nested[:] = made_of[:3]
    data[-4:] = np.float32(made_of.offset).reshape(1).view(np.uint8)
    return Tensor("nf4", shape, data)


def quantize(x: Floats) -> Tensor:
    """Quantize float32 `x` of any shape, in row-major order. Raises ValueError for a NaN or an infinity."""
    codes, absmax = quantize_blocks(np.ascontiguousarray(x, np.float32).reshape(-1))
    offset = absmax_offset(absmax)
    return assemble(x.shape, Nf4Parts(codes, *quantize_absmax(absmax, offset), offset))


def quantize_blocks(x: Floats) -> tuple[Bytes, Floats]:
    """Weights [n] that start a block -> codes [ceil(n / 2)] and absmax [ceil(n / 64)].

    Unless it is the tensor's end, n must be a multiple of 64. Raises ValueError for a NaN or an infinity.
    """
    require_finite(x)
    full = x.size // BLOCK * BLOCK
    codes, absmax = np.empty(-(-x.size // 2), np.uint8), np.empty(-(-x.size // BLOCK), np.float32)
    for at in range(0, full, _SLICE):
        end = min(at + _SLICE, full)
        blocks = x[at:end].reshape(-1, BLOCK)
        codes[at // 2 : end // 2], absmax[at // BLOCK : end // BLOCK] = _encode_full(blocks)
    if full < x.size:
        codes[full // 2 :], absmax[full // BLOCK :] = _encode_partial(x[full:])
    return codes, absmax


def _encode_full(x: Floats) -> tuple[Bytes, Floats]:
    """Whole blocks [blocks, 64], multiplied by the inverse of their absmax -> codes, absmax [blocks]."""
    absmax: Floats = np.abs(x).max(axis=1)
    return _pack(x * _inverse(absmax)[:, None]), absmax


def _encode_partial(x: Floats) -> tuple[Bytes, Floats]:
    """A trailing partial block is divided by its absmax, at least 1e-38: so bitsandbytes does it."""
    absmax = np.maximum(np.abs(x).max(keepdims=True), SMALLEST_SCALE)
    return _pack(np.append(x / absmax, np.zeros(x.size % 2, np.float32))), absmax


def _inverse(absmax: Floats) -> Floats:
    inverse: Floats = np.float32(1) / np.maximum(absmax, SMALLEST_SCALE)
    return inverse


def _pack(scaled: Floats) -> Bytes:
    """An even number of values in about [-1, 1] -> nearest codes, two to a byte."""
    codes = np.searchsorted(NF4_BOUNDARIES, scaled.reshape(-1), side="left").astype(np.uint8)
    packed: Bytes = codes[0::2] << np.uint8(4) | codes[1::2]
    return packed


def absmax_offset(absmax: Floats) -> np.float32:
    """The mean of the absmax values: exact sum rounded to float64, divided, rounded to float32."""
    slices = (absmax[at : at + _SLICE].tolist() for at in range(0, absmax.size, _SLICE))
    mean: np.float32 = np.float32(fsum(chain.from_iterable(slices)) / max(absmax.size, 1))
    return mean


def quantize_absmax(absmax: Floats, offset: np.float32) -> tuple[Bytes, Floats]:
    """absmax [blocks] minus offset -> dynamic-map codes [blocks], nested absmax [ceil(blocks / 256)]."""
    difference = absmax - offset
    groups = (np.abs(difference[at : at + NESTED_BLOCK]) for at in range(0, absmax.size, NESTED_BLOCK))
    nested = np.array([group.max() for group in groups], np.float32)
    scaled = difference * _per_block(_inverse(nested), absmax.size)
    return np.searchsorted(DYNAMIC_BOUNDARIES, scaled, side="left").astype(np.uint8), nested


def _per_block(per_group: Floats, blocks: int) -> Floats:
    """Repeat each group's value for its 256 blocks; the last group may have fewer."""
    return np.repeat(per_group, NESTED_BLOCK)[:blocks]


def dequantize_absmax(tensor: Tensor) -> Floats:
    """The float32 absmax of every block of an nf4 tensor: f32(f32(map[q] * nested) + offset)."""
    _, q, nested, offset = parts(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        absmax: Floats = DYNAMIC_MAP[q] * _per_block(nested, q.size) + offset
    return absmax


def dequantize(tensor: Tensor) -> Floats:
    """The float32 weights of an nf4 tensor, of its shape: f32(codebook[code] * absmax)."""
    count = prod(tensor.shape)
    weights: Floats = _BYTE_VALUES.take(parts(tensor).codes, axis=0).reshape(-1)[:count]
    absmax = dequantize_absmax(tensor)
    full = count // BLOCK
    blocks, partial = weights[: full * BLOCK].reshape(full, BLOCK), weights[full * BLOCK :]
    with np.errstate(over="ignore", invalid="ignore"):  # a file may hold any absmax
        blocks *= absmax[:full, None]
        partial *= absmax[full:]
    return weights.reshape(tensor.shape)


def dequantize_range(tensor: Tensor, start: int, stop: int) -> Floats:
    """Weights start … stop - 1 in row-major order, as `dequantize` gives them, leaving the others alone."""
    first, last = start // BLOCK, -(-stop // BLOCK)
    codes, q, nested, offset = parts(tensor)
    weights: Floats = _BYTE_VALUES.take(codes[first * BLOCK // 2 : last * BLOCK // 2], axis=0).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):  # a file may hold any absmax
        absmax = DYNAMIC_MAP[q[first:last]] * nested[np.arange(first, last) // NESTED_BLOCK] + offset
        weights *= np.repeat(absmax, BLOCK)[: weights.size]
    return weights[start - first * BLOCK : stop - first * BLOCK]
