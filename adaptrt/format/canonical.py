"""Canonical JSON: UTF-8, sorted keys, no white space, no duplicates, no NaN; one value has one text."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from adaptrt.errors import FormatError, LimitError

MAX_DEPTH = 16
INT_MIN, INT_MAX = -(1 << 63), (1 << 64) - 1


def dumps(value: object) -> bytes:
    """The one text of a JSON value. Raises FormatError for anything JSON cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"value cannot be stored as JSON: {error}") from error


def loads(text: bytes) -> object:
    """Parse canonical JSON. Raises FormatError for anything else, duplicate keys included."""
    try:
        value = json.loads(text.decode(), parse_int=_integer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"index is not valid JSON: {error}") from error
    # Writing the value again finds duplicate keys, unsorted keys, white space and odd number forms at once.
    if dumps(value) != text:
        raise FormatError(
            "index is not canonical JSON (duplicate or unsorted keys, white space, number form)"
        )
    return value


def check_metadata(metadata: object, what: str) -> None:
    """Refuse metadata that is no dict of JSON values with string keys, bounded in depth and integer size."""
    if not isinstance(metadata, dict):
        raise FormatError(f"{what}: metadata is {type(metadata).__name__}, expected an object")
    _check(metadata, f"{what}: metadata", MAX_DEPTH)


def _check(value: Any, what: str, depth: int) -> None:
    if depth == 0:
        raise LimitError(f"{what} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise FormatError(f"{what} has a key of type {type(key).__name__}, expected a string")
            _check(item, what, depth - 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check(item, what, depth - 1)
    elif isinstance(value, int):
        if not INT_MIN <= value <= INT_MAX:
            raise LimitError(f"{what} has an integer of {value.bit_length()} bits, expected 64 at most")
    elif value is not None and not isinstance(value, (str, float)):
        raise FormatError(f"{what} has a value of type {type(value).__name__}, expected JSON")


def _integer(text: str) -> int:
    if len(text) > len(str(INT_MIN)):
        raise ValueError(f"integer of {len(text)} characters")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
