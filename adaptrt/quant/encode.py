"""Streaming `from_float32`: chunks of weights in, tensor bytes out; keeps one number per 64 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptrt.quant import int8, nf4
from adaptrt.quant.finite import NotFiniteError
from adaptrt.quant.plain import plain_bytes
from adaptrt.tensor import BLOCK, Int8Layout, Nf4Layout, rows_cols

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Kernels:
    """The functions that quantize a chunk: numpy's, unless a native library replaces them bit for bit."""

    nf4_blocks: Callable[[Floats], tuple[Bytes, Floats]] = nf4.quantize_blocks
    nf4_absmax: Callable[[Floats, np.float32], tuple[Bytes, Floats]] = nf4.quantize_absmax
    int8_rows: Callable[[Floats], int8.Int8Parts] = int8.quantize_rows


NUMPY = Kernels()


class Encoder:
    """Encodes one tensor from consecutive chunks of its row-major weights, cut anywhere.

    The bytes that `feed` and `finish` return, joined, are `from_float32(whole, dtype).data`. Errors are
    those of `from_float32`; besides, `feed` raises ValueError for more weights than the shape has, `finish`
    for fewer.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], kernels: Kernels = NUMPY) -> None:
        self._coder = _coder(dtype, shape, kernels)
        self._count = prod(shape)
        self._encoded = 0
        self._waiting: Floats = np.empty(0, np.float32)  # the start of a block whose rest has not come yet

    def feed(self, x: Floats) -> Bytes:
        """Take the next weights [any number]; returns the bytes to write now."""
        x = np.concatenate([self._waiting, x.reshape(-1)]) if self._waiting.size else x.reshape(-1)
        self._require(self._encoded + x.size <= self._count, self._encoded + x.size)
        out = []
        while x.size and (taken := self._coder.take(self._encoded, x.size)):
            try:
                out.append(self._coder.encode(x[:taken]))
            except NotFiniteError as error:
                raise NotFiniteError(self._encoded + error.index, error.value) from None
            self._encoded += taken
            x = x[taken:]
        self._waiting = x.copy()
        return out[0] if len(out) == 1 else np.concatenate([*out, np.empty(0, np.uint8)])

    def finish(self) -> Bytes:
        """The bytes that follow the last weight's."""
        self._require(self._encoded == self._count, self._encoded + self._waiting.size)
        return self._coder.tail()

    def _require(self, met: bool, received: int) -> None:
        if not met:
            raise ValueError(f"got {received} weights, expected {self._count}")


class _Coder(Protocol):
    """What a dtype adds to Encoder."""

    def take(self, encoded: int, waiting: int) -> int:
        """How many of the waiting weights (one or more) to encode now, after `encoded`; 0 waits for more."""

    def encode(self, x: Floats) -> Bytes:
        """The bytes of the next weights, as many as `take` said."""

    def tail(self) -> Bytes:
        """The bytes after the last weight's."""


def _coder(dtype: str, shape: tuple[int, ...], kernels: Kernels) -> _Coder:
    if dtype == "nf4":
        return _Nf4Coder(Nf4Layout(prod(shape)), kernels)
    if dtype == "int8":
        return _Int8Coder(Int8Layout(*rows_cols(shape)), kernels)
    return _PlainCoder(dtype)


class _PlainCoder:
    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def take(self, encoded: int, waiting: int) -> int:
        return waiting

    def encode(self, x: Floats) -> Bytes:
        return plain_bytes(x, self._dtype)

    def tail(self) -> Bytes:
        return np.empty(0, np.uint8)


class _Nf4Coder:
    def __init__(self, layout: Nf4Layout, kernels: Kernels) -> None:
        self._layout = layout
        self._kernels = kernels
        self._absmax: list[Floats] = [np.empty(0, np.float32)]

    def take(self, encoded: int, waiting: int) -> int:
        return waiting if encoded + waiting == self._layout.count else waiting // BLOCK * BLOCK

    def encode(self, x: Floats) -> Bytes:
        codes, absmax = self._kernels.nf4_blocks(x)
        self._absmax.append(absmax)
        return codes

    def tail(self) -> Bytes:
        absmax = np.concatenate(self._absmax)
        offset = nf4.absmax_offset(absmax)
        q, nested = self._kernels.nf4_absmax(absmax, offset)
        start = self._layout.code_bytes
        out = np.zeros(self._layout.nbytes - start, np.uint8)
        out[self._layout.absmax_offset - start :][: q.size] = q
        out[self._layout.nested_offset - start :] = np.append(nested, offset).view(np.uint8)
        return out


class _Int8Coder:
    def __init__(self, layout: Int8Layout, kernels: Kernels) -> None:
        self._layout = layout
        self._kernels = kernels
        self._scales: list[NDArray[np.uint16]] = [np.empty(0, np.uint16)]

    def take(self, encoded: int, waiting: int) -> int:
        """Whole rows from the start of a row, else the rest of the row, else whole blocks of it."""
        cols = self._layout.cols
        rest = cols - encoded % cols
        if waiting < rest:
            return waiting // BLOCK * BLOCK
        return waiting // cols * cols if rest == cols else rest

    def encode(self, x: Floats) -> Bytes:
        codes, scales = self._kernels.int8_rows(x.reshape(-1, min(x.size, self._layout.cols)))
        self._scales.append(scales.reshape(-1))
        return codes.reshape(-1).view(np.uint8)

    def tail(self) -> Bytes:
        layout = self._layout
        out = np.zeros(layout.nbytes - layout.rows * layout.cols, np.uint8)
        out[layout.scale_offset - layout.rows * layout.cols :] = np.concatenate(self._scales).view(np.uint8)
        return out
