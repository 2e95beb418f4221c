"""The index: every section and tensor of the file, parsed strictly; spec/format.md states each rule."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from adaptrt.errors import ChecksumError, FormatError, LimitError, TruncatedError
from adaptrt.format import canonical
from adaptrt.format.codec import FRAME_BYTES, MAX_RATIO, PLANES
from adaptrt.format.header import MAX_INTEGER, PAGE
from adaptrt.tensor import align, tensor_nbytes

KINDS = ("base", "tokenizer", "adapter")
MAX_NAME_BYTES = 256
MAX_DIMS = 4
MAX_DIM = 1 << 40  # exclusive
MAX_SECTIONS = 1 << 16
MAX_TENSORS = 1 << 20  # of all sections together
MAX_DEAD = 1 << 20

_DIGEST = re.compile("[0-9a-f]{64}")
_INDEX: Mapping[str, type] = {"dead": list, "metadata": dict, "sections": list}
_DEAD: Mapping[str, type] = {"bytes": int, "offset": int, "sha256": str}
_RAW: Mapping[str, type] = {
    "name": str,
    "kind": str,
    "critical": bool,
    "codec": str,
    "offset": int,
    "bytes": int,
    "digest": str,
    "metadata": dict,
    "tensors": list,
}
_ZSTD: Mapping[str, type] = {
    **_RAW,
    "stored_bytes": int,
    "planes": int,
    "frames": list,
    "stored_crc32": int,
}
_SECTION: Mapping[str, Mapping[str, type]] = {"raw": _RAW, "zstd": _ZSTD}
_TENSOR: Mapping[str, type] = {"name": str, "dtype": str, "shape": list, "offset": int, "sha256": str}
_ALIAS: Mapping[str, type] = {"name": str, "alias": list}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the index. `offset` counts from the start of the uncompressed section.

    An alias (`alias` = section and tensor that hold the bytes) has its target's other fields.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    offset: int
    alias: tuple[str, str] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, all parts and the padding between them."""
        return tensor_nbytes(self.dtype, self.shape)

    def to_json(self) -> dict[str, Any]:
        """The entry as the index stores it."""
        if self.alias:
            return {"name": self.name, "alias": list(self.alias)}
        return {key: getattr(self, key) for key in _TENSOR}


@dataclass(frozen=True)
class Section:
    """Named tensors stored together: `bytes` of content, which take `stored_bytes` in the file."""

    name: str
    kind: str
    critical: bool
    codec: str
    offset: int
    bytes: int
    stored_bytes: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    digest: str = ""
    planes: int = 1
    frames: tuple[int, ...] = ()
    stored_crc32: int = 0

    def to_json(self) -> dict[str, Any]:
        """The section as the index stores it."""
        fields = {key: getattr(self, key) for key in _SECTION[self.codec]}
        return {**fields, "tensors": [entry.to_json() for entry in self.tensors.values()]}


@dataclass(frozen=True)
class Dead:
    """Bytes that no section uses any more: an index that was replaced or a section that was removed."""

    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """Everything the file holds. Build one with `parse` or check a new one by parsing its own `dump`."""

    metadata: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Section] = field(default_factory=dict)
    dead: tuple[Dead, ...] = ()

    def dump(self) -> bytes:
        """The index as canonical JSON."""
        return canonical.dumps(
            {
                "metadata": self.metadata,
                "sections": [section.to_json() for section in self.sections.values()],
                "dead": [vars(dead) for dead in self.dead],
            }
        )


def digest(tensors: Iterable[TensorEntry]) -> str:
    """A section's digest: names, dtypes, shapes and contents, whatever the layout, order and compression."""
    listed = sorted([entry.name, entry.dtype, list(entry.shape), entry.sha256] for entry in tensors)
    return hashlib.sha256(canonical.dumps(listed)).hexdigest()


def resolve(sections: dict[str, Section]) -> dict[str, Section]:
    """Give every alias its target's dtype, shape, sha256 and offset.

    Raises FormatError for a target that is missing or itself an alias: chains and cycles cannot exist.
    """
    return {
        name: replace(section, tensors=_resolved(section, sections)) for name, section in sections.items()
    }


