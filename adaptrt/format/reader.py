"""Open a file: map its committed bytes, check its index, hand out tensors without copying."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.errors import ClosedError, FormatError, MissingError
from adaptrt.format import codec
from adaptrt.format.header import Committed, read_committed
from adaptrt.format.index import Index, Section, parse
from adaptrt.tensor import Tensor


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of format errors and turn OSError into one."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from error


def check_regular(path: Path) -> None:
    """Refuse what is no regular file before opening it: opening a pipe would block. Raises OSError."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError("is a folder, expected an .adrt file ('adaptrt convert' makes one of a model folder)")
    if not stat.S_ISREG(mode):
        raise OSError("not a regular file")


class File:
    """An open `.adrt` file: metadata, sections and tensors of its newest committed generation.

    Tensors of raw sections are views into the map and stay valid after `close()`; a compressed section is
    decompressed on first use and kept. `warnings` tells of damage that did not prevent opening.
    """

    def __init__(
        self, path: Path, size: int, committed: Committed, index: Index, view: NDArray[np.uint8]
    ) -> None:
        self.path = path
        self.size = size  # on disk, with any torn bytes after the committed ones
        self.committed = committed
        self.metadata: dict[str, Any] = index.metadata
        self.sections: dict[str, Section] = index.sections
        self.dead = index.dead
        self.warnings: list[str] = list(committed.problems)
        self._view: NDArray[np.uint8] | None = view
        self._contents: dict[str, NDArray[np.uint8]] = {}
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def stored(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the file as they lie in it, without a copy."""
        if self._view is None:
            raise ClosedError(f"{self.path}: used after close()")
        return self._view[offset : offset + nbytes]

    def section(self, name: str) -> Section:
        """The section of that name. Raises MissingError."""
        if name not in self.sections:
            raise MissingError(f"{self.path}: no section {name!r}")
        return self.sections[name]

    def content(self, name: str) -> NDArray[np.uint8]:
        """The uncompressed bytes of a section. Raises FormatError when compressed bytes are damaged."""
        section = self.section(name)
        stored = self.stored(section.offset, section.stored_bytes)
        if section.codec == "raw":
            return stored
        if name not in self._contents:
            try:
                content = codec.decompress(
                    stored, section.frames, section.bytes, section.planes, section.stored_crc32
                )
            except FormatError as error:
                raise type(error)(f"{self.path}: section {name!r}: {error}") from error
            content.flags.writeable = False
            self._contents[name] = content
        return self._contents[name]

    def tensor(self, section: str, name: str) -> Tensor:
        """A tensor by name; an alias gives the very object of its target. Raises MissingError."""
        entry = self.section(section).tensors.get(name)
        if entry is None:
            raise MissingError(f"{self.path}: section {section!r} has no tensor {name!r}")
        key = entry.alias or (section, name)
        if key not in self._tensors:
            data = self.content(key[0])[entry.offset : entry.offset + entry.nbytes]
            self._tensors[key] = Tensor(entry.dtype, entry.shape, data)
        return self._tensors[key]

    def read_section(self, name: str) -> dict[str, Tensor]:
        """All tensors of a section by name."""
        return {tensor: self.tensor(name, tensor) for tensor in self.section(name).tensors}

    def close(self) -> None:
        """Let go of the map; it goes away with the last tensor that points into it."""
        self._view = None
        self._contents.clear()
        self._tensors.clear()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_file(path: str | os.PathLike[str]) -> File:
    """Map an `.adrt` file and check its header and index; contents are checked by `verify`.

    Raises FormatError or a subclass, with the path in front, also when the file is missing or unreadable.
    """
    path = Path(path)
    with naming(path):
        check_regular(path)
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        try:
            return read(path, fd)
        finally:
            os.close(fd)


def read(path: Path, fd: int) -> File:
    """Map the file open at `fd`, which may be closed afterwards."""
    size = os.fstat(fd).st_size

    def read_at(offset: int, nbytes: int) -> bytes:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)

    committed = read_committed(read_at, size)
    index = parse(committed.index, committed.slot.index_offset)
    mapped = mmap.mmap(fd, committed.slot.file_bytes, access=mmap.ACCESS_READ)
    if sys.platform == "linux":
        with suppress(
            OSError
        ):  # what is not cached yet is read as 2 MiB pages: faster to fault in and to stream
            mapped.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(mapped, np.uint8)
    return File(path, size, committed, index, view)
