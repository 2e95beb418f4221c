"""Mutate sound `.adrt` files at random and use them: `python mutate.py COUNT SEED FOLDER`.

Runs as a process of its own under an address-space limit: a crash, a hang or a large allocation is seen.
Prints {"opened": …, "refused": …, "rss_growth": bytes} as JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import signal
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import hostile, make_golden
from helpers.make_golden import PAGE, canonical, header, pad, slot

from adaptrt.errors import AdaptrtError
from adaptrt.format import append, open_file, verify

HANG_SECONDS = 5
EXTRA_ADDRESS_SPACE = 256 << 20
INTERESTING = [
    0,
    1,
    -1,
    2,
    63,
    64,
    65,
    4095,
    4096,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
]
VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "base",
    "zstd",
    "raw",
    "nf4",
    "int8",
    [],
    {},
    [[]],
    0.5,
    1e308,
]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data[:192], rng) + data[192:]


def resize(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    return data + rng.randbytes(rng.choice([1, 64, 4096, 10_000]))


def splice(data: bytes, rng: random.Random) -> bytes:
    start, to, count = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice([8, 64, 4096])
    piece = data[start : start + count]
    if rng.random() < 0.5:
        return data[:to] + piece + data[to:]
    return data[:to] + piece + data[to + len(piece) :]


def signed_slot(data: bytes, rng: random.Random) -> bytes:
    """A slot with impossible numbers, correctly signed."""
    fields = list(struct.unpack_from("<4Q", data, 128))
    where = rng.randrange(4)
    fields[where] = rng.choice([*INTERESTING, fields[where] + rng.randrange(-9999, 9999)]) % 2**64
    head = struct.pack("<4Q", *fields)
    index = data[fields[1] : fields[1] + fields[2]] if fields[2] < len(data) else b""
    root = hashlib.sha256(head + hashlib.sha256(index).digest()).digest()
    return data[:128] + head + root + data[192:]


def index_text(data: bytes, rng: random.Random) -> bytes:
    text = canonical(hostile.index_of(data)[1])
    return hostile.resign(data, rng.choice([flip_bits, resize, splice])(text, rng))


def index_value(data: bytes, rng: random.Random) -> bytes:
    _, index = hostile.index_of(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        change_value(index, rng)
    if rng.random() < 0.7:
        sign_sections(index)
    return hostile.resign(data, canonical(index))


def change_value(index: Any, rng: random.Random) -> None:
    node, key = index, rng.choice(list(index))
    while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.9:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    old = node[key]
    action = rng.randrange(5)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(old))
    elif action == 2:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif isinstance(old, int):
        node[key] = rng.choice([*INTERESTING, old + rng.choice([-4096, -64, -1, 1, 64, 4096]), old * 2])
    else:
        node[key] = rng.choice(INTERESTING)


def sign_sections(index: Any) -> None:
    """Make the sections' digests right again where the entries still have their fields."""
    try:
        sections = {section["name"]: section for section in index["sections"]}
        entries = {(name, e["name"]): e for name, s in sections.items() for e in s["tensors"]}
        for section in sections.values():
            listed = []
            for entry in section["tensors"]:
                target = entries[tuple(entry["alias"])] if "alias" in entry else entry
                listed.append([entry["name"], target["dtype"], target["shape"], target["sha256"]])
            section["digest"] = hashlib.sha256(canonical(sorted(listed))).hexdigest()
    except (KeyError, TypeError, ValueError):
        return


def zstd_frames(data: bytes, rng: random.Random) -> bytes:
    """Damaged zstd frames with a right CRC-32."""
    _, index = hostile.index_of(make_golden_frames)
    section = index["sections"][0]
    stored = make_golden_frames[PAGE : PAGE + section["stored_bytes"]]
    first = section["frames"][0]
    frames = [stored[:first], stored[first:]]
    which = rng.randrange(2)
    start = rng.choice([0, 0, rng.randrange(len(frames[which]))])
    piece = frames[which][start : start + 24]
    frames[which] = frames[which][:start] + flip_bits(piece, rng) + frames[which][start + 24 :]
    if rng.random() < 0.3:
        frames[which] = rng.choice([resize, splice])(frames[which], rng) or b"\0"
    stored = b"".join(frames)
    section |= {
        "frames": [len(frame) for frame in frames],
        "stored_bytes": len(stored),
        "stored_crc32": zlib.crc32(stored),
        "planes": rng.choice([1, 2, 4]),
    }
    text = canonical(index)
    return header({1: slot(1, PAGE + len(pad(stored)), text)}) + pad(stored) + pad(text)


MUTATORS = [flip_bits, flip_header, resize, splice, signed_slot, index_text, *[index_value] * 4, zstd_frames]
make_golden_frames = make_golden.frames_file()


def use(path: Path, change: bool) -> bool:
    """Do everything one can do with a file; whether it opened. Only adaptrt's own errors are expected."""
    verify(path)
    try:
        with open_file(path) as file:
            for name, section in file.sections.items():
                for tensor in section.tensors:
                    file.tensor(name, tensor).data.tobytes()
    except AdaptrtError:
        opened = False
    else:
        opened = True
    if change:
        try:
            with append(path) as a:
                a.metadata["changed"] = True
        except AdaptrtError:
            return opened
        verify(path)
    return opened


def main(count: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    sound = list(make_golden.build().values())
    path = folder / "mutant.adrt"
    for data in sound:  # imports and allocates what the first use needs
        path.write_bytes(data)
        use(path, change=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_ADDRESS_SPACE,) * 2)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = 0
    for number in range(count):
        path.write_bytes(rng.choice(MUTATORS)(rng.choice(sound), rng))
        signal.alarm(HANG_SECONDS)
        opened += use(path, change=number % 10 == 0)
        signal.alarm(0)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) * 1024
    print(json.dumps({"opened": opened, "refused": count - opened, "rss_growth": growth}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