def _resolved(section: Section, sections: dict[str, Section]) -> dict[str, TensorEntry]:
    tensors = dict(section.tensors)
    for entry in section.tensors.values():
        if entry.alias is None:
            continue
        holder = sections.get(entry.alias[0])
        target = holder.tensors.get(entry.alias[1]) if holder else None
        if target is None or target.alias:
            what = f"section {section.name!r}: alias {entry.name!r}"
            found = "an alias itself" if target else "missing"
            raise FormatError(f"{what} leads to {list(entry.alias)}, which is {found}")
        tensors[entry.name] = replace(target, name=entry.name, alias=entry.alias)
    return tensors


def parse(text: bytes, index_offset: int) -> Index:
    """Parse and check an index that lies at `index_offset`; nothing is allocated by what it declares.

    Raises FormatError, LimitError, TruncatedError or ChecksumError naming the section and tensor.
    """
    tree = _fields(canonical.loads(text), _INDEX, "index")
    canonical.check_metadata(tree["metadata"], "file")
    if len(tree["sections"]) > MAX_SECTIONS or len(tree["dead"]) > MAX_DEAD:
        raise LimitError(f"index lists more than {MAX_SECTIONS} sections or {MAX_DEAD} dead ranges")
    sections = _unique((_section(item, index_offset) for item in tree["sections"]), "section")
    if sum(len(section.tensors) for section in sections.values()) > MAX_TENSORS:
        raise LimitError(f"index lists more than {MAX_TENSORS} tensors")
    dead = tuple(Dead(**_checked(item, _DEAD, "dead range")) for item in tree["dead"])
    _check_coverage(sections.values(), dead, index_offset)
    sections = resolve(sections)
    for section in sections.values():
        if digest(section.tensors.values()) != section.digest:
            raise ChecksumError(f"section {section.name!r}: digest does not match its list of tensors")
    return Index(tree["metadata"], sections, dead)


def check_name(name: str, what: str) -> None:
    """Refuse an empty name, one that is too long and one that UTF-8 cannot hold."""
    size = len(name.encode(errors="surrogatepass"))
    if not 0 < size <= MAX_NAME_BYTES:
        raise LimitError(f"{what} name has {size} bytes, expected 1 to {MAX_NAME_BYTES}")


def check_tensor(entry: TensorEntry, what: str) -> None:
    """Refuse a tensor whose name, dtype or shape breaks a limit."""
    check_name(entry.name, f"{what}: tensor")
    what = f"{what}: tensor {entry.name!r}"
    if len(entry.shape) > MAX_DIMS:
        raise LimitError(f"{what} has {len(entry.shape)} dimensions, expected {MAX_DIMS} at most")
    if any(type(dim) is not int or not 0 <= dim < MAX_DIM for dim in entry.shape):
        raise LimitError(f"{what} has a dimension that is no integer from 0 to {MAX_DIM - 1}")
    if prod(entry.shape) >= MAX_INTEGER:
        raise LimitError(f"{what} has 2^63 elements or more")
    try:
        nbytes = entry.nbytes
    except ValueError as error:
        raise FormatError(f"{what}: {error}") from error
    if nbytes >= MAX_INTEGER:
        raise LimitError(f"{what} has 2^63 bytes or more")


