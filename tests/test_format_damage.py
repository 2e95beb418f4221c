"""Damage of every kind: cut files, flipped bits, random mutations, processes killed while they write.

The long versions: ADAPTRT_BITFLIPS=all, ADAPTRT_MUTATIONS=100000, ADAPTRT_KILLS=200.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import make_golden
from helpers.make_golden import PAGE

from adaptrt.errors import FormatError
from adaptrt.format import Writer, append, open_file, verify
from adaptrt.tensor import Tensor

HELPERS = Path(__file__).parent / "helpers"
SMALL = make_golden.first_generation(
    make_golden.pad(bytes(range(1, 65))),
    {
        "dead": [],
        "metadata": {},
        "sections": [make_golden.section("base", "base", PAGE, [("w", "u8", [64], bytes(range(1, 65)))], {})],
    },
)


def run(script: str, *arguments: object, timeout: float) -> dict[str, int]:
    command = [sys.executable, "-W", "error", HELPERS / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.adrt"
    path.write_bytes(SMALL)
    assert verify(path) == []
    for size in range(len(SMALL) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(FormatError):
            open_file(path)


def test_truncation_after_an_append_falls_back(tmp_path: Path) -> None:
    data = make_golden.appended_file(generations=2)
    first = 4 * PAGE  # bytes of the first generation
    path = tmp_path / "cut.adrt"
    path.write_bytes(data)
    for size in range(len(data) - 1, first - 1, -37):
        os.truncate(path, size)
        with open_file(path) as file:
            assert list(file.sections) == ["base", "adapter/old"]
            assert f"file has {size} bytes, expected {len(data)}" in file.warnings[0]
    os.truncate(path, first - 1)
    with pytest.raises(FormatError):
        open_file(path)


def positions(data: bytes) -> list[int]:
    """Every byte that means something or is near one, and a sample of the padding."""
    if os.environ.get("ADAPTRT_BITFLIPS") == "all":
        return list(range(len(data)))
    used = np.convolve(np.frombuffer(data, np.uint8) > 0, np.ones(17), "same") > 0
    used[:192] = True
    sampled = np.arange(len(data)) % 97 == 0
    return np.flatnonzero(used | sampled).tolist()


def appended_small(path: Path) -> None:
    """Two generations in few bytes, the second adding a compressed section and removing another."""
    values = np.repeat(np.arange(40, dtype=np.float32), 40)
    with Writer(path) as w, w.section("a", kind="adapter") as s:
        s.add("t", Tensor.from_numpy(np.arange(8, dtype=np.uint8)))
    with append(path) as a:
        a.remove("a")
        with a.section("b", kind="adapter", codec="zstd") as s:
            s.add("t", Tensor.from_numpy(values))
    with open_file(path) as file:
        assert file.sections["b"].codec == "zstd" and len(file.dead) == 1


@pytest.mark.parametrize("generations", [1, 2])
def test_every_flipped_bit_is_found(generations: int, tmp_path: Path) -> None:
    path = tmp_path / "flipped.adrt"
    if generations == 1:
        path.write_bytes(SMALL)
    else:
        appended_small(path)
    data = path.read_bytes()
    assert verify(path) == []
    missed = []
    with path.open("r+b", buffering=0) as file:
        for position in positions(data):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([data[position] ^ 1 << bit]))
                if not verify(path):
                    missed.append((position, bit))
            file.seek(position)
            file.write(data[position : position + 1])
    assert missed == []
    assert path.read_bytes() == data


def test_last_generation_cannot_be_appended_to(tmp_path: Path) -> None:
    data = bytearray(SMALL)
    _, offset, size, _ = struct.unpack_from("<4Q", data, 128)
    data[128:192] = make_golden.slot(2**63 - 1, offset, bytes(data[offset : offset + size]))
    path = tmp_path / "last.adrt"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"less than 2\^63"), append(path) as a:
        a.metadata["x"] = 1
    assert path.read_bytes() == data


def test_slots_of_distant_generations_are_reported(tmp_path: Path) -> None:
    """A sound first slot beside a third generation: the second one's slot was put back."""
    data = bytearray(make_golden.appended_file(generations=2))
    fields = list(struct.unpack_from("<4Q", data, 64))
    index = bytes(data[fields[1] : fields[1] + fields[2]])
    data[64:128] = make_golden.slot(4, fields[1], index)
    path = tmp_path / "distant.adrt"
    path.write_bytes(data)
    assert verify(path) == ["the slots hold generations 4 and 1, expected neighbours"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_random_mutations_never_crash_hang_or_allocate(tmp_path: Path) -> None:
    count = int(os.environ.get("ADAPTRT_MUTATIONS", "2000"))
    result = run("mutate.py", count, 20240607, tmp_path, timeout=60 + count / 50)
    assert result["opened"] > count / 50 and result["refused"] > count / 2
    assert result["rss_growth"] < 32 << 20  # the largest sound file holds 1.25 MiB of content


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["append", "write"])
def test_killed_processes_leave_sound_files(mode: str, tmp_path: Path) -> None:
    kills = int(os.environ.get("ADAPTRT_KILLS", "10"))
    result = run("crash.py", mode, kills, 7, tmp_path, timeout=60 + kills)
    assert result["kills"] == kills and result["commits"] > 0
