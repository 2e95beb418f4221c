"""Stored tensors on a device: they stay in their dtype and become float32 a matrix, or a few rows, at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import embedding

from adaptrt.quant import int8, nf4
from adaptrt.quant.tables import DYNAMIC_MAP, NF4_CODEBOOK
from adaptrt.tensor import BLOCK, NESTED_BLOCK, Tensor, rows_cols

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Matrix(Protocol):
    """A tensor of the file as rows × cols."""

    def dense(self) -> torch.Tensor:
        """Every value, float32 [rows, cols]."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows, float32 [len(index), cols]."""


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of an array; a mapped file is read-only, which torch does not like."""
    return torch.from_numpy(np.array(array)).to(device)


def matrix(tensor: Tensor, device: torch.device) -> Matrix:
    """The tensor on a device, in its own dtype."""
    rows, cols = rows_cols(tensor.shape)
    if tensor.dtype == "nf4":
        return Nf4.of(tensor, rows, cols, device)
    if tensor.dtype == "int8":
        codes, scales = int8.parts(tensor)
        return Int8(to_device(codes, device), to_device(scales.view(np.int16), device).view(torch.bfloat16))
    return Plain(to_device(tensor.data, device).view(PLAIN[tensor.dtype]).reshape(rows, cols))


@dataclass(frozen=True)
class Plain:
    """f32, f16 or bf16 values [rows, cols]."""

    values: torch.Tensor

    def dense(self) -> torch.Tensor:
        """See Matrix.dense."""
        return self.values.float()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """See Matrix.rows."""
        return self.values[index].float()


@dataclass(frozen=True)
class Int8:
    """Codes [rows, cols] and bfloat16 scales [rows, ceil(cols / 64)]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def dense(self) -> torch.Tensor:
        """See Matrix.dense."""
        return self._scaled(self.codes, self.scales)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """See Matrix.rows."""
        return self._scaled(self.codes[index], self.scales[index])

    def _scaled(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return codes.float() * scales.float().repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]


@dataclass(frozen=True)
class Nf4:
    """The parts of an nf4 tensor (adaptrt/tensor.py) and the two tables that give its codes a value."""

    shape: tuple[int, int]
    offset: float
    codes: torch.Tensor  # u8 [ceil(n / 2)]
    absmax: torch.Tensor  # u8 [blocks]
    nested: torch.Tensor  # f32 [ceil(blocks / 256)]
    byte_values: torch.Tensor  # f32 [256, 2]: a byte's high and low nibble
    dynamic_map: torch.Tensor  # f32 [256]

    @classmethod
    def of(cls, tensor: Tensor, rows: int, cols: int, device: torch.device) -> Nf4:
        """Copy the parts to the device."""
        codes, absmax, nested, offset = nf4.parts(tensor)
        pairs = np.stack([np.repeat(NF4_CODEBOOK, 16), np.tile(NF4_CODEBOOK, 16)], axis=1)
        arrays = (codes, absmax, nested, pairs, DYNAMIC_MAP)
        return cls((rows, cols), float(offset), *(to_device(array, device) for array in arrays))

    def dense(self) -> torch.Tensor:
        """See Matrix.dense; equal to adaptrt.quant.nf4 bit for bit."""
        count = prod(self.shape)
        values = embedding(self.codes.int(), self.byte_values).reshape(-1)[:count]
        blocks = torch.arange(len(self.absmax), device=self.absmax.device)
        return (values * self._absmax(blocks).repeat_interleave(BLOCK)[:count]).reshape(self.shape)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """See Matrix.rows."""
        at = index[:, None] * self.shape[1] + torch.arange(self.shape[1], device=index.device)
        return self.byte_values[self.codes[at // 2].long(), at % 2] * self._absmax(at // BLOCK)

    def _absmax(self, blocks: torch.Tensor) -> torch.Tensor:
        return (
            self.dynamic_map[self.absmax[blocks].long()] * self.nested[blocks // NESTED_BLOCK] + self.offset
        )
