"""Build spec/golden/*.adrt by hand, from spec/format.md alone: nothing of adaptrt is imported here.

Run `python tests/helpers/make_golden.py` to write them again; spec/format.md says what each shows.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path

import zstandard

GOLDEN = Path(__file__).resolve().parents[2] / "spec" / "golden"
PAGE = 4096
MIB = 1 << 20

# (name, dtype, shape, bytes); the part padding of nf4 and int8 is written out as zeros.
Tensors = list[tuple[str, str, list[int], bytes]]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pad(data: bytes, alignment: int = PAGE) -> bytes:
    return data + bytes(-len(data) % alignment)


def pattern(count: int, seed: int) -> bytes:
    """`count` bytes that look random and are the same on every machine."""
    blocks = (hashlib.sha256(struct.pack("<II", seed, i)).digest() for i in range(-(-count // 32)))
    return b"".join(blocks)[:count]


def every_dtype() -> Tensors:
    codes, absmax, nested = pattern(75, 1), pattern(3, 2), struct.pack("<ff", 0.5, 1.25)
    return [
        ("a.f32", "f32", [2, 3], struct.pack("<6f", 1, -2, 0.5, 1e-30, 3e8, -0.0)),
        ("b.f16", "f16", [5], struct.pack("<5e", 1, -2, 0.5, 65504, 6e-8)),
        ("c.bf16", "bf16", [1, 2, 3], struct.pack("<6H", 0x3F80, 0xC000, 0, 0x7F7F, 0x8000, 1)),
        ("d.u8", "u8", [13], b'{"hello": 1}\n'),
        ("e.i32", "i32", [], struct.pack("<i", -(2**31))),
        ("f.nf4", "nf4", [3, 50], pad(codes, 64) + pad(absmax, 64) + nested),  # 150 weights, 3 blocks
        ("g.int8", "int8", [2, 65], pad(pattern(130, 3), 64) + pattern(8, 4)),  # 2 rows of 2 blocks
        ("h.empty", "f32", [0, 7], b""),
    ]


def entries(tensors: Tensors) -> tuple[list[dict[str, object]], bytes]:
    """Index entries and the section's content."""
    listed, content = [], b""
    for name, dtype, shape, data in tensors:
        listed.append(
            {"name": name, "dtype": dtype, "shape": shape, "offset": len(content), "sha256": sha256(data)}
        )
        content = pad(content + data, 64)
    return listed, content


def section(
    name: str, kind: str, offset: int, tensors: Tensors, aliases: dict[str, tuple[str, str, dict]]
) -> dict:
    """A raw section at `offset`; `aliases` maps a name to (section, tensor, the target's entry)."""
    listed, content = entries(tensors)
    logical = [[e["name"], e["dtype"], e["shape"], e["sha256"]] for e in listed]
    logical += [[n, e["dtype"], e["shape"], e["sha256"]] for n, (_, _, e) in aliases.items()]
    return {
        "name": name,
        "kind": kind,
        "critical": True,
        "codec": "raw",
        "offset": offset,
        "bytes": len(content),
        "digest": sha256(canonical(sorted(logical))),
        "metadata": {},
        "tensors": listed + [{"name": n, "alias": [s, t]} for n, (s, t, _) in aliases.items()],
    }


def compressed(item: dict, content: bytes, planes: int) -> tuple[dict, bytes]:
    """The section with zstd instead of raw, and its stored bytes."""
    split = b"".join(content[plane::planes] for plane in range(planes))
    frames = [zstandard.compress(split[i : i + MIB], 9) for i in range(0, len(split), MIB)]
    stored = b"".join(frames)
    extra = {
        "codec": "zstd",
        "planes": planes,
        "frames": [len(frame) for frame in frames],
        "stored_bytes": len(stored),
        "stored_crc32": zlib.crc32(stored),
    }
    return item | extra, stored


def slot(generation: int, offset: int, index: bytes) -> bytes:
    head = struct.pack("<4Q", generation, offset, len(index), offset + len(pad(index)))
    return head + hashlib.sha256(head + hashlib.sha256(index).digest()).digest()


def header(slots: dict[int, bytes]) -> bytes:
    """Page 0; slot number → 64 bytes."""
    page = b"ADRT" + struct.pack("<I", 1) + bytes(56) + slots.get(0, bytes(64)) + slots.get(1, bytes(64))
    return pad(page)


def first_generation(pages: bytes, index: dict) -> bytes:
    """A whole file: header, sections as `pages`, index."""
    text = canonical(index)
    return header({1: slot(1, PAGE + len(pages), text)}) + pages + pad(text)


