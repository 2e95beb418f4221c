"""Lists of whole numbers as params, which are scalars: decimal, with single spaces between."""

from __future__ import annotations

from collections.abc import Sequence


def whole_numbers(values: Sequence[int]) -> str:
    """A list as text."""
    return " ".join(map(str, values))


def read_whole_numbers(text: object) -> list[int] | None:
    """The list that `whole_numbers` wrote, or None for anything else."""
    words = text.split(" ") if isinstance(text, str) else []
    plain = bool(words) and all(word.isascii() and word.isdigit() and len(word) < 16 for word in words)
    return [int(word) for word in words] if plain else None
