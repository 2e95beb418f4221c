"""Check every byte of a file: digests, padding, both slots, dead ranges, trailing bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptrt.errors import FormatError
from adaptrt.format.header import PAGE, RESERVED
from adaptrt.format.index import Section, TensorEntry, parse
from adaptrt.format.reader import File, open_file
from adaptrt.tensor import Int8Layout, Nf4Layout, align, rows_cols

Progress = Callable[[int, int], None]  # (bytes checked, bytes in all)
CHUNK = 8 << 20


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
    """Everything wrong with a file, one line each; empty when it is sound.

    Raises FormatError only when the file cannot be read at all (missing, no permission, not a regular file).
    """
    path = Path(path)
    try:
        file = open_file(path)
    except FormatError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return [str(error).removeprefix(f"{path}: ")]
    with file:
        return list(_Check(file, progress).problems())


class _Check:
    def __init__(self, file: File, progress: Progress | None) -> None:
        self.file = file
        self.progress = progress
        self.done = 0
        self.total = sum(section.bytes for section in file.sections.values())
        self.total += sum(dead.bytes for dead in file.dead)

    def problems(self) -> Iterator[str]:
        yield from self.file.warnings
        yield from self._outside()
        for section in self.file.sections.values():
            for problem in self._section(section):
                yield f"section {section.name!r}: {problem}"
        for dead in self.file.dead:
            if self._sha256(self.file.stored(dead.offset, dead.bytes)) != dead.sha256:
                yield f"dead range at {dead.offset} does not match its SHA-256"

    def _outside(self) -> Iterator[str]:
        """Header, index padding, the previous index and what lies after the committed bytes."""
        page = self.file.stored(0, PAGE)
        if any(page[part].any() for part in RESERVED):
            yield "reserved bytes of the header are not zero"
        slot = self.file.committed.slot
        end = slot.index_offset + slot.index_bytes
        if self.file.stored(end, slot.file_bytes - end).any():
            yield "padding after the index is not zero"
        if self.file.size > slot.file_bytes:
            extra = self.file.size - slot.file_bytes
            yield f"{extra} bytes after the committed {slot.file_bytes} (left by an interrupted append)"
        if self.file.committed.previous:
            previous, index = self.file.committed.previous
            try:
                parse(index, previous.index_offset)
            except FormatError as error:
                yield f"previous index: {error}"

    def _section(self, section: Section) -> Iterator[str]:
        end = section.offset + section.stored_bytes
        if self.file.stored(end, align(end, PAGE) - end).any():
            yield "padding after it is not zero"
        try:
            content = self.file.content(section.name)
        except FormatError as error:
            self._advance(section.bytes)
            yield str(error).removeprefix(f"{self.file.path}: section {section.name!r}: ")
            return
        for entry in section.tensors.values():
            if entry.alias is None:
                yield from self._tensor(entry, content)

    def _tensor(self, entry: TensorEntry, content: NDArray[np.uint8]) -> Iterator[str]:
        end = entry.offset + entry.nbytes
        data = content[entry.offset : end]
        if self._sha256(data) != entry.sha256:
            yield f"tensor {entry.name!r} does not match its SHA-256"
        if any(data[part].any() for part in _part_padding(entry)):
            yield f"tensor {entry.name!r}: padding between its parts is not zero"
        if content[end : align(end)].any():
            yield f"padding after tensor {entry.name!r} is not zero"
        self._advance(align(end) - end)

    def _sha256(self, data: NDArray[np.uint8]) -> str:
        digest = hashlib.sha256()
        for start in range(0, data.size, CHUNK):
            chunk = data[start : start + CHUNK]
            digest.update(chunk.data)
            self._advance(chunk.size)
        return digest.hexdigest()

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress and nbytes:
            self.progress(self.done, self.total)


def _part_padding(entry: TensorEntry) -> tuple[slice, ...]:
    """Where a quantized tensor has zeros between its parts."""
    if entry.dtype == "nf4":
        nf4 = Nf4Layout(prod(entry.shape))
        return (
            slice(nf4.code_bytes, nf4.absmax_offset),
            slice(nf4.absmax_offset + nf4.blocks, nf4.nested_offset),
        )
    if entry.dtype == "int8":
        int8 = Int8Layout(*rows_cols(entry.shape))
        return (slice(int8.rows * int8.cols, int8.scale_offset),)
    return ()
