"""Folders that appear whole or not at all, and the safetensors files that go into them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.convert.safetensors import ITEM_BYTES
from adaptrt.errors import ConvertError

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # by name: dtype, in lower case, and shape


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`, which it becomes on a clean exit; an exception leaves nothing.

    Raises ConvertError when `out` exists and is anything but an empty folder, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConvertError(f"{out}: exists, expected a new folder")
    place = out.resolve()  # "." has no name
    building = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)  # what a killed writer left
    try:
        building.mkdir()
        yield building
        if place.exists():
            place.rmdir()
        building.rename(place)
    except OSError as error:
        raise ConvertError(f"{out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """As transformers writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, shapes: Shapes, contents: Iterable[Iterable[NDArray[np.uint8]]]) -> None:
    """Write tensors in the order of `shapes`, whose bytes `contents` gives in the same order, in pieces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in shapes.items():
        end = position + ITEM_BYTES[dtype.upper()] * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for pieces in contents:
            for piece in pieces:
                file.write(piece.data)
        if file.tell() != 8 + len(text) + position:
            raise ConvertError(f"{path}: wrote {file.tell()} bytes, expected {8 + len(text) + position}")
        file.flush()
        os.fsync(file.fileno())
