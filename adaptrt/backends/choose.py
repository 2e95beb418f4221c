"""Which backend runs a program: the one that was named, or the best that is here and takes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from adaptrt.backends.base import Backend, Executable, LoadOptions
from adaptrt.errors import BackendError, NoMemoryError, UnavailableError
from adaptrt.program import Program
from adaptrt.tensor import Tensor

log = logging.getLogger("adaptrt")

# What `auto` tries: these, any of which may be absent or refuse what is asked, then the first of those that is here.
DEVICES = ("cuda",)
HOSTS = ("cpu", "reference")

Backends = Mapping[str, Backend]


def load_executable(
    backends: Backends, choice: str, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions
) -> tuple[Executable, str]:
    """Load a program on NAME, NAME:DEVICE or "auto"; returns what it became and the choice without "auto".

    "auto" passes over a device that does not offer what `options` ask, and with a warning one that lacks the memory,
    unless a limit of GPU memory was given. Raises BackendError.
    """
    if choice != "auto":
        backend, device = choose_backend(backends, choice)
        return _load(backend, program, tensors, replace(options, device=device)), choice
    for backend in _available(backends, DEVICES):
        try:
            return _load(backend, program, tensors, options), backend.name
        except UnavailableError as error:
            log.debug("auto passes over %s", error)
        except NoMemoryError as error:
            if options.gpu_memory:
                raise
            log.warning("%s; running on the CPU instead", error)
    host = next(_available(backends, HOSTS), None)
    if host is None:
        raise BackendError("no backend is available")
    return _load(host, program, tensors, options), host.name


def _load(
    backend: Backend, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions
) -> Executable:
    if options.gpu_memory and not getattr(backend, "takes_gpu_memory", False):
        raise BackendError(
            f"backend {backend.name!r}: has no GPU memory to limit, found a limit of {options.gpu_memory} bytes"
        )
    return backend.load(program, tensors, options)


def choose_backend(backends: Backends, choice: str) -> tuple[Backend, str]:
    """The backend and device that NAME or NAME:DEVICE names.

    Raises BackendError saying why it cannot be used, or that it takes no device.
    """
    name, colon, device = choice.partition(":")
    if name not in backends:
        raise BackendError(f"backend {name!r}: not installed; installed: {', '.join(sorted(backends))}")
    backend = backends[name]
    if colon and not (device and getattr(backend, "takes_device", False)):
        problem = f"takes no device, found {device!r}" if device else "no device after the colon"
        raise BackendError(f"backend {name!r}: {problem}")
    reason = backend.unavailable()
    if reason is not None:
        raise BackendError(f"backend {name!r}: unavailable: {reason}")
    return backend, device


def _available(backends: Backends, names: Sequence[str]) -> Iterator[Backend]:
    for name in names:
        backend = backends.get(name)
        reason = backend.unavailable() if backend else "not installed"
        if backend and reason is None:
            yield backend
        elif name == "cpu":  # what is left is slow enough to look like a fault
            log.warning("backend cpu is unavailable, falling back to the slow reference: %s", reason)
