"""Change a file without moving a byte of it: new sections and a new index at the end, then the other slot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adaptrt.errors import MissingError
from adaptrt.format.builder import Builder
from adaptrt.format.disk import Disk
from adaptrt.format.header import PAGE, SLOT_OFFSETS
from adaptrt.format.index import Dead, Index
from adaptrt.format.reader import File, check_regular, naming, read
from adaptrt.tensor import align


class Appender(Builder):
    """Add and remove sections, edit metadata: one commit on a clean exit, nothing on an exception.

    Readers that have the file open keep what they see. Use it through `append`.
    """

    _file: File

    def remove(self, name: str) -> None:
        """Leave a section out of the new index; its bytes stay in the file. Raises MissingError."""
        if name not in self._sections:
            raise MissingError(f"{self.path}: no section {name!r}")
        del self._sections[name]

    def _begin(self) -> Disk:
        with naming(self.path):
            check_regular(self.path)
        disk = Disk(Path(os.path.realpath(self.path)), shown=self.path)
        try:
            with naming(self.path):
                self._file = read(self.path, disk.fd)
            self._go_to_end(disk)
        except BaseException:
            disk.close()
            raise
        self.metadata = self._file.metadata
        self._sections = dict(self._file.sections)
        return disk

    def _go_to_end(self, disk: Disk) -> None:
        """Stand after the committed bytes, dropping what an interrupted append left.

        With a damaged slot nobody knows how far the generation it held reached: then nothing is dropped.
        """
        if self._file.warnings:
            disk.position = self._file.size
            disk.pad(PAGE)
        else:
            disk.truncate(self._file.committed.slot.file_bytes)
        self._start = disk.position

    def _commit(self, disk: Disk) -> None:
        if Index(self.metadata, self._sections, self._file.dead).dump() == self._file.committed.index:
            return
        dead = (*self._file.dead, *(Dead(*gap, disk.sha256(*gap)) for gap in self._gaps(disk.position)))
        slot, index = self._write_index(disk, self._file.committed.slot.generation + 1, dead)
        disk.write_header(slot.pack(index), SLOT_OFFSETS[slot.number])

    def _gaps(self, end: int) -> Iterator[tuple[int, int]]:
        """Ranges (offset, bytes) that no section uses any more and that were not dead before."""
        extents = [(section.offset, section.stored_bytes) for section in self._sections.values()]
        extents += [(dead.offset, dead.bytes) for dead in self._file.dead]
        position = PAGE
        for offset, nbytes in sorted([*extents, (end, 0)]):
            if offset > position:
                yield position, offset - position
            position = align(offset + nbytes, PAGE)

    def _discard(self, disk: Disk) -> None:
        disk.truncate(self._start)


def append(path: str | os.PathLike[str]) -> Appender:
    """Open a file to add and remove sections, under an exclusive lock: `with append(path) as a: …`.

    Raises FormatError when the file is missing, broken or being written by another process.
    """
    return Appender(path)
