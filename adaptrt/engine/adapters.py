"""The adapters of one model: loaded by name, lowered once, attached at every scale that is in use.

All scales of an adapter have its tensors in common, so one more takes next to nothing, and no time to speak of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from adaptrt.adapters.invocation import acts_from, invocation_tokens
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.adapters.sharing import SharedTensors
from adaptrt.adapters.stack import Base, at_scale, prepare
from adaptrt.adapters.variant import Adapter, Progress, Variant, no_progress
from adaptrt.backends.base import Executable, prefetch
from adaptrt.engine.lock import ForkableLock
from adaptrt.errors import AdapterError, ClosedError, UnknownAdapterError

Stack = Sequence[tuple[str, float]]  # (adapter name, scale) in stacking order
IDLE_SCALES = 4  # of an adapter, beside those in use, that stay attached


class AdapterSet:
    """Named adapters attached to one executable. Safe from several threads."""

    def __init__(self, executable: Executable, variants: Mapping[str, Variant], base: Base) -> None:
        self._executable = executable
        self._variants = variants
        self._base = base
        self._adapters: dict[str, Adapter] = {}
        self._prepared: dict[str, LoweredAdapter] = {}
        self._shared = SharedTensors()
        self._handles: dict[tuple[str, float], int] = {}  # the one longest unused first
        self._invocations: dict[int, list[int]] = {}  # by handle
        self._in_use: Counter[tuple[str, float]] = Counter()
        self._lock = ForkableLock()
        self._closed = False

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
            adapter = self._shared.unite(adapter)
            try:
                self._prepared[name] = prepare(adapter, self._variants, self._base, progress)
                self._adapters[name] = adapter
                self._attach(name, scale or 1.0, progress)
            except BaseException:
                self._prepared.pop(name, None)
                self._adapters.pop(name, None)
                raise

    def close(self) -> None:
        """Let go of every adapter. The executable is closed already, and naming one raises ClosedError from now on."""
        with self._lock:
            self._closed = True
            self._adapters.clear()
            self._prepared.clear()
            self._handles.clear()

    def remove(self, name: str) -> None:
        """Unload an adapter. Raises AdapterError while a generation uses it."""
        with self._lock:
            self._find(name)
            if any(used == name for used, _ in self._in_use):
                raise AdapterError(
                    f"adapter {name!r}: in use by a generation under way; finish or close it first"
                )
            for key in [key for key in self._handles if key[0] == name]:
                self._detach(key)
            del self._adapters[name], self._prepared[name]

    @contextmanager
    def use(self, stack: Stack) -> Iterator[tuple[int, ...]]:
        """Handles of a stack, pinned until the block ends. An adapter at scale 0 has no effect and is left out."""
        stack = [(name, scale) for name, scale in stack if scale != 0]
        with self._lock:
            self._in_use.update(stack)
        try:
            with self._lock:
                handles = tuple(self._attach(name, scale) for name, scale in stack)
            prefetch(self._executable, handles)
            yield handles
        finally:
            with self._lock:
                self._in_use -= Counter(stack)  # which forgets what falls to 0

    def place(
        self, handles: Sequence[int], prompt_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The handles that act on what follows from this prompt, and the position from which each does."""
        places = {handle: acts_from(self._invocations[handle], prompt_ids) for handle in handles}
        acting = tuple(handle for handle in handles if places[handle] is not None)
        return acting, tuple(places[handle] or 0 for handle in acting)

    def _attach(self, name: str, scale: float, progress: Progress = no_progress) -> int:
        key = (name, scale)
        handle = self._handles.pop(key, None)
        if handle is None:
            adapter = self._find(name)
            lowered = at_scale(adapter, self._prepared[name], self._variants, self._base, scale, progress)
            handle = self._executable.attach(lowered)
            self._invocations[handle] = invocation_tokens(adapter)
            self._let_go(name)
        self._handles[key] = handle
        return handle

    def _let_go(self, name: str) -> None:
        """Detach an adapter's scales that nobody uses, but for the last few."""
        idle = [key for key in self._handles if key[0] == name and key not in self._in_use]
        for key in idle[:-IDLE_SCALES]:
            self._detach(key)

    def _detach(self, key: tuple[str, float]) -> None:
        handle = self._handles.pop(key)
        del self._invocations[handle]
        self._executable.detach(handle)

    def _find(self, name: str) -> Adapter:
        if self._closed:
            raise ClosedError("the model is closed")
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UnknownAdapterError(f"adapter {name!r}: not loaded; loaded: {known}")
        return self._adapters[name]
