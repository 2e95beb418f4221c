"""The CPU backend with its instruction set forced: on this machine, or emulated where the CPU is of another kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.emulated import EmulatedBackend

from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cpu import CpuBackend
from adaptrt.backends.native import NativeExecutable
from adaptrt.errors import BackendError
from adaptrt.testing.programs import Model

ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "neon", "neon_dot", "avx_vnni")
INTEGER_ISAS = ("avx2", "avx512", "avx512_vnni", "neon_dot", "avx_vnni")  # whose `fast` multiplies integers
BYTE_ISAS = ("avx512_vnni", "neon_dot", "avx_vnni")  # ... and bytes for what a gated activation reads
FLOAT_ISAS = ISAS[:-2]  # the last two have the float32 kernels of neon and avx2


def load_on_cpu(model: Model, options: LoadOptions, **changes: Any) -> NativeExecutable:
    """Load a model; skips when the forced instruction set can neither run nor be emulated here."""
    options = replace(options, **changes)
    try:
        return CpuBackend().load(model.program, model.tensors, options)
    except BackendError as error:
        if "lacks instruction set" not in str(error):
            raise
        lacking = str(error)
    backend = EmulatedBackend()
    if not options.isa.startswith("neon"):
        pytest.skip(lacking)
    if reason := backend.unavailable():
        pytest.skip(f"{lacking}, and cannot be emulated: {reason}")
    return backend.load(model.program, model.tensors, options)
