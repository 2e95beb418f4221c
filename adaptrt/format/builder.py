"""What writing a file and appending to one have in common: sections one after another, then the index."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from adaptrt.errors import FormatError
from adaptrt.format.disk import Disk
from adaptrt.format.header import PAGE, Slot
from adaptrt.format.index import Dead, Index, Section, TensorEntry, check_name, digest, parse, resolve
from adaptrt.format.reader import File, naming
from adaptrt.format.section import SectionWriter
from adaptrt.tensor import align

CHUNK = 8 << 20

Self = TypeVar("Self", bound="Builder")


class Builder(ABC):
    """A context manager that commits on a clean exit and leaves no trace otherwise.

    Raises FormatError with the path for anything that goes wrong on the disk.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._sections: dict[str, Section] = {}
        self._disk: Disk | None = None
        self._busy = False

    @contextmanager
    def section(
        self,
        name: str,
        *,
        kind: str,
        critical: bool = True,
        codec: str = "raw",
        metadata: Mapping[str, Any] | None = None,
    ) -> Iterator[SectionWriter]:
        """Write a section; an exception inside drops it. With codec "zstd" it is compressed if that pays."""
        with self._new(name) as disk:
            writer = SectionWriter(disk, name, kind, critical, codec, dict(metadata or {}))
            yield writer
            self._sections[name] = writer.finish()

    def copy_section(self, file: File, section: str, name: str | None = None) -> None:
        """Copy a section's stored bytes verbatim from an open file, perhaps under another name.

        Aliases into the section itself follow the new name; any other must lead to the same tensor here.
        """
        source = file.section(section)
        name = name or section
        check_name(name, "section")
        with self._new(name) as disk:
            offset = disk.position
            for start in range(0, source.stored_bytes, CHUNK):
                chunk = file.stored(source.offset + start, min(CHUNK, source.stored_bytes - start))
                disk.write(chunk.data)
            disk.pad(PAGE)
            tensors = {key: _renamed(entry, section, name) for key, entry in source.tensors.items()}
            self._sections[name] = replace(source, name=name, offset=offset, tensors=tensors)

    @contextmanager
    def _new(self, name: str) -> Iterator[Disk]:
        """Room for a section at the end of the file, given back when writing it fails."""
        if self._disk is None:
            raise FormatError(f"{self.path}: not open for writing, use it in a with statement")
        if self._busy:
            raise FormatError(f"{self.path}: section {name!r} begins before the last one is complete")
        if name in self._sections:
            raise FormatError(f"{self.path}: section {name!r} exists already")
        start = self._disk.position
        self._busy = True
        try:
            yield self._disk
        except BaseException:
            self._disk.truncate(start)
            raise
        finally:
            self._busy = False

    def _write_index(self, disk: Disk, generation: int, dead: tuple[Dead, ...]) -> tuple[Slot, bytes]:
        """Write the index after the sections, having read it back by the reader's own rules."""
        offset = disk.position
        with naming(self.path):
            index = Index(self.metadata, self._with_digests(), dead).dump()
            slot = Slot(generation, offset, len(index), align(offset + len(index), PAGE))
            slot.check(generation % 2)
            parse(index, offset)
        disk.write(index)
        disk.pad(PAGE)
        return slot, index

    def _with_digests(self) -> dict[str, Section]:
        sections = resolve(self._sections)
        for name, section in sections.items():
            found = digest(section.tensors.values())
            if section.digest not in ("", found):
                raise FormatError(
                    f"section {name!r}: its aliases lead to other tensors than where it came from"
                )
            sections[name] = replace(section, digest=found)
        return sections

    def __enter__(self: Self) -> Self:
        self._disk = self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        disk, self._disk = self._disk, None
        if disk is None:
            return
        try:
            if kind is None:
                self._commit(disk)
        except BaseException:
            self._discard(disk)
            raise
        else:
            if kind is not None:
                self._discard(disk)
        finally:
            disk.close()

    @abstractmethod
    def _begin(self) -> Disk:
        """Open and lock what is written to, positioned where the first section goes."""

    @abstractmethod
    def _commit(self, disk: Disk) -> None:
        """Make everything written so far the file's content."""

    @abstractmethod
    def _discard(self, disk: Disk) -> None:
        """Undo everything written so far."""


def _renamed(entry: TensorEntry, section: str, name: str) -> TensorEntry:
    if entry.alias and entry.alias[0] == section:
        return replace(entry, alias=(name, entry.alias[1]))
    return entry
