"""A strict, streaming reader of safetensors files (https://github.com/huggingface/safetensors#format).

    u64 header length | JSON {name: {dtype, shape, data_offsets}, "__metadata__"?: {str: str}} | data

Files are read in pieces into one reused buffer, never mapped: resident memory does not grow with the file.
Every rule is checked before a byte of data is read; an offence is one ConvertError naming the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from adaptrt.convert.files import open_regular, parse_object, read_exactly, read_json, shown
from adaptrt.errors import ConvertError
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

HEADER_LIMIT = 1 << 24  # bytes; published headers reach a few MB, and parsed JSON takes ~30 times its text
INDEX_LIMIT = 1 << 26  # bytes; an index holds one short line a tensor
DIMS_LIMIT = 8
DIM_LIMIT = 1 << 40  # keeps the product of 8 dimensions a small integer
CHUNK_BYTES = 1 << 22

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
FLOATS = ("f32", "f16", "bf16")
KNOWN = (*FLOATS, "u8", "i32")  # the dtypes adaptrt.tensor has


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: `begin` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """An open, fully checked safetensors file; data is read when asked for. One thread at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file, size = open_regular(self.path)
        try:
            self.metadata, self._entries = _read_header(self._file, self.path, size)
        except BaseException:
            self._file.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of their data."""
        return tuple(self._entries)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape); the dtype in lower case: `f32`, `bf16`, `i64`. Raises ConvertError."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its stored dtype, i16 as i32. Raises ConvertError for a dtype that adaptrt has not."""
        entry = self._entry(name)
        if entry.dtype == "i16":
            narrow = np.empty(entry.nbytes // 2, np.int16)
            self._read(entry.begin, narrow.view(np.uint8))
            return Tensor.from_numpy(narrow.astype(np.int32).reshape(entry.shape))
        if entry.dtype not in KNOWN:
            raise self._dtype_error(name, entry, KNOWN)
        data = np.empty(entry.nbytes, np.uint8)
        self._read(entry.begin, data)
        return Tensor(entry.dtype, entry.shape, data)

    def chunks(self, name: str, max_elements: int = CHUNK_BYTES // 4) -> Iterator[NDArray[np.float32]]:
        """The flattened tensor as float32 pieces of at most `max_elements`; each is overwritten by the next.

        Raises ConvertError for a dtype other than f32, f16 and bf16: f64 would be rounded silently.
        """
        entry = self._entry(name)
        if entry.dtype not in FLOATS:
            raise self._dtype_error(name, entry, FLOATS)
        item = ITEM_BYTES[entry.dtype.upper()]
        for piece in self.raw_chunks(name, max_elements * item):
            yield to_float32(Tensor(entry.dtype, (piece.size // item,), piece))

    def raw_chunks(self, name: str, max_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes in pieces of at most `max_bytes`; each is overwritten by the next."""
        entry = self._entry(name)
        buffer = np.empty(min(entry.nbytes, max_bytes), np.uint8)
        for start in range(0, entry.nbytes, max_bytes):
            piece = buffer[: min(max_bytes, entry.nbytes - start)]
            self._read(entry.begin + start, piece)
            yield piece

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored."""
        return self._entry(name).nbytes

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ConvertError(
                f"{self.path}: no tensor {shown(name)}, the file has {len(self._entries)} others"
            )
        return self._entries[name]

    def _read(self, offset: int, out: NDArray[np.uint8]) -> None:
        self._file.seek(offset)
        read_exactly(self._file, out.data, self.path)

    def _dtype_error(self, name: str, entry: _Entry, expected: tuple[str, ...]) -> ConvertError:
        return ConvertError(
            f"{self.path}: tensor {shown(name)} has dtype {entry.dtype}, expected {', '.join(expected)}"
        )


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Open and check one safetensors file. Raises ConvertError naming what was found and expected."""
    return SafetensorsFile(path)


class Checkpoint:
    """The safetensors files of a folder, seen as one; the same interface as SafetensorsFile.

    Either `model.safetensors` or the shards that `model.safetensors.index.json` lists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: list[SafetensorsFile] = []
        self._owner: dict[str, SafetensorsFile] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, shard by shard in the order of their data."""
        return tuple(self._owner)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """See SafetensorsFile.info."""
        return self._file(name).info(name)

    def tensor(self, name: str) -> Tensor:
        """See SafetensorsFile.tensor."""
        return self._file(name).tensor(name)

    def chunks(self, name: str, max_elements: int = CHUNK_BYTES // 4) -> Iterator[NDArray[np.float32]]:
        """See SafetensorsFile.chunks."""
        return self._file(name).chunks(name, max_elements)

    def raw_chunks(self, name: str, max_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.uint8]]:
        """See SafetensorsFile.raw_chunks."""
        return self._file(name).raw_chunks(name, max_bytes)

    def nbytes(self, name: str) -> int:
        """See SafetensorsFile.nbytes."""
        return self._file(name).nbytes(name)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def close(self) -> None:
        """Close every shard; safe to call twice."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._owner:
            raise ConvertError(f"{self.folder}: no tensor {shown(name)} in the checkpoint")
        return self._owner[name]

    def _open(self) -> None:
        index_path = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if single.exists() or not index_path.exists():
            if not single.exists() and (pickled := sorted(self.folder.glob("pytorch_model*.bin"))):
                raise ConvertError(
                    f"{self.folder}: has {pickled[0].name}, a pickle, which may run code; load it in transformers "
                    f"once and save it with save_pretrained(…) to get {single.name}"
                )
            self._take(SafetensorsFile(single))
            return
        listed = _read_index(index_path)
        for shard in sorted(set(listed.values())):
            if not (self.folder / shard).exists():
                raise ConvertError(f"{self.folder}: shard {shard} is missing, {index_path.name} lists it")
            self._take(SafetensorsFile(self.folder / shard))
        self._compare_with_index(listed, index_path)

    def _take(self, file: SafetensorsFile) -> None:
        self._files.append(file)
        for name in file.names:
            if name in self._owner:
                both = f"{self._owner[name].path.name} and {file.path.name}"
                raise ConvertError(f"{self.folder}: tensor {shown(name)} is in both {both}, expected one")
            self._owner[name] = file

    def _compare_with_index(self, listed: dict[str, str], index_path: Path) -> None:
        for name, shard in listed.items():
            if name not in self._owner or self._owner[name].path.name != shard:
                raise ConvertError(
                    f"{index_path}: tensor {shown(name)} is not in {shard}, where the index has it"
                )
        for name in self._owner:
            if name not in listed:
                raise ConvertError(
                    f"{index_path}: tensor {shown(name)} of {self._owner[name].path.name} is not in the index"
                )


def same_bytes(source: SafetensorsFile | Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors have the same dtype, shape and content."""
    if source.info(one) != source.info(other):
        return False
    pairs = zip(source.raw_chunks(one), source.raw_chunks(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _read_header(file: FileIO, path: Path, size: int) -> tuple[dict[str, str], dict[str, _Entry]]:
    if size < 8:
        raise ConvertError(f"{path}: truncated, {size} bytes are too few for a safetensors file")
    prefix = bytearray(8)
    read_exactly(file, memoryview(prefix), path)
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT:
        raise ConvertError(f"{path}: header of {length} bytes, expected at most {HEADER_LIMIT}")
    if length > size - 8:
        raise ConvertError(f"{path}: truncated, header of {length} bytes in a file of {size}")
    text = bytearray(length)
    read_exactly(file, memoryview(text), path)
    if not text.startswith(b"{"):
        raise ConvertError(f"{path}: header starts with {bytes(text[:1])!r}, expected '{{'")
    header = parse_object(bytes(text), f"{path}: header")
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    return metadata, _check_coverage(entries, path, 8 + length, size)


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ConvertError(f"{path}: __metadata__ must map strings to strings")
    return value


def _entry(path: Path, name: str, value: object, data_start: int) -> _Entry:
    """One tensor's record with every field checked against the others."""
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ConvertError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ConvertError(f"{where} has unknown dtype {shown(dtype)}")
    if not _whole_numbers(shape) or len(shape) > DIMS_LIMIT:
        raise ConvertError(f"{where} has a bad shape, expected at most {DIMS_LIMIT} whole numbers up to 2^40")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConvertError(f"{where} has bad data_offsets, expected [begin, end] up to 2^40")
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        found = offsets[1] - offsets[0]
        raise ConvertError(f"{where} of shape {shape}, dtype {dtype}, spans {found} bytes, expected {nbytes}")
    return _Entry(dtype.lower(), tuple(shape), data_start + offsets[0], nbytes)


def _whole_numbers(value: object) -> bool:
    """Whether this is a list of plain non-negative integers within the limit (True is no number here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= DIM_LIMIT for item in value)


def _check_coverage(entries: dict[str, _Entry], path: Path, data_start: int, size: int) -> dict[str, _Entry]:
    """The entries in data order, once they tile the file: no hole, no overlap, nothing left over."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes))
    end = data_start
    for name, entry in ordered:
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
            raise ConvertError(
                f"{path}: tensor {shown(name)} {what}: it begins at {entry.begin - data_start} of the data, "
                f"expected {end - data_start}"
            )
        end += entry.nbytes
    if end != size:
        what = "truncated" if size < end else "trailing bytes"
        raise ConvertError(f"{path}: {what}, the file has {size} bytes, expected {end}")
    return dict(ordered)


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map, with every shard name checked to be a plain file name."""
    weight_map = read_json(path, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{path}: weight_map must map tensor names to shard files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or not _plain_name(shard):
            found = f"tensor {shown(name)} is in {shown(shard)}"
            raise ConvertError(f"{path}: {found}, expected a .safetensors file of this folder")
    return weight_map


def _plain_name(name: str) -> bool:
    return not any(mark in name for mark in ("/", "\\", "\0", ":")) and name not in (".", "..")
