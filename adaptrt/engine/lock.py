"""A lock that survives a fork."""

from __future__ import annotations

import os
import threading


class ForkableLock:
    """A re-entrant lock that a forked child finds free: who held it is a thread that the child does not have.

    What it guarded may then be half changed; the backend's call, which refuses to work in a child, says so.
    """

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._lock, self._process = threading.RLock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
