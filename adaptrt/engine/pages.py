"""The paged KV cache's bookkeeping: which pages are free."""

from __future__ import annotations

from collections.abc import Callable

from adaptrt.engine.lock import ForkableLock


class PagePool:
    """Hands out page numbers, growing the cache through `reserve` when none is free. Safe from several threads."""

    GROWTH = 8  # pages; growing one at a time would cost a native call per page

    def __init__(self, reserve: Callable[[int], None], page_tokens: int) -> None:
        self._reserve = reserve
        self.page_tokens = page_tokens
        self._free: list[int] = []
        self._size = 0
        self._lock = ForkableLock()

    def needed(self, n_tokens: int) -> int:
        """Pages that hold n_tokens."""
        return -(-n_tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """`count` pages; raises BackendError when memory is short, taking none."""
        with self._lock:
            if count > len(self._free):
                grown = self._size + max(count - len(self._free), min(self.GROWTH, self._size + 1))
                self._reserve(grown)
                self._free += range(grown - 1, self._size - 1, -1)
                self._size = grown
            return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Return pages; their contents may be overwritten from now on."""
        with self._lock:
            self._free += reversed(pages)
