"""The adapters of one model: loaded by name, lowered and attached once per scale."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.adapters.sharing import SharedTensors
from adaptrt.adapters.variant import Adapter
from adaptrt.backends.base import Executable
from adaptrt.errors import AdapterError, UnknownAdapterError

Stack = Sequence[tuple[str, float]]  # (adapter name, scale) in stacking order


class AdapterSet:
    """Named adapters attached to one executable. Safe from several threads."""

    def __init__(self, executable: Executable, lower: Callable[[Adapter, float], LoweredAdapter]) -> None:
        self._executable = executable
        self._lower = lower
        self._adapters: dict[str, Adapter] = {}
        self._shared = SharedTensors()
        self._handles: dict[tuple[str, float], int] = {}
        self._in_use: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def loaded(self) -> Mapping[str, Adapter]:
        """Loaded adapters by name."""
        return dict(self._adapters)

    def add(self, name: str, adapter: Adapter) -> None:
        """Load an adapter under a name; attaching it at scale 1 now shows at once whether it fits."""
        with self._lock:
            if name in self._adapters:
                raise AdapterError(
                    f"adapter {name!r}: already loaded; unload it first or choose another name"
                )
            self._adapters[name] = self._shared.unite(adapter)
            try:
                self._attach(name, 1.0)
            except BaseException:
                del self._adapters[name]
                raise

    def remove(self, name: str) -> None:
        """Unload an adapter. Raises AdapterError while a generation uses it."""
        with self._lock:
            self._find(name)
            if self._in_use[name]:
                raise AdapterError(
                    f"adapter {name!r}: in use by a generation under way; finish or close it first"
                )
            for key in [key for key in self._handles if key[0] == name]:
                self._executable.detach(self._handles.pop(key))
            del self._adapters[name]

    @contextmanager
    def use(self, stack: Stack) -> Iterator[tuple[int, ...]]:
        """Handles of a stack, pinned until the block ends. An adapter at scale 0 has no effect and is left out."""
        stack = [(name, scale) for name, scale in stack if scale != 0]
        with self._lock:
            handles = tuple(self._attach(name, scale) for name, scale in stack)
            self._in_use.update(name for name, _ in stack)
        try:
            yield handles
        finally:
            with self._lock:
                self._in_use.subtract(name for name, _ in stack)

    def _attach(self, name: str, scale: float) -> int:
        key = (name, scale)
        if key not in self._handles:
            self._handles[key] = self._executable.attach(self._lower(self._find(name), scale))
        return self._handles[key]

    def _find(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UnknownAdapterError(f"adapter {name!r}: not loaded; loaded: {known}")
        return self._adapters[name]
