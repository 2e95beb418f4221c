"""The quantizers of adaptrt.quant in C (native/cpu/quantize.c): numpy's results bit for bit, much faster."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.quant.encode import NUMPY, Kernels
from adaptrt.quant.finite import NotFiniteError
from adaptrt.quant.int8 import Int8Parts
from adaptrt.tensor import BLOCK, NESTED_BLOCK

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def best_kernels() -> Kernels:
    """The native quantizers, or numpy's where the native library is not built."""
    try:
        return native_kernels()
    except ImportError:
        return NUMPY


def native_kernels() -> Kernels:
    """The native quantizers. Raises ImportError when the native library is not built."""
    binding = _Binding(import_module("adaptrt.backends._native"))
    return Kernels(binding.nf4_blocks, binding.nf4_absmax, binding.int8_rows)


class _Binding:
    def __init__(self, module: Any) -> None:
        self._ffi, self._lib = module.ffi, module.lib

    def nf4_blocks(self, x: Floats) -> tuple[Bytes, Floats]:
        codes, absmax = np.empty(-(-x.size // 2), np.uint8), np.empty(-(-x.size // BLOCK), np.float32)
        x, bad = np.ascontiguousarray(x), self._ffi.new("int64_t *")
        code = self._lib.adrt_quantize_nf4(
            self._pointer("float[]", x),
            x.size,
            self._pointer("uint8_t[]", codes),
            self._pointer("float[]", absmax),
            bad,
        )
        self._require_finite(code, x, bad)
        return codes, absmax

    def nf4_absmax(self, absmax: Floats, offset: np.float32) -> tuple[Bytes, Floats]:
        q, nested = np.empty(absmax.size, np.uint8), np.empty(-(-absmax.size // NESTED_BLOCK), np.float32)
        self._lib.adrt_quantize_absmax(
            self._pointer("float[]", np.ascontiguousarray(absmax)),
            absmax.size,
            float(offset),
            self._pointer("uint8_t[]", q),
            self._pointer("float[]", nested),
        )
        return q, nested

    def int8_rows(self, x: Floats) -> Int8Parts:
        rows, cols = x.shape
        parts = Int8Parts(np.empty((rows, cols), np.int8), np.empty((rows, -(-cols // BLOCK)), np.uint16))
        x, bad = np.ascontiguousarray(x), self._ffi.new("int64_t *")
        code = self._lib.adrt_quantize_int8(
            self._pointer("float[]", x),
            rows,
            cols,
            self._pointer("int8_t[]", parts.codes),
            self._pointer("uint16_t[]", parts.scales),
            bad,
        )
        self._require_finite(code, x, bad)
        return parts

    def _pointer(self, kind: str, array: NDArray[Any]) -> Any:
        return self._ffi.from_buffer(kind, array.reshape(-1))

    def _require_finite(self, code: int, x: Floats, bad: Any) -> None:
        if code != self._lib.ADRT_OK:
            raise NotFiniteError(bad[0], float(x.flat[bad[0]]))
