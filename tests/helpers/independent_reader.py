"""A second reader of `.adrt` files, written from spec/format.md: standard library, numpy and zstandard only.

`read(path)` checks every digest and returns {section: {tensor: (dtype, shape, bytes)}}.
It never maps or trusts a size it has not compared with the file; every fault is a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from math import prod
from pathlib import Path

import numpy as np
import zstandard

PAGE, ALIGNMENT, MIB = 4096, 64, 1 << 20
ITEM = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i32": 4}
KNOWN_KINDS = {"base", "tokenizer", "adapter"}


def up(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment


def check(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def nbytes(dtype: str, shape: list[int]) -> int:
    check(len(shape) <= 4 and all(0 <= dim < 2**40 for dim in shape), f"shape {shape}")
    count = prod(shape)
    if dtype == "nf4":
        blocks = -(-count // 64)
        return up(up(-(-count // 2), ALIGNMENT) + blocks, ALIGNMENT) + 4 * -(-blocks // 256) + 4
    if dtype == "int8":
        rows, cols = (prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        return up(rows * cols, ALIGNMENT) + 2 * rows * -(-cols // 64)
    check(dtype in ITEM, f"dtype {dtype}")
    return ITEM[dtype] * count


def newest_index(data: bytes) -> tuple[bytes, int]:
    """Text and offset of the index of the newest valid slot."""
    check(data[:4] == b"ADRT", "magic")
    check(len(data) >= PAGE and struct.unpack_from("<I", data, 4)[0] == 1, "version")
    best: tuple[int, bytes, int] = (0, b"", 0)
    for number in (0, 1):
        raw = data[64 + 64 * number : 128 + 64 * number]
        generation, offset, size, end = struct.unpack("<4Q", raw[:32])
        fits = (
            offset >= PAGE and offset % PAGE == 0 and 0 < size <= 64 * MIB and end == up(offset + size, PAGE)
        )
        if generation == 0 or generation % 2 != number or not fits or end > len(data):
            continue
        text = data[offset : offset + size]
        root = hashlib.sha256(raw[:32] + hashlib.sha256(text).digest()).digest()
        if root == raw[32:] and generation > best[0]:
            best = (generation, text, offset)
    check(best[0] > 0, "no valid slot")
    return best[1], best[2]


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    check(len({key for key, _ in pairs}) == len(pairs), "duplicate key")
    return dict(pairs)


def content(data: bytes, section: dict) -> bytes:
    """Uncompressed bytes of a section."""
    size, start = section["bytes"], section["offset"]
    if section["codec"] == "raw":
        return data[start : start + size]
    check(section["codec"] == "zstd", "codec")
    stored = data[start : start + section["stored_bytes"]]
    frames = section["frames"]
    check(sum(frames) == len(stored) and len(frames) == -(-size // MIB), "frames")
    check(size <= 256 * len(stored), "ratio")
    check(zlib.crc32(stored) == section["stored_crc32"], "crc32")
    split, at = b"", 0
    for number, frame in enumerate(frames):
        expected = min(MIB, size - number * MIB)
        piece = stored[at : at + frame]
        check(zstandard.get_frame_parameters(piece).content_size == expected, "frame size")
        split += zstandard.ZstdDecompressor().decompress(piece, max_output_size=expected)
        at += frame
    planes = np.frombuffer(split, np.uint8).reshape(section["planes"], -1)
    return planes.T.tobytes()


def tensors(data: bytes, section: dict) -> dict[str, tuple[str, list[int], bytes]]:
    """The section's own tensors, each checked against its digest."""
    raw, end, found = content(data, section), 0, {}
    for entry in section["tensors"]:
        if "alias" in entry:
            continue
        size = nbytes(entry["dtype"], entry["shape"])
        check(entry["offset"] == end and end + size <= len(raw), f"layout of {entry['name']}")
        value = raw[end : end + size]
        check(hashlib.sha256(value).hexdigest() == entry["sha256"], f"sha256 of {entry['name']}")
        found[entry["name"]] = (entry["dtype"], entry["shape"], value)
        end = up(end + size, ALIGNMENT)
    check(end == section["bytes"], f"size of section {section['name']}")
    return found


def read(path: str | Path) -> dict[str, dict[str, tuple[str, list[int], bytes]]]:
    data = Path(path).read_bytes()
    text, index_offset = newest_index(data)
    index = json.loads(text.decode(), object_pairs_hook=once)
    extents = [(s["offset"], s.get("stored_bytes", s["bytes"])) for s in index["sections"]]
    extents += [(d["offset"], d["bytes"]) for d in index["dead"]]
    at = PAGE
    for offset, size in sorted(extents):
        check(offset == at, f"hole or overlap at {at}")
        at = up(offset + size, PAGE)
    check(at == index_offset, "sections end where the index starts")
    for section in index["sections"]:
        check(section["kind"] in KNOWN_KINDS or not section["critical"], f"kind {section['kind']}")
    own = {section["name"]: tensors(data, section) for section in index["sections"]}
    result = {name: dict(found) for name, found in own.items()}
    for section in index["sections"]:
        name = section["name"]
        for entry in section["tensors"]:
            if "alias" in entry:
                holder, target = entry["alias"]
                result[name][entry["name"]] = own[holder][target]
        listed = sorted([n, d, s, hashlib.sha256(b).hexdigest()] for n, (d, s, b) in result[name].items())
        digest = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
        check(hashlib.sha256(digest).hexdigest() == section["digest"], f"digest of {name}")
    return result


if __name__ == "__main__":
    for section_name, found in read(sys.argv[1]).items():
        for tensor_name, (dtype, shape, value) in found.items():
            print(section_name, tensor_name, dtype, shape, len(value))
