"""A backend on torch, for every device that torch has: right before fast. spec/backend.md walks through it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from adaptrt.errors import BackendError
from adaptrt.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptrt.backends.base import Executable, LoadOptions
    from adaptrt.program import Program
    from adaptrt.tensor import Tensor


class TorchBackend:
    """`torch`, or `torch:DEVICE` with a device as torch writes it: cpu, cuda, cuda:1, mps, xpu."""

    name = "torch"
    takes_device = True

    def unavailable(self) -> str | None:
        """Why torch cannot be used, or None; does not import it."""
        if find_spec("torch") is None:
            return "torch is not installed: pip install 'adaptrt[torch]'"
        return None

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> Executable:
        """Copy the weights to the device as they are stored. Raises BackendError, also for a device it lacks."""
        try:
            executable = import_module("adaptrt_torch.executable")
        except (ImportError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BackendError(f"backend torch: torch cannot be imported: {reason}") from error
        loaded: Executable = executable.TorchExecutable(program, tensors, options)
        return loaded


@hookimpl
def adaptrt_backends() -> list[TorchBackend]:
    """Torch."""
    return [TorchBackend()]
