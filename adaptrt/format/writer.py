"""Write a whole file: into a temporary file beside it, header last, then rename."""

from __future__ import annotations

import os
from pathlib import Path

from adaptrt.errors import FormatError
from adaptrt.format.builder import Builder
from adaptrt.format.disk import Disk, move
from adaptrt.format.header import PAGE, new_page


class Writer(Builder):
    """Write a whole file; a clean exit replaces what was at `path`, an exception leaves it as it was."""

    def _begin(self) -> Disk:
        # A symbolic link stays one: what it leads to is replaced.
        target = Path(os.path.realpath(self.path))
        if target.exists() and not target.is_file():
            raise FormatError(f"{self.path}: not a regular file")
        # A fixed name: the next writer takes over what a killed one left, and the lock keeps two apart.
        disk = Disk(target.with_name(f".{target.name}.tmp"), shown=self.path, create=True)
        try:
            disk.truncate(0)
            disk.write(bytes(PAGE))
        except BaseException:
            self._discard(disk)
            disk.close()
            raise
        return disk

    def _commit(self, disk: Disk) -> None:
        slot, index = self._write_index(disk, generation=1, dead=())
        disk.write_header(new_page(slot, index), 0)
        move(disk.path, Path(os.path.realpath(self.path)))

    def _discard(self, disk: Disk) -> None:
        disk.path.unlink(missing_ok=True)
