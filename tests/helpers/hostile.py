"""Make broken `.adrt` files by hand: edit a sound file's index and sign it again."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from helpers.make_golden import PAGE, canonical, header, pad, slot

Edit = Callable[[dict[str, Any]], object]


def index_of(data: bytes) -> tuple[int, dict[str, Any]]:
    """(generation, parsed index) of the newest slot."""
    slots = [struct.unpack_from("<4Q", data, 64 * (1 + number)) for number in (0, 1)]
    generation, offset, size, _ = max(slots)
    return generation, json.loads(data[offset : offset + size])


def resign(data: bytes, text: bytes) -> bytes:
    """The same sections as generation 1, with `text` as its index."""
    offset = max(struct.unpack_from("<4Q", data, at)[:2] for at in (64, 128))[1]
    return header({1: slot(1, offset, text)}) + data[PAGE:offset] + pad(text)


def edited(data: bytes, edit: Edit) -> bytes:
    """The file with `edit` applied to its index, every digest that leads to the root made right again."""
    _, index = index_of(data)
    edit(index)
    return resign(data, canonical(index))


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    """The file with a piece of its index's text replaced."""
    text = canonical(index_of(data)[1])
    if text.count(old) < 1:
        raise ValueError(f"{old!r} is not in the index")
    return resign(data, text.replace(old, new, 1))
