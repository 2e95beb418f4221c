"""A locked file that grows front to back. Every OSError becomes a FormatError that names the path."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from adaptrt.errors import FormatError
from adaptrt.format.reader import naming
from adaptrt.tensor import align

_ZEROS = bytes(4096)
_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)


class Disk:
    """The file at `path`, opened and exclusively locked; `position` is where the next write goes.

    `shown` is the name that messages use: users know no temporary file.
    """

    def __init__(self, path: Path, shown: Path, create: bool = False) -> None:
        self.path, self.shown = path, shown
        self.position = 0
        with naming(shown):
            self.fd = _open_locked(path, _FLAGS | (os.O_CREAT if create else 0))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write at `position` and move it."""
        with naming(self.shown):
            self.position = _write_at(self.fd, data, self.position)

    def pad(self, alignment: int) -> None:
        """Write zeros up to a multiple of `alignment`, 4096 at most."""
        self.write(_ZEROS[: align(self.position, alignment) - self.position])

    def write_header(self, data: bytes, offset: int) -> None:
        """Write into page 0 once everything before is on the disk, and wait until this is too."""
        with naming(self.shown):
            os.fsync(self.fd)
            _write_at(self.fd, data, offset)
            os.fsync(self.fd)

    def truncate(self, position: int) -> None:
        """Drop everything from `position` on; the caller knows that no reader has it mapped."""
        with naming(self.shown):
            os.ftruncate(self.fd, position)
        self.position = position

    def sha256(self, offset: int, nbytes: int) -> str:
        """SHA-256 of bytes that lie in the file, in hex."""
        digest = hashlib.sha256()
        with naming(self.shown):
            os.lseek(self.fd, offset, os.SEEK_SET)
            while nbytes and (chunk := os.read(self.fd, min(nbytes, 1 << 20))):
                digest.update(chunk)
                nbytes -= len(chunk)
        return digest.hexdigest()

    def close(self) -> None:
        """Release the lock and the file."""
        _lock(self.fd, release=True)  # by name: a map of the file holds a duplicate of the descriptor
        os.close(self.fd)


def move(temporary: Path, path: Path) -> None:
    """Put a finished file in its place, durably."""
    with naming(path):
        temporary.replace(path)
        if sys.platform != "win32":  # there a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _write_at(fd: int, data: bytes | bytearray | memoryview, position: int) -> int:
    os.lseek(fd, position, os.SEEK_SET)
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    return position + len(data)


def _open_locked(path: Path, flags: int) -> int:
    while True:
        fd = os.open(path, flags, 0o666)
        try:
            _lock(fd)
            # Between opening and locking, the lock's last holder may have renamed or removed this very file.
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, release: bool = False) -> None:
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(fd, fcntl.LOCK_UN if release else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FormatError("another process is writing this file") from None
