"""Page 0: magic, version and the two slots that say where the newest and the previous index are.

0    "ADRT" | u32 version = 1 | zeros
64   slot 0 (even generations)     u64 generation | u64 index_offset | u64 index_bytes | u64 file_bytes
128  slot 1 (odd generations)      | SHA-256(those 32 bytes | SHA-256(index))
192  zeros up to 4096
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from adaptrt.errors import ChecksumError, FormatError, LimitError, NotAdrtError, TruncatedError, VersionError
from adaptrt.tensor import align

MAGIC = b"ADRT"
VERSION = 1
PAGE = 4096
SLOT_BYTES = 64
SLOT_OFFSETS = (64, 128)
MAX_INDEX_BYTES = 64 << 20
MAX_INTEGER = 1 << 63  # exclusive; generations, offsets and sizes fit a signed 64-bit integer
RESERVED = (slice(8, 64), slice(192, PAGE))

_SLOT = struct.Struct("<4Q32s")

ReadAt = Callable[[int, int], bytes]  # (offset, bytes) -> bytes, shorter at the end of the file


@dataclass(frozen=True)
class Slot:
    """One committed generation of the file."""

    generation: int
    index_offset: int
    index_bytes: int
    file_bytes: int

    @property
    def number(self) -> int:
        """Which of the two slots holds it."""
        return self.generation % 2

    def root(self, index: bytes) -> bytes:
        """SHA-256 that covers the slot's own fields and the index, and through the index every other byte."""
        fields = struct.pack("<4Q", self.generation, self.index_offset, self.index_bytes, self.file_bytes)
        return hashlib.sha256(fields + hashlib.sha256(index).digest()).digest()

    def check(self, number: int) -> None:
        """Refuse a slot whose fields contradict each other or its place. Raises FormatError."""
        if self.generation == 0 or self.number != number:
            raise FormatError(f"generation {self.generation} does not belong there")
        if max(self.generation, self.file_bytes) >= MAX_INTEGER:
            raise LimitError(
                f"generation {self.generation}, {self.file_bytes} bytes: expected less than 2^63"
            )
        if not 0 < self.index_bytes <= MAX_INDEX_BYTES:
            raise LimitError(f"index of {self.index_bytes} bytes, expected 1 to {MAX_INDEX_BYTES}")
        if self.index_offset < PAGE or self.index_offset % PAGE:
            raise FormatError(f"index at {self.index_offset}, expected a multiple of {PAGE} after the header")
        if self.file_bytes != align(self.index_offset + self.index_bytes, PAGE):
            raise FormatError(f"file of {self.file_bytes} bytes does not end with its index")

    def pack(self, index: bytes) -> bytes:
        """The slot's 64 bytes."""
        return _SLOT.pack(
            self.generation, self.index_offset, self.index_bytes, self.file_bytes, self.root(index)
        )


@dataclass(frozen=True)
class Committed:
    """The newest valid slot with its index, the other one if it is valid too, and what is wrong with them."""

    slot: Slot
    index: bytes
    previous: tuple[Slot, bytes] | None
    problems: tuple[str, ...]


def new_page(slot: Slot, index: bytes) -> bytes:
    """Page 0 of a file with its first generation."""
    page = bytearray(PAGE)
    page[:8] = MAGIC + struct.pack("<I", VERSION)
    at = SLOT_OFFSETS[slot.number]
    page[at : at + SLOT_BYTES] = slot.pack(index)
    return bytes(page)


def read_committed(read_at: ReadAt, size: int) -> Committed:
    """Pick the newest valid slot of a file of `size` bytes, falling back to the other one.

    Raises NotAdrtError, VersionError, TruncatedError, LimitError or ChecksumError.
    """
    page = read_at(0, PAGE)
    _check_start(page)
    found: list[tuple[Slot, bytes]] = []
    faults: list[FormatError] = []
    for number in (0, 1):
        try:
            entry = _read_slot(page, number, read_at, size)
        except FormatError as error:
            faults.append(error)
        else:
            found += [entry] if entry else []
    if not found:
        raise faults[0] if faults else FormatError("no index was ever committed")
    found.sort(key=lambda entry: entry[0].generation)
    slot, index = found[-1]
    previous = found[0] if len(found) == 2 else None
    problems = [f"{fault}; using generation {slot.generation}" for fault in faults]
    other = previous[0].generation if previous else 0
    if not faults and other != slot.generation - 1:
        problems.append(f"the slots hold generations {slot.generation} and {other}, expected neighbours")
    return Committed(slot, index, previous, tuple(problems))


def _check_start(page: bytes) -> None:
    if page[:4] != MAGIC:
        raise NotAdrtError(f"not an adrt file: starts with {page[:4]!r}, expected {MAGIC!r}")
    if len(page) < PAGE:
        raise TruncatedError(f"file of {len(page)} bytes is shorter than its header of {PAGE}")
    version = int.from_bytes(page[4:8], "little")
    if version != VERSION:
        raise VersionError(f"file is of format version {version}, this build reads {VERSION}")


def _read_slot(page: bytes, number: int, read_at: ReadAt, size: int) -> tuple[Slot, bytes] | None:
    raw = page[SLOT_OFFSETS[number] :][:SLOT_BYTES]
    if not any(raw):
        return None
    *fields, root = _SLOT.unpack(raw)
    slot = Slot(*fields)
    try:
        slot.check(number)
    except FormatError as error:
        raise type(error)(f"slot {number}: {error}") from error
    if slot.file_bytes > size:
        raise TruncatedError(f"slot {number}: file has {size} bytes, expected {slot.file_bytes}")
    index = read_at(slot.index_offset, slot.index_bytes)
    if slot.root(index) != root:
        raise ChecksumError(f"slot {number}: root digest of generation {slot.generation} does not match")
    return slot, index
