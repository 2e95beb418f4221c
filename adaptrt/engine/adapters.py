"""The adapters of one model: loaded by name, lowered and attached once per scale."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from adaptrt.adapters.invocation import acts_from, invocation_tokens
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.adapters.sharing import SharedTensors
from adaptrt.adapters.variant import Adapter, Progress, no_progress
from adaptrt.backends.base import Executable, prefetch
from adaptrt.errors import AdapterError, UnknownAdapterError

Stack = Sequence[tuple[str, float]]  # (adapter name, scale) in stacking order


class AdapterSet:
    """Named adapters attached to one executable. Safe from several threads."""

    def __init__(
        self, executable: Executable, lower: Callable[[Adapter, float, Progress], LoweredAdapter]
    ) -> None:
        self._executable = executable
        self._lower = lower
        self._adapters: dict[str, Adapter] = {}
        self._shared = SharedTensors()
        self._handles: dict[tuple[str, float], int] = {}
        self._invocations: dict[int, list[int]] = {}  # by handle
        self._in_use: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def loaded(self) -> Mapping[str, Adapter]:
        """Loaded adapters by name."""
        return dict(self._adapters)

    def add(self, name: str, adapter: Adapter, scale: float = 1.0, progress: Progress = no_progress) -> None:
        """Load an adapter under a name; attaching it now shows at once whether it fits. At scale 0 it is at 1."""
        with self._lock:
            if name in self._adapters:
                raise AdapterError(
                    f"adapter {name!r}: already loaded; unload it first or choose another name"
                )
            self._adapters[name] = self._shared.unite(adapter)
            try:
                self._attach(name, scale or 1.0, progress)
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
                handle = self._handles.pop(key)
                del self._invocations[handle]
                self._executable.detach(handle)
            del self._adapters[name]

    @contextmanager
    def use(self, stack: Stack) -> Iterator[tuple[int, ...]]:
        """Handles of a stack, pinned until the block ends. An adapter at scale 0 has no effect and is left out."""
        stack = [(name, scale) for name, scale in stack if scale != 0]
        with self._lock:
            handles = tuple(self._attach(name, scale) for name, scale in stack)
            self._in_use.update(name for name, _ in stack)
        try:
            prefetch(self._executable, handles)
            yield handles
        finally:
            with self._lock:
                self._in_use.subtract(name for name, _ in stack)

    def place(
        self, handles: Sequence[int], prompt_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The handles that act on what follows from this prompt, and the position from which each does."""
        places = {handle: acts_from(self._invocations[handle], prompt_ids) for handle in handles}
        acting = tuple(handle for handle in handles if places[handle] is not None)
        return acting, tuple(places[handle] or 0 for handle in acting)

    def _attach(self, name: str, scale: float, progress: Progress = no_progress) -> int:
        key = (name, scale)
        if key not in self._handles:
            adapter = self._find(name)
            handle = self._executable.attach(self._lower(adapter, scale, progress))
            self._handles[key], self._invocations[handle] = handle, invocation_tokens(adapter)
        return self._handles[key]

    def _find(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UnknownAdapterError(f"adapter {name!r}: not loaded; loaded: {known}")
        return self._adapters[name]
