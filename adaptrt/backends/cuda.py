"""The CUDA backend: `adrt_cuda_backend()` of the library `_cuda.so`, which is built where a CUDA compiler is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.multiplied import multiplied_out
from adaptrt.backends.native import Calls, NativeExecutable, native_module, open_table
from adaptrt.errors import BackendError
from adaptrt.program import Program
from adaptrt.tensor import Tensor

LIBRARY = "_cuda.so"
REASON = "_cuda.txt"  # why there is no library
WIDEST_RANK = 512  # of low-rank terms; a warp goes over all ranks of its outputs


class CudaExecutable(NativeExecutable):
    """A program on a GPU."""

    def attach(self, adapter: LoweredAdapter) -> int:
        """See NativeExecutable.attach."""
        return super().attach(multiplied_out(adapter, self._loaded.points, WIDEST_RANK))


class CudaBackend:
    """Runs Programs on an NVIDIA GPU of compute capability 8.0 or newer; `cuda:1` names the second one."""

    name = "cuda"
    takes_device = True
    takes_gpu_memory = True

    def unavailable(self) -> str | None:
        """Why no GPU can be used here, or None."""
        try:
            self._calls()("probe")
        except BackendError as error:
            return str(error).removeprefix(f"backend {self.name}: ")
        return None

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> CudaExecutable:
        """Check a program and upload its tensors.

        Raises BackendError naming the first thing that does not fit, or the memory that the GPU lacks.
        """
        device = options.device or "0"
        if not (device.isascii() and device.isdigit() and len(device) < 4):
            raise BackendError(f"backend cuda: device {options.device!r}, expected the number of a GPU")
        return CudaExecutable(self._calls(), program, tensors, options, threads=1, device=int(device))

    def _calls(self) -> Calls:
        module = native_module(self.name)
        path = Path(module.__file__).with_name(LIBRARY)
        if not path.exists():
            written = path.with_name(REASON)
            reason = written.read_text().strip() if written.exists() else "the build left no reason"
            raise BackendError(f"backend cuda: not built when adaptrt was installed: {reason}")
        return Calls(module, open_table(module, path, "adrt_cuda_backend", self.name), self.name)
