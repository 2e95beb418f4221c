"""The native CPU backend: `adrt_cpu_backend()` of the compiled module `_native`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from adaptrt.backends.base import LoadOptions
from adaptrt.backends.native import Calls, NativeExecutable, native_module
from adaptrt.errors import BackendError
from adaptrt.program import Program
from adaptrt.tensor import Tensor


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CpuBackend:
    """Runs Programs with the C kernels that suit this machine's CPU."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """Why the compiled module cannot be used, or None."""
        try:
            self._calls()
        except BackendError as error:
            return str(error).removeprefix(f"backend {self.name}: ")
        return None

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> NativeExecutable:
        """Check and prepare a program; the tensors' bytes are read where they are, usually in a mapped file.

        Raises BackendError naming the first thing that does not fit, or the instruction set this CPU lacks.
        """
        if options.threads < 0:
            raise BackendError(f"{options.threads} threads, expected 0 (one per core) or more")
        return NativeExecutable(
            self._calls(), program, tensors, options, options.threads or available_cores()
        )

    def _calls(self) -> Calls:
        native = native_module(self.name)
        return Calls(native, native.lib.adrt_cpu_backend(), self.name)