def tensors_file() -> bytes:
    """Every dtype, an alias in the section, a second section, an ignorable one of an unknown kind."""
    base = every_dtype()
    listed, content = entries(base)
    vocabulary: Tensors = [("tokenizer.json", "u8", [9], '{"é": 1}'.encode())]
    note: Tensors = [("text", "u8", [3], b"hi!")]
    sections = [
        section("base", "base", PAGE, base, {"z.tied": ("base", "a.f32", listed[0])}),
        section("tokenizer", "tokenizer", 2 * PAGE, vocabulary, {}),
        section("note", "x-note", 3 * PAGE, note, {}) | {"critical": False, "metadata": {"by": "hand"}},
    ]
    metadata = {
        "general.architecture": "llama",
        "general.name": "gölden",
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-05,
        "llama.block_count": 1,
        "list": [True, False, None, -1, 0.1, 1e16, 1e-07, '\n\x1f\x7f"\\/'],
    }
    pages = pad(content) + pad(entries(vocabulary)[1]) + pad(entries(note)[1])
    return first_generation(pages, {"metadata": metadata, "sections": sections, "dead": []})


def dead(file: bytes, start: int, end: int) -> dict:
    return {
        "offset": start * PAGE,
        "bytes": (end - start) * PAGE,
        "sha256": sha256(file[start * PAGE : end * PAGE]),
    }


def appended_file(generations: int = 3) -> bytes:
    """Three commits: base and adapter/old | adapter/pirate, compressed, with an alias | removes adapter/old.

    Pages: 0 header, 1 base, 2 adapter/old, 3 index 1, 4 adapter/pirate, 5 index 2, 6 index 3.
    """
    base: Tensors = [("w", "f32", [4], struct.pack("<4f", 1, 2, 3, 4))]
    old: Tensors = [("B", "bf16", [2, 2], pattern(8, 5))]
    half = pattern(600, 6)
    pirate: Tensors = [("A", "bf16", [20, 30], b"".join(bytes([b, 0x3C]) for b in half))]
    base_item = section("base", "base", PAGE, base, {})
    old_item = section("adapter/old", "adapter", 2 * PAGE, old, {})
    shared = {"shared": ("base", "w", entries(base)[0][0])}
    pirate_item, stored = compressed(
        section("adapter/pirate", "adapter", 4 * PAGE, pirate, shared), entries(pirate)[1], planes=2
    )
    index = [
        canonical({"metadata": {"step": 1}, "sections": [base_item, old_item], "dead": []}),
    ]
    file = pad(entries(base)[1]) + pad(entries(old)[1]) + pad(index[0])
    file = header({1: slot(1, 3 * PAGE, index[0])}) + file + pad(stored)
    index.append(
        canonical(
            {
                "metadata": {"step": 1},
                "sections": [base_item, old_item, pirate_item],
                "dead": [dead(file, 3, 4)],
            }
        )
    )
    file += pad(index[1])
    if generations == 2:
        return header({0: slot(2, 5 * PAGE, index[1]), 1: slot(1, 3 * PAGE, index[0])}) + file[PAGE:]
    index.append(
        canonical(
            {
                "metadata": {"step": 3},
                "sections": [base_item, pirate_item],
                "dead": [dead(file, 3, 4), dead(file, 2, 3), dead(file, 5, 6)],
            }
        )
    )
    slots = {0: slot(2, 5 * PAGE, index[1]), 1: slot(3, 6 * PAGE, index[2])}
    return header(slots) + file[PAGE:] + pad(index[2])


def frames_file() -> bytes:
    """A compressed float32 section of 1.25 MiB: four byte planes, two frames."""
    content = pattern(4096, 7) * 320
    tensors: Tensors = [("t", "f32", [len(content) // 4], content)]
    item, stored = compressed(section("adapter/big", "adapter", PAGE, tensors, {}), content, planes=4)
    return first_generation(pad(stored), {"metadata": {}, "sections": [item], "dead": []})


def fallback_file() -> bytes:
    """The second generation's slot is torn: a reader falls back to the first generation and says so."""
    file = bytearray(appended_file(generations=2))
    file[64 + 40 : 64 + 64] = bytes(24)
    return bytes(file)


def build() -> dict[str, bytes]:
    return {
        "tensors.adrt": tensors_file(),
        "appended.adrt": appended_file(),
        "frames.adrt": frames_file(),
        "fallback.adrt": fallback_file(),
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, data in build().items():
        (GOLDEN / name).write_bytes(data)
        print(name, len(data))
