"""For variants that compute a dense change of the weight at load: its term, and how to fill it a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.normal import LowRank
from adaptrt.tensor import PLAIN_ITEM_BYTES, Tensor

Floats = NDArray[np.float32]
PART_ELEMENTS = 1 << 19  # of a matrix at a time: 2 MiB as float32


def dense_term(change: Floats, scale: float = 1.0) -> LowRank:
    """The term of a dense change of the weight, [out, in]: 4 bytes and one multiplication an entry, for every token."""
    return LowRank(u=None, v=Tensor.from_numpy(change), scale=scale)


def filled(shape: tuple[int, int], rows: Callable[[slice], Floats]) -> Floats:
    """A matrix whose rows `part` are `rows(part)`, so that no second matrix of its size is ever needed."""
    matrix = np.empty(shape, np.float32)
    for part in row_parts(*shape):
        matrix[part] = rows(part)
    return matrix


def row_parts(rows: int, cols: int) -> Iterator[slice]:
    """Consecutive runs of the rows of a matrix, about PART_ELEMENTS elements each."""
    step = max(1, PART_ELEMENTS // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def transposed(tensor: Tensor) -> Tensor:
    """The transpose of a matrix of f32, f16 or bf16, in its own dtype."""
    bits = tensor.data.view(f"u{PLAIN_ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
    return Tensor(tensor.dtype, bits.T.shape, np.ascontiguousarray(bits.T).reshape(-1).view(np.uint8))
