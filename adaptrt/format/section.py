"""Write one section: tensor after tensor, hashed as they pass, compressed at the end if that pays."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.errors import FormatError
from adaptrt.format import codec as zstd
from adaptrt.format.canonical import check_metadata
from adaptrt.format.disk import Disk
from adaptrt.format.header import PAGE
from adaptrt.format.index import Section, TensorEntry, check_name, check_tensor
from adaptrt.tensor import Tensor, align, tensor_nbytes

Buffer = bytes | bytearray | memoryview | NDArray[Any]

_PADDING = bytes(64)


class TensorWriter:
    """Takes a tensor's bytes in chunks of any size."""

    def __init__(self, section: SectionWriter, what: str, nbytes: int) -> None:
        self._section = section
        self._what = what
        self.hash = hashlib.sha256()
        self.left = nbytes

    def write(self, chunk: Buffer) -> None:
        """Append bytes. Raises FormatError when the tensor would become longer than declared."""
        view = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        if len(view) > self.left:
            raise FormatError(f"{self._what} got {len(view) - self.left} bytes more than its shape needs")
        self._section.emit(view)
        self.hash.update(view)
        self.left -= len(view)


class SectionWriter:
    """An open section. `metadata` may be edited until it closes; use it through `Writer.section`.

    A raw section goes straight to the disk; one that may be compressed is collected in memory first.
    """

    def __init__(
        self, disk: Disk, name: str, kind: str, critical: bool, codec: str, metadata: dict[str, Any]
    ) -> None:
        if codec not in ("raw", "zstd"):
            raise FormatError(f"section {name!r}: codec is {codec!r}, expected raw or zstd")
        check_name(name, "section")
        check_name(kind, f"section {name!r}: kind")
        self.name, self.kind, self.critical, self.codec = name, kind, critical, codec
        self.metadata = metadata
        self._disk = disk
        self._offset = disk.position
        self._tensors: dict[str, TensorEntry] = {}
        self._content = bytearray()
        self._size = 0
        self._streaming = False

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. Raises FormatError for a name that is taken or breaks a limit."""
        with self.stream(name, tensor.dtype, tensor.shape) as out:
            out.write(tensor.data)

    @contextmanager
    def stream(self, name: str, dtype: str, shape: Sequence[int]) -> Iterator[TensorWriter]:
        """Write a tensor in chunks; raises FormatError unless they add up to its size."""
        what = f"section {self.name!r}: tensor {name!r}"
        entry = TensorEntry(name, dtype, tuple(shape), "", self._size)
        check_tensor(entry, f"section {self.name!r}")
        self._check_free(name)
        out = TensorWriter(self, what, tensor_nbytes(dtype, entry.shape))
        self._streaming = True
        yield out
        if out.left:
            raise FormatError(f"{what} is {out.left} bytes short of the {entry.nbytes} its shape needs")
        self._streaming = False
        self.emit(memoryview(_PADDING)[: align(self._size) - self._size])
        self._tensors[name] = TensorEntry(name, dtype, entry.shape, out.hash.hexdigest(), entry.offset)

    def alias(self, name: str, target: tuple[str, str]) -> None:
        """Make `name` another name of the tensor `target` = (section, tensor); checked at the commit."""
        check_name(name, f"section {self.name!r}: alias")
        self._check_free(name)
        self._tensors[name] = TensorEntry(name, "u8", (0,), "", 0, alias=(target[0], target[1]))

    def emit(self, view: memoryview) -> None:
        """Take the next bytes of the section's content."""
        if self.codec == "raw":
            self._disk.write(view)
        else:
            self._content += view
        self._size += len(view)

    def finish(self) -> Section:
        """Close the section on the disk."""
        check_metadata(self.metadata, f"section {self.name!r}")
        if self._streaming:
            raise FormatError(f"section {self.name!r}: a tensor is still being written")
        packed = self._compress() if self.codec == "zstd" else {"codec": "raw", "stored_bytes": self._size}
        self._disk.pad(PAGE)
        return Section(
            name=self.name,
            kind=self.kind,
            critical=self.critical,
            offset=self._offset,
            bytes=self._size,
            metadata=self.metadata,
            tensors=self._tensors,
            **packed,
        )

    def _compress(self) -> dict[str, Any]:
        planes = zstd.choose_planes(
            [(entry.dtype, entry.nbytes) for entry in self._tensors.values() if not entry.alias]
        )
        frames = zstd.compress(np.frombuffer(self._content, np.uint8), planes)
        stored = b"".join(frames)
        if not zstd.pays(self._size, len(stored), PAGE):
            self._disk.write(self._content)
            return {"codec": "raw", "stored_bytes": self._size}
        self._disk.write(stored)
        return {
            "codec": "zstd",
            "stored_bytes": len(stored),
            "planes": planes,
            "frames": tuple(len(frame) for frame in frames),
            "stored_crc32": zlib.crc32(stored),
        }

    def _check_free(self, name: str) -> None:
        if name in self._tensors:
            raise FormatError(f"section {self.name!r}: tensor {name!r} is written twice")
        if self._streaming:
            raise FormatError(
                f"section {self.name!r}: tensor {name!r} begins before the last one is complete"
            )
