"""Reading foreign files with care: regular files only, whole reads, strict JSON; one-line errors."""

from __future__ import annotations

import json
import stat
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any

from adaptrt.errors import ConvertError

JSON_LIMIT = 1 << 24  # bytes, for configs and templates; real ones stay under a megabyte


def shown(value: object) -> str:
    """A name or value as repr for a one-line message, however long or strange it is."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def read_exactly(file: FileIO, out: memoryview, path: Path) -> None:
    """Fill `out` from the file's position. Raises ConvertError when the file ends first or cannot be read."""
    filled = 0
    while filled < len(out):
        try:
            count = file.readinto(out[filled:])
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}") from error
        if not count:
            raise ConvertError(f"{path}: truncated, expected {len(out) - filled} more bytes")
        filled += count


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes. Raises ConvertError."""
    file, size = open_regular(path)
    with file:
        if size > limit:
            raise ConvertError(f"{path}: {size} bytes, expected at most {limit}")
        content = bytearray(size)
        read_exactly(file, memoryview(content), path)
    return bytes(content)


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes, duplicate keys refused. Raises ConvertError."""
    return parse_object(read_bytes(path, limit), str(path))


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Strict JSON: one object, UTF-8 (escapes included), no duplicate keys. Raises ConvertError starting with `what`.

    NaN and Infinity pass: real config.json files hold them, and whoever reads a number checks it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ConvertError(f"{what}: key {shown(twice)} appears twice, expected once")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in text:  # half of a surrogate pair is no character, and nobody could write it again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "nested too deep"
        raise ConvertError(f"{what}: not valid JSON ({reason[:120]})") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{what}: found a JSON {type(value).__name__}, expected an object")
    return value


def open_regular(path: Path) -> tuple[FileIO, int]:
    """Open a regular file (opening a pipe would wait for ever) and tell its size."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ConvertError(f"{path}: not a regular file")
        file = FileIO(path)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from error
    return file, info.st_size
