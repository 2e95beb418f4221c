"""One lock around an executable, so that several threads may share a model and closing it is safe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.backends.base import Batch, Executable, prefetch
from adaptrt.engine.lock import ForkableLock
from adaptrt.errors import ClosedError


class GuardedExecutable:
    """An Executable whose calls are serialised and raise ClosedError after `close()`."""

    def __init__(self, executable: Executable) -> None:
        self._executable: Executable | None = executable
        self._lock = ForkableLock()

    @contextmanager
    def _open(self) -> Iterator[Executable]:
        with self._lock:
            if self._executable is None:
                raise ClosedError("the model is closed")
            yield self._executable

    def reserve(self, n_pages: int) -> None:
        """See Executable.reserve."""
        with self._open() as executable:
            executable.reserve(n_pages)

    def attach(self, adapter: LoweredAdapter) -> int:
        """See Executable.attach."""
        with self._open() as executable:
            return executable.attach(adapter)

    def detach(self, handle: int) -> None:
        """See Executable.detach."""
        with self._open() as executable:
            executable.detach(handle)

    def prefetch(self, handles: Sequence[int]) -> None:
        """See Executable."""
        with self._open() as executable:
            prefetch(executable, handles)

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """See Executable.step."""
        with self._open() as executable:
            return executable.step(batch)

    def describe(self) -> str:
        """See Executable.describe."""
        with self._open() as executable:
            return executable.describe()

    def close(self) -> None:
        """Free the executable once the step under way, if any, is over."""
        with self._lock:
            executable, self._executable = self._executable, None
            if executable is not None:
                executable.close()
