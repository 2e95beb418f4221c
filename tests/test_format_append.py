"""Appending, and disks that refuse: what is committed, what is undone, what readers of an older state keep."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import independent_reader
from helpers.written import PAGE, add_adapter, bf16, leftovers, noise, plain

from adaptrt.errors import FormatError
from adaptrt.format import Writer, append, open_file, verify


def test_append_moves_nothing_and_readers_keep_what_they_saw(base: Path) -> None:
    before = base.read_bytes()
    with open_file(base) as old:
        tensor = old.tensor("base", "w")
        add_adapter(base, "adapter/a")
        assert tensor.data.tobytes() == noise(1000).tobytes()
        assert list(old.sections) == ["base"]
    after = base.read_bytes()
    assert after[PAGE : len(before)] == before[PAGE:]
    assert after[128:192] == before[128:192]  # the first generation's slot
    with open_file(base) as new:
        assert list(new.sections) == ["base", "adapter/a"]
        assert new.tensor("adapter/a", "A").data.tobytes() == bf16(64, 64).data.tobytes()
    assert verify(base) == []


def test_many_generations(base: Path) -> None:
    for number in range(5):
        add_adapter(base, f"adapter/{number}", number)
        assert verify(base) == []
    for number in (3, 0):
        with append(base) as a:
            a.remove(f"adapter/{number}")
        assert verify(base) == []
    with append(base) as a:  # replace one in a single commit
        a.remove("adapter/1")
        with a.section("adapter/1", kind="adapter") as s:
            s.add("new", plain(7))
        a.metadata["general.name"] = "renamed"
    assert verify(base) == []
    with open_file(base) as file:
        assert list(file.sections) == ["base", "adapter/2", "adapter/4", "adapter/1"]
        assert file.metadata == {"general.architecture": "llama", "general.name": "renamed"}
        assert file.committed.slot.generation == 9
    assert list(independent_reader.read(base)) == ["base", "adapter/2", "adapter/4", "adapter/1"]


def test_section_added_and_removed_in_one_commit(base: Path) -> None:
    with append(base) as a:
        with a.section("adapter/a", kind="adapter") as s:
            s.add("x", plain(5000))
        a.remove("adapter/a")
        a.metadata["edited"] = True
    with open_file(base) as file:
        assert list(file.sections) == ["base"]
    assert verify(base) == []


def test_append_without_change_writes_nothing(base: Path) -> None:
    before = base.read_bytes()
    with append(base) as a:
        a.metadata["general.architecture"] = "llama"
    assert base.read_bytes() == before


def test_torn_bytes_are_harmless_reported_and_reclaimed(base: Path) -> None:
    before = base.read_bytes()
    base.write_bytes(before + noise(12_345).tobytes())
    with open_file(base) as file:
        assert file.warnings == []
        assert file.tensor("base", "w").data.tobytes() == noise(1000).tobytes()
    assert verify(base) == [f"12345 bytes after the committed {len(before)} (left by an interrupted append)"]
    add_adapter(base, "adapter/a")
    assert verify(base) == []
    base.write_bytes(before)
    add_adapter(base, "adapter/a")
    clean = base.read_bytes()
    base.write_bytes(before + noise(12_345).tobytes())
    add_adapter(base, "adapter/a")
    assert base.read_bytes() == clean


def test_fallback_then_append_heals_without_dropping_anything(base: Path) -> None:
    add_adapter(base, "adapter/a")
    data = bytearray(base.read_bytes())
    data[64 + 33] ^= 1  # generation 2's root digest
    base.write_bytes(data)
    with open_file(base) as file:
        assert list(file.sections) == ["base"]
        assert "using generation 1" in file.warnings[0]
    add_adapter(base, "adapter/b")
    healed = base.read_bytes()
    assert healed[PAGE : len(data)] == data[PAGE:]  # what the damaged generation held is still there
    assert verify(base) == []
    with open_file(base) as file:
        assert list(file.sections) == ["base", "adapter/b"] and file.warnings == []


def test_damaged_base_does_not_stop_append(base: Path) -> None:
    data = bytearray(base.read_bytes())
    data[PAGE] ^= 1
    base.write_bytes(data)
    add_adapter(base, "adapter/a")
    assert verify(base) == ["section 'base': tensor 'w' does not match its SHA-256"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_two_writers_are_kept_apart(base: Path) -> None:
    with append(base):
        with pytest.raises(FormatError, match="another process is writing") as caught:
            append(base).__enter__()
        assert str(caught.value).startswith(f"{base}: ")
        script = "import sys; from adaptrt.format import append; append(sys.argv[1]).__enter__()"
        other = subprocess.run(
            [sys.executable, "-c", script, base], capture_output=True, text=True, check=False
        )
        assert "another process is writing this file" in other.stderr
        open_file(base).close()  # readers need no lock
    with Writer(base), pytest.raises(FormatError, match="another process is writing"):
        Writer(base).__enter__()
    add_adapter(base, "adapter/a")


# The disk


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Writing beyond `limit` bytes of a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, PAGE, PAGE + 100, 50_000, 105_000])
def test_full_disk(limit: int, base: Path) -> None:
    new = base.with_name("new.adrt")
    refused = pytest.raises(FormatError, match="File too large")
    with full_disk(limit), refused as caught, Writer(new) as w, w.section("base", kind="base") as s:
        s.add("x", plain(100_000))
    assert str(caught.value).startswith(f"{new}: ") and str(caught.value).count(str(new.parent)) == 1
    assert leftovers(base) == []


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_full_disk_while_appending(codec: str, base: Path) -> None:
    before = base.read_bytes()
    for limit in (len(before) + 100, len(before) + 50_000, len(before) + 100_000):
        refused = pytest.raises(FormatError, match="File too large")
        with full_disk(limit), refused, append(base) as a, a.section("x", kind="adapter", codec=codec) as s:
            s.add("x", plain(100_000))
        assert base.read_bytes() == before


def test_places_that_cannot_be_written(base: Path) -> None:
    places = {
        base.parent / "none" / "x.adrt": "No such file or directory",
        base / "x.adrt": "Not a directory",
        base.parent: "not a regular file",
    }
    for path, message in places.items():
        with pytest.raises(FormatError, match=message) as caught, Writer(path):
            pass
        assert str(caught.value) == f"{path}: {message}"
    for path, message in {
        base.parent / "none.adrt": "No such file",
        base.parent: "is a folder, expected an .adrt file",
    }.items():
        with pytest.raises(FormatError, match=message), append(path):
            pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(base: Path) -> None:
    base.chmod(0o444)
    with pytest.raises(FormatError, match="Permission denied"), append(base):
        pass
    base.chmod(0)
    for function in (open_file, verify):
        with pytest.raises(FormatError, match="Permission denied"):
            function(base)
    base.parent.chmod(0o555)
    try:
        with pytest.raises(FormatError, match="Permission denied"), Writer(base):
            pass
    finally:
        base.parent.chmod(0o755)
