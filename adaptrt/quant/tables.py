"""The two codebooks of NF4 with double quantization, and the boundaries between their values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)


def boundaries(codebook: Floats) -> Floats:
    """The points [n - 1] halfway between the values of a rising codebook [n]; ties go to the lower code."""
    halfway: Floats = (codebook[:-1] + codebook[1:]) / np.float32(2)
    return halfway


def _linspace(start: np.float32, stop: np.float32, count: int) -> Floats:
    """`count` float32 values from start to stop, each half from its own end, rounded once (an FMA)."""
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = start + step * index, stop - step * index[::-1]
    values: Floats = np.where(index < count // 2, rising, falling).astype(np.float32)
    return values


def _dynamic_map() -> Floats:
    """The signed dynamic map [256] of "8-bit Approximations for Parallelism" (Dettmers, arXiv:1511.04561).

    Decade e in 0 … 6 holds 2^e values: the middles of 2^e equal parts of 0.1 … 1, times 10^(e - 6). Their
    negatives, 0 and 1 complete the map.
    """
    decades = [
        np.float32(10.0 ** (e - 6)) * boundaries(_linspace(np.float32(0.1), np.float32(1), 2**e + 1))
        for e in range(7)
    ]
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([-positive, positive, np.array([0, 1], np.float32)]))


NF4_CODEBOOK: Floats = np.array([int(bits, 16) for bits in _NF4_BITS.split()], np.uint32).view(np.float32)
NF4_BOUNDARIES = boundaries(NF4_CODEBOOK)
DYNAMIC_MAP = _dynamic_map()
DYNAMIC_BOUNDARIES = boundaries(DYNAMIC_MAP)
for _table in (NF4_CODEBOOK, NF4_BOUNDARIES, DYNAMIC_MAP, DYNAMIC_BOUNDARIES):
    _table.flags.writeable = False
