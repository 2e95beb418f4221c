"""Quantizers refuse what has no code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class NotFiniteError(ValueError):
    """A value is NaN or infinite and so has no code; `index` is its flat index."""

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"value at flat index {index} is {value}, expected a finite number")
        self.index = index
        self.value = value


def require_finite(x: NDArray[np.float32]) -> None:
    """Raise NotFiniteError for the first NaN or infinity in `x`."""
    finite = np.isfinite(x)
    if not finite.all():
        index = int(finite.argmin())
        raise NotFiniteError(index, float(x.flat[index]))
