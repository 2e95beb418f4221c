"""One hostile file per way a file can be wrong; each is refused with its class and a line that says why."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers.hostile import edited, index_of, replaced, resign
from helpers.make_golden import PAGE, build, canonical, header, pad, slot

from adaptrt import errors
from adaptrt.format import open_file, verify

FILES = build()
SOUND = FILES["tensors.adrt"]
FRAMES = FILES["frames.adrt"]
INDEX_AT = 4 * PAGE  # of SOUND


def set_field(path: str, value: Any) -> Any:
    """An edit that sets e.g. `sections.0.tensors.1.offset`."""
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def edit(index: Any) -> None:
        for part in way:
            index = index[part]
        index[last] = value

    return edit


def field(path: str, value: Any, data: bytes = SOUND) -> bytes:
    return edited(data, set_field(path, value))


def slot_field(number: int, value: int) -> bytes:
    """A correctly signed slot with one field (generation, index_offset, index_bytes, file_bytes) changed."""
    text = canonical(index_of(SOUND)[1])
    fields = [1, INDEX_AT, len(text), INDEX_AT + len(pad(text))]
    fields[number] = value
    head = struct.pack("<4Q", *fields)
    return header({1: head + hashlib.sha256(head + hashlib.sha256(text).digest()).digest()}) + SOUND[PAGE:]


def add_key(path: str) -> bytes:
    return field(f"{path}.surprise" if path else "surprise", 1)


def frames_with(stored: bytes, frames: list[int] | None = None, **fields: Any) -> bytes:
    """FRAMES with other stored bytes."""
    _, index = index_of(FRAMES)
    index["sections"][0] |= {
        "frames": frames or [len(stored)],
        "stored_bytes": len(stored),
        "stored_crc32": zlib.crc32(stored),
    } | fields
    text = canonical(index)
    pages = pad(stored)
    return header({1: slot(1, PAGE + len(pages), text)}) + pages + pad(text)


def one_tensor(size: int, **fields: Any) -> dict[str, Any]:
    """Fields of a section that declares one u8 tensor of `size` bytes."""
    sha = hashlib.sha256(bytes(size)).hexdigest()
    listed = [["t", "u8", [size], sha]]
    return {
        "bytes": size,
        "tensors": [{"name": "t", "dtype": "u8", "shape": [size], "offset": 0, "sha256": sha}],
        "digest": hashlib.sha256(canonical(listed)).hexdigest(),
    } | fields


def deep(depth: int) -> bytes:
    return replaced(SOUND, b'"by":"hand"', b'"by":' + b"[" * depth + b"]" * depth)


E = errors
CASES: dict[str, tuple[bytes, type[errors.FormatError], str]] = {
    # header
    "empty": (b"", E.NotAdrtError, "starts with b''"),
    "magic": (b"GGUF" + SOUND[4:], E.NotAdrtError, "GGUF"),
    "only the magic": (b"ADRT", E.TruncatedError, "4 bytes"),
    "version 0": (SOUND[:4] + struct.pack("<I", 0) + SOUND[8:], E.VersionError, "version 0"),
    "version 2": (SOUND[:4] + struct.pack("<I", 2) + SOUND[8:], E.VersionError, "version 2"),
    "version, big-endian": (SOUND[:4] + struct.pack(">I", 1) + SOUND[8:], E.VersionError, "version 16777216"),
    "no slot": (header({}) + SOUND[PAGE:], E.FormatError, "no index"),
    "generation 0": (slot_field(0, 0), E.FormatError, "generation 0"),
    "generation in the wrong slot": (slot_field(0, 2), E.FormatError, "generation 2 does not belong"),
    "generation of 64 bits": (slot_field(0, 2**64 - 1), E.LimitError, "less than 2.63"),
    "index inside the header": (slot_field(1, 0), E.FormatError, "index at 0"),
    "index unaligned": (slot_field(1, INDEX_AT + 64), E.FormatError, f"index at {INDEX_AT + 64}"),
    "index elsewhere": (slot_field(1, 1 << 62), E.FormatError, "does not end with its index"),
    "index empty": (slot_field(2, 0), E.LimitError, "index of 0 bytes"),
    "index too large": (slot_field(2, (64 << 20) + 1), E.LimitError, "67108865"),
    "file size not the index's end": (slot_field(3, INDEX_AT), E.FormatError, "does not end with its index"),
    "offset overflows": (slot_field(1, 2**64 - PAGE), E.FormatError, "does not end with its index"),
    "cut off": (SOUND[:-1], E.TruncatedError, f"{len(SOUND) - 1} bytes, expected {len(SOUND)}"),
    "root digest": (SOUND[:170] + b"\1\2" + SOUND[172:], E.ChecksumError, "root digest"),
    "index changed": (SOUND[: INDEX_AT + 9] + b"X" + SOUND[INDEX_AT + 10 :], E.ChecksumError, "root digest"),
    # JSON
    "index no JSON": (resign(SOUND, b"hello"), E.FormatError, "not valid JSON"),
    "index not UTF-8": (replaced(SOUND, "gölden".encode(), b"g\xf6lden"), E.FormatError, "not valid JSON"),
    "lone surrogate": (replaced(SOUND, "ö".encode(), b"\\ud800"), E.FormatError, "surrogates not allowed"),
    "white space": (replaced(SOUND, b'"dead":[]', b'"dead": []'), E.FormatError, "canonical"),
    "duplicate key": (
        replaced(SOUND, b'"by":"hand"', b'"by":"hand","by":"hand"'),
        E.FormatError,
        "canonical",
    ),
    "unsorted keys": (replaced(SOUND, b'"by":"hand"', b'"by":"hand","a":1'), E.FormatError, "canonical"),
    "NaN": (replaced(SOUND, b"10000.0", b"NaN"), E.FormatError, "NaN"),
    "Infinity": (replaced(SOUND, b"10000.0", b"-Infinity"), E.FormatError, "Infinity"),
    "float overflow": (replaced(SOUND, b"10000.0", b"1e999"), E.FormatError, "cannot be stored"),
    "integer of 30,000 digits": (
        replaced(SOUND, b"10000.0", b"9" * 30000),
        E.FormatError,
        "30000 characters",
    ),
    "integer of 65 bits": (replaced(SOUND, b"10000.0", b"%d" % 2**64), E.LimitError, "65 bits"),
    "nested 17 deep": (deep(17), E.LimitError, "deep"),
    "nested 900 deep": (deep(900), E.LimitError, "more than 16 deep"),
    "nested 1,000,000 deep": (deep(1_000_000), E.FormatError, "recursion"),
    "index is a list": (resign(SOUND, b"[]"), E.FormatError, "index has fields list"),
    # fields
    "unknown field in the index": (add_key(""), E.FormatError, "surprise"),
    "unknown field in a section": (add_key("sections.0"), E.FormatError, "surprise"),
    "unknown field in a tensor": (add_key("sections.0.tensors.0"), E.FormatError, "surprise"),
    "unknown field in an alias": (add_key("sections.0.tensors.8"), E.FormatError, "surprise"),
    "zstd fields in a raw section": (field("sections.0.frames", []), E.FormatError, "frames"),
    "missing field": (
        edited(SOUND, lambda i: i["sections"][0].pop("kind")),
        E.FormatError,
        "expected .*kind",
    ),
    "section is a number": (field("sections.0", 3), E.FormatError, "codec 'None'"),
    "tensor is a number": (field("sections.0.tensors.0", 3), E.FormatError, "fields int"),
    "metadata is a list": (field("metadata", []), E.FormatError, "metadata is list"),
    "critical is 1": (field("sections.0.critical", 1), E.FormatError, "critical is int, expected bool"),
    "offset is true": (field("sections.0.tensors.0.offset", True), E.FormatError, "offset is bool"),
    "offset is a float": (field("sections.0.offset", 4096.0), E.FormatError, "offset is float"),
    "negative bytes": (field("sections.0.bytes", -64), E.LimitError, "bytes is -64"),
    "bytes of 2^63": (field("sections.0.bytes", 2**63), E.LimitError, "bytes is 9223372036854775808"),
    "digest in capitals": (field("sections.0.digest", "A" * 64), E.FormatError, "hex digits"),
    "sha256 too short": (field("sections.0.tensors.0.sha256", "ab"), E.FormatError, "hex digits"),
    "codec unknown": (field("sections.0.codec", "lz4"), E.FormatError, "codec 'lz4'"),
    "codec is a list": (field("sections.0.codec", []), E.FormatError, "codec"),
    # names, kinds, counts
    "section name empty": (field("sections.0.name", ""), E.LimitError, "section name has 0 bytes"),
    "section name too long": (field("sections.0.name", "é" * 129), E.LimitError, "258 bytes"),
    "section twice": (field("sections.1.name", "base"), E.FormatError, "'base' is listed twice"),
    "kind unknown and critical": (field("sections.2.critical", True), E.FormatError, "unknown critical kind"),
    "tensor name empty": (field("sections.0.tensors.0.name", ""), E.LimitError, "tensor name has 0 bytes"),
    "tensor name too long": (field("sections.0.tensors.0.name", "x" * 257), E.LimitError, "257 bytes"),
    "tensor twice": (field("sections.0.tensors.1.name", "a.f32"), E.FormatError, "'a.f32' is listed twice"),
    "alias and tensor of one name": (field("sections.0.tensors.8.name", "a.f32"), E.FormatError, "twice"),
    "too many sections": (field("sections", [0] * 65537), E.LimitError, "65536 sections"),
    "too many tensors": (
        field("sections.0.tensors", [0] * ((1 << 20) + 1)),
        E.LimitError,
        "more than 1048576 tensors",
    ),
    # tensors
    "dtype unknown": (field("sections.0.tensors.0.dtype", "f64"), E.FormatError, "unknown dtype 'f64'"),
    "five dimensions": (field("sections.0.tensors.0.shape", [1] * 5), E.LimitError, "5 dimensions"),
    "dimension of 2^40": (field("sections.0.tensors.0.shape", [2**40]), E.LimitError, "dimension"),
    "dimension negative": (field("sections.0.tensors.0.shape", [-1, -6]), E.LimitError, "dimension"),
    "dimension true": (field("sections.0.tensors.0.shape", [True, 6]), E.LimitError, "dimension"),
    "shape overflows 64 bits": (
        field("sections.0.tensors.0.shape", [2**32, 2**32]),
        E.LimitError,
        "2.63 elements",
    ),
    "bytes overflow 64 bits": (
        field("sections.0.tensors.0.shape", [2**31, 2**31]),
        E.LimitError,
        "2.63 bytes",
    ),
    "int8 bytes overflow": (
        field("sections.0.tensors.6.shape", [2**39, 2**23, 1]),
        E.LimitError,
        "2.63 bytes",
    ),
    "shape larger than the file": (
        field("sections.0.tensors.0.shape", [2**30]),
        E.FormatError,
        "starts at 64",
    ),
    "tensor unaligned": (
        field("sections.0.tensors.1.offset", 66),
        E.FormatError,
        "starts at 66, expected 64",
    ),
    "tensors overlap": (field("sections.0.tensors.1.offset", 0), E.FormatError, "starts at 0, expected 64"),
    "hole between tensors": (field("sections.0.tensors.1.offset", 128), E.FormatError, "starts at 128"),
    "tensor list shorter than the section": (
        edited(SOUND, lambda i: i["sections"][1]["tensors"].pop()),
        E.FormatError,
        "tensors take 0 bytes",
    ),
    "digest of the list": (field("sections.0.tensors.0.sha256", "0" * 64), E.ChecksumError, "digest"),
    # aliases
    "alias to itself": (field("sections.0.tensors.8.alias.1", "z.tied"), E.FormatError, "an alias itself"),
    "alias to no section": (field("sections.0.tensors.8.alias.0", "nope"), E.FormatError, "missing"),
    "alias to no tensor": (field("sections.0.tensors.8.alias.1", "nope"), E.FormatError, "missing"),
    "alias of three": (field("sections.0.tensors.8.alias", ["a", "b", "c"]), E.FormatError, "no pair"),
    "alias of numbers": (field("sections.0.tensors.8.alias", [1, 2]), E.FormatError, "no pair"),
    # layout of sections
    "section in the header": (field("sections.0.offset", 0), E.FormatError, "starts at 0"),
    "section unaligned": (field("sections.0.offset", 4160), E.FormatError, "starts at 4160"),
    "section past the index": (field("sections.2.offset", 1 << 40), E.TruncatedError, "ends at"),
    "sections overlap": (field("sections.1.offset", PAGE), E.FormatError, "no overlaps"),
    "hole before the index": (edited(SOUND, lambda i: i["sections"].pop()), E.FormatError, "sections end at"),
    "hole between sections": (edited(SOUND, lambda i: i["sections"].pop(1)), E.FormatError, "no holes"),
    "dead range unaligned": (
        field("dead", [{"offset": 3 * PAGE, "bytes": 1, "sha256": "0" * 64}]),
        E.FormatError,
        "multiple of 4096",
    ),
    "dead range over a section": (
        field("dead", [{"offset": 3 * PAGE, "bytes": PAGE, "sha256": "0" * 64}]),
        E.FormatError,
        "no overlaps",
    ),
    # compression
    "planes 3": (field("sections.0.planes", 3, FRAMES), E.FormatError, "planes is 3"),
    "crc32 of 33 bits": (field("sections.0.stored_crc32", 1 << 32, FRAMES), E.LimitError, "32 bits"),
    "frames do not add up": (field("sections.0.frames.0", 5, FRAMES), E.FormatError, "add up"),
    "frame of 0 bytes": (
        field("sections.0.frames", [0, index_of(FRAMES)[1]["sections"][0]["stored_bytes"]], FRAMES),
        E.FormatError,
        "add up",
    ),
    "frame is a string": (field("sections.0.frames.0", "5", FRAMES), E.FormatError, "add up"),
    "one frame too few": (
        field("sections.0.frames", [index_of(FRAMES)[1]["sections"][0]["stored_bytes"]], FRAMES),
        E.FormatError,
        "1 frames, expected one for each MiB",
    ),
    "zstd bomb": (
        frames_with(zstandard.compress(bytes(1 << 20)), **one_tensor(1 << 20)),
        E.LimitError,
        "256 times at most",
    ),
    "zstd bomb of 2^62 bytes": (
        frames_with(zstandard.compress(bytes(1 << 20)), **one_tensor(1 << 20) | {"bytes": 1 << 62}),
        E.FormatError,
        "frames, expected one",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    data, kind, message = CASES[case]
    path = tmp_path / "hostile.adrt"
    path.write_bytes(data)
    with pytest.raises(errors.FormatError, match=message) as caught:
        open_file(path)
    assert type(caught.value) is kind
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 1000
    problems = verify(path)
    assert len(problems) == 1 and str(path) not in problems[0]


SMALL = zstandard.compress(bytes(range(256)) * 4)
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(range(256)) * 4)
CONTENT: dict[str, tuple[bytes, type[errors.FormatError], str]] = {
    "frame declares another size": (
        frames_with(SMALL, **one_tensor(2048)),
        E.FormatError,
        "declares 1024 bytes",
    ),
    "frame declares no size": (
        frames_with(NO_SIZE, **one_tensor(1024)),
        E.FormatError,
        "declares .* expected 1024",
    ),
    "frame followed by another": (frames_with(SMALL + SMALL, **one_tensor(1024)), E.FormatError, "frame 0"),
    "frame cut short": (frames_with(SMALL[:-3], **one_tensor(1024)), E.FormatError, "frame 0"),
    "skippable frame": (
        frames_with(struct.pack("<II", 0x184D2A50, 1024) + bytes(1024), **one_tensor(1024)),
        E.FormatError,
        "no zstd frame",
    ),
    "no zstd at all": (frames_with(b"hello, world", **one_tensor(1024)), E.FormatError, "no zstd frame"),
    "stored_crc32": (field("sections.0.stored_crc32", 1, FRAMES), E.ChecksumError, "CRC-32"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_hostile_content_opens_but_is_refused_on_reading(case: str, tmp_path: Path) -> None:
    data, kind, message = CONTENT[case]
    path = tmp_path / "hostile.adrt"
    path.write_bytes(data)
    with open_file(path) as file, pytest.raises(errors.FormatError, match=message) as caught:
        file.read_section("adapter/big")
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{path}: section 'adapter/big': ")
    assert len(verify(path)) == 1


def tampered(at: int, data: bytes = SOUND) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


TAMPERED = {
    "reserved bytes before the slots": (tampered(9), "reserved"),
    "reserved bytes after the slots": (tampered(192), "reserved"),
    "tensor": (tampered(PAGE), "section 'base': tensor 'a.f32' does not match"),
    "padding after a tensor": (tampered(PAGE + 24), "section 'base': padding after tensor 'a.f32'"),
    "padding after a section": (tampered(3 * PAGE - 1), "section 'tokenizer': padding after it"),
    "padding after the index": (tampered(len(SOUND) - 1), "padding after the index"),
    "trailing byte": (SOUND + b"\0", "1 bytes after the committed 20480"),
    "dead range": (tampered(2 * PAGE, FILES["appended.adrt"]), "dead range at 8192"),
    "previous index": (tampered(5 * PAGE, FILES["appended.adrt"]), "slot 0: root digest of generation 2"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_finds_what_open_does_not_read(case: str, tmp_path: Path) -> None:
    data, message = TAMPERED[case]
    path = tmp_path / "tampered.adrt"
    path.write_bytes(data)
    open_file(path).close()
    assert any(message in problem for problem in verify(path)), verify(path)


def test_verify_finds_part_padding(tmp_path: Path) -> None:
    """A signed nf4 tensor with a stray byte between its codes and its absmax: every digest is right."""
    _, index = index_of(SOUND)
    entry = index["sections"][0]["tensors"][5]
    assert entry["dtype"] == "nf4"
    data = bytearray(SOUND)
    data[PAGE + entry["offset"] + 75] = 1  # 75 bytes of codes
    start = PAGE + entry["offset"]
    entry["sha256"] = hashlib.sha256(data[start : start + 200]).hexdigest()
    listed = [[e["name"], e["dtype"], e["shape"], e["sha256"]] for e in index["sections"][0]["tensors"][:8]]
    tied = index["sections"][0]["tensors"][0]
    listed.append(["z.tied", tied["dtype"], tied["shape"], tied["sha256"]])
    index["sections"][0]["digest"] = hashlib.sha256(canonical(sorted(listed))).hexdigest()
    path = tmp_path / "part.adrt"
    path.write_bytes(resign(bytes(data), canonical(index)))
    assert verify(path) == ["section 'base': tensor 'f.nf4': padding between its parts is not zero"]


def test_unknown_section_that_is_not_critical_is_kept_for_those_who_know_it(tmp_path: Path) -> None:
    path = tmp_path / "sound.adrt"
    path.write_bytes(SOUND)
    with open_file(path) as file:
        assert file.sections["note"].kind == "x-note"
        assert file.tensor("note", "text").data.tobytes() == b"hi!"


def test_not_a_regular_file(tmp_path: Path) -> None:
    folder = "is a folder, expected an .adrt file ('adaptrt convert' makes one of a model folder)"
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        tmp_path: folder,
        tmp_path / "pipe": "not a regular file",
        tmp_path / "none": "No such file or directory",
    }
    for path, message in reasons.items():
        for function in (open_file, verify):
            with pytest.raises(errors.FormatError) as caught:
                function(path)
            assert str(caught.value) == f"{path}: {message}"
