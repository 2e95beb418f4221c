"""bfloat16, which numpy does not have, as uint16 bits: the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

QUIET = np.uint32(0x0040_0000)  # makes a NaN quiet; it stays a NaN when its lower half is cut off


def bf16_to_f32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits nearest to `x`, ties to even; values out of range become infinite, NaNs quiet."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1)))
    wide: NDArray[np.uint32] = np.where(np.isnan(x), bits | QUIET, rounded)
    upper: NDArray[np.uint16] = (wide >> np.uint32(16)).astype(np.uint16)
    return upper