def _fields(value: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    if type(value) is not dict or value.keys() != types.keys():
        found = sorted(value)[:12] if type(value) is dict else type(value).__name__
        raise FormatError(f"{what} has fields {str(found)[:300]}, expected {sorted(types)}")
    for key, expected in types.items():
        if type(value[key]) is not expected:
            raise FormatError(f"{what}: {key} is {type(value[key]).__name__}, expected {expected.__name__}")
        if expected is int and not 0 <= value[key] < MAX_INTEGER:
            raise LimitError(f"{what}: {key} is {value[key]}, expected 0 to 2^63 - 1")
    return value


def _checked(value: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    fields = _fields(value, types, what)
    for key in ("sha256", "digest"):
        if key in fields and not _DIGEST.fullmatch(fields[key]):
            raise FormatError(f"{what}: {key} is {fields[key][:80]!r}, expected 64 lower-case hex digits")
    return fields


def _unique(items: Iterable[Any], what: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for item in items:
        if item.name in named:
            raise FormatError(f"{what} {item.name!r} is listed twice")
        named[item.name] = item
    return named


def _section(value: Any, index_offset: int) -> Section:
    codec = value.get("codec") if type(value) is dict else None
    if not isinstance(codec, str) or codec not in _SECTION:
        raise FormatError(f"section has codec {str(codec)[:80]!r}, expected one of {', '.join(_SECTION)}")
    fields = _checked(value, _SECTION[codec], "section")
    check_name(fields["name"], "section")
    what = f"section {fields['name']!r}"
    check_name(fields["kind"], f"{what}: kind")
    if fields["critical"] and fields["kind"] not in KINDS:
        raise FormatError(
            f"{what} is of unknown critical kind {fields['kind']!r}, expected {', '.join(KINDS)}"
        )
    canonical.check_metadata(fields["metadata"], what)
    if codec == "zstd":
        fields["frames"] = _check_frames(fields, what)
    fields.setdefault("stored_bytes", fields["bytes"])
    if fields["offset"] % PAGE or fields["offset"] < PAGE:
        raise FormatError(
            f"{what} starts at {fields['offset']}, expected a multiple of {PAGE} after the header"
        )
    if fields["offset"] + fields["stored_bytes"] > index_offset:
        end = fields["offset"] + fields["stored_bytes"]
        raise TruncatedError(f"{what} ends at {end}, expected {index_offset} at most, where the index starts")
    if len(fields["tensors"]) > MAX_TENSORS:
        raise LimitError(f"{what} lists more than {MAX_TENSORS} tensors")
    tensors = _unique((_tensor(item, what) for item in fields["tensors"]), f"{what}: tensor")
    _check_layout(tensors.values(), fields["bytes"], what)
    return Section(**{**fields, "tensors": tensors})


def _check_frames(fields: dict[str, Any], what: str) -> tuple[int, ...]:
    frames, nbytes, stored = fields["frames"], fields["bytes"], fields["stored_bytes"]
    if fields["planes"] not in PLANES:
        raise FormatError(f"{what}: planes is {fields['planes']}, expected 1, 2 or 4")
    if fields["stored_crc32"] >= 1 << 32:
        raise LimitError(f"{what}: stored_crc32 is {fields['stored_crc32']}, expected 32 bits")
    if any(type(size) is not int or not 0 < size < MAX_INTEGER for size in frames) or sum(frames) != stored:
        raise FormatError(f"{what}: frame sizes do not add up to stored_bytes {stored}")
    if len(frames) != -(-nbytes // FRAME_BYTES):
        raise FormatError(f"{what}: {len(frames)} frames, expected one for each MiB of {nbytes} bytes")
    if nbytes > MAX_RATIO * stored:
        raise LimitError(
            f"{what}: {stored} stored bytes declare {nbytes}, expected {MAX_RATIO} times at most"
        )
    return tuple(frames)


def _tensor(value: Any, what: str) -> TensorEntry:
    if type(value) is dict and "alias" in value:
        fields = _fields(value, _ALIAS, f"{what}: alias")
        check_name(fields["name"], f"{what}: alias")
        if len(fields["alias"]) != 2 or any(type(part) is not str for part in fields["alias"]):
            raise FormatError(f"{what}: alias {fields['name']!r} is no pair of section and tensor")
        return TensorEntry(fields["name"], "u8", (0,), "", 0, alias=(fields["alias"][0], fields["alias"][1]))
    fields = _checked(value, _TENSOR, f"{what}: tensor")
    entry = TensorEntry(**{**fields, "shape": tuple(fields["shape"])})
    check_tensor(entry, what)
    return entry


def _check_layout(tensors: Iterable[TensorEntry], nbytes: int, what: str) -> None:
    """Tensors follow one another without holes, each at the next multiple of 64, and fill the section."""
    end = 0
    for entry in tensors:
        if entry.alias:
            continue
        if entry.offset != end:
            raise FormatError(f"{what}: tensor {entry.name!r} starts at {entry.offset}, expected {end}")
        end = align(end + entry.nbytes)
    if end != nbytes:
        raise FormatError(f"{what}: tensors take {end} bytes, the section declares {nbytes}")


def _check_coverage(sections: Iterable[Section], dead: Iterable[Dead], index_offset: int) -> None:
    """Sections and dead ranges cover every page from the header to the index, once."""
    extents = [(section.offset, section.stored_bytes, f"section {section.name!r}") for section in sections]
    for item in dead:
        if item.bytes == 0 or item.bytes % PAGE:
            raise FormatError(f"dead range of {item.bytes} bytes, expected a multiple of {PAGE}")
        extents.append((item.offset, item.bytes, "dead range"))
    end = PAGE
    for offset, nbytes, what in sorted(extents):
        if offset != end:
            raise FormatError(f"{what} starts at {offset}, expected {end} (no holes, no overlaps)")
        end = align(offset + nbytes, PAGE)
    if end != index_offset:
        raise FormatError(f"sections end at {end}, the index starts at {index_offset}")
