"""A tensor as every floor sees it: a dtype name, a shape and bytes; and how each dtype lays out its bytes.

`f32 f16 bf16 u8 i32` are plain little-endian arrays in row-major order. The two quantized types are made of parts,
each starting at a multiple of 64 bytes from the tensor's start (spec/format.md, "Data types"):

    nf4    codes u8 [ceil(n/2)] | absmax u8 [blocks] | nested f32 [ceil(blocks/256)], offset f32
           n elements flattened row-major; blocks = ceil(n/64); element 2j sits in the high nibble of byte j
    int8   codes i8 [rows*cols] | scale bf16 [rows * ceil(cols/64)]
           cols is the last dimension; every row starts a new block of 64
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

PART_ALIGNMENT = 64
BLOCK = 64  # weights per absmax (nf4) or per scale (int8)
NESTED_BLOCK = 256  # absmax codes per nested absmax

PLAIN_ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i32": 4}
DTYPES = (*PLAIN_ITEM_BYTES, "nf4", "int8")


def align(offset: int, alignment: int = PART_ALIGNMENT) -> int:
    """Round `offset` up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


@dataclass(frozen=True)
class Nf4Layout:
    """Byte offsets of the parts of an nf4 tensor of `count` elements."""

    count: int

    @property
    def blocks(self) -> int:
        """Number of 64-weight blocks; the last one may be partial."""
        return -(-self.count // BLOCK)

    @property
    def nested_blocks(self) -> int:
        """Number of 256-block groups that share one nested absmax."""
        return -(-self.blocks // NESTED_BLOCK)

    @property
    def code_bytes(self) -> int:
        """Bytes of the 4-bit codes, two to a byte."""
        return -(-self.count // 2)

    @property
    def absmax_offset(self) -> int:
        """Where the 8-bit absmax codes start."""
        return align(self.code_bytes)

    @property
    def nested_offset(self) -> int:
        """Where the float32 nested absmax values start; the float32 offset follows the last of them."""
        return align(self.absmax_offset + self.blocks)

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensor."""
        return self.nested_offset + 4 * self.nested_blocks + 4


@dataclass(frozen=True)
class Int8Layout:
    """Byte offsets of the parts of an int8 tensor of `rows` × `cols`."""

    rows: int
    cols: int

    @property
    def row_blocks(self) -> int:
        """Number of 64-weight blocks in a row; the last one may be partial."""
        return -(-self.cols // BLOCK)

    @property
    def scale_offset(self) -> int:
        """Where the bfloat16 scales start."""
        return align(self.rows * self.cols)

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensor."""
        return self.scale_offset + 2 * self.rows * self.row_blocks


def rows_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as a matrix: (product of the leading dimensions, last dimension); () and (n,) are one row."""
    return (prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this dtype and shape occupies. Raises ValueError for an unknown dtype."""
    if dtype == "nf4":
        return Nf4Layout(prod(shape)).nbytes
    if dtype == "int8":
        return Int8Layout(*rows_cols(shape)).nbytes
    if dtype not in PLAIN_ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    return PLAIN_ITEM_BYTES[dtype] * prod(shape)


@dataclass(frozen=True, eq=False)
class Tensor:
    """Named-dtype bytes with a shape; `data` is a flat uint8 view, usually straight into a mapped file.

    Tensors compare and hash by identity: two adapters that share a projection share the object.
    """

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        expected = tensor_nbytes(self.dtype, self.shape)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.size != expected:
            raise ValueError(
                f"{self.dtype} tensor of shape {list(self.shape)} needs {expected} bytes, got {self.data.nbytes}"
            )

    @classmethod
    def from_numpy(cls, array: NDArray[np.generic]) -> Tensor:
        """Wrap a float32, float16, int32 or uint8 array; no copy when it is contiguous."""
        dtype = {"float32": "f32", "float16": "f16", "int32": "i32", "uint8": "u8"}[array.dtype.name]
        return cls(dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
