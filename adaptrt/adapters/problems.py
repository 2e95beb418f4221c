"""Everything wrong with one adapter, in one message."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from adaptrt.errors import AdapterError, AdaptrtError

SHOWN = 8  # problems spelled out in the message; the rest are counted


@dataclass
class Problems:
    """Everything wrong with one adapter, collected so that it is reported at once."""

    lines: list[str] = field(default_factory=list)
    where: str = ""

    def add(self, line: str) -> None:
        """Record one problem: the thing, what was found, what was expected."""
        self.lines.append(self.where + line)

    def about(self, thing: str) -> Problems:
        """The same collection, with `thing: ` in front of what is added through it."""
        return Problems(self.lines, f"{self.where}{thing}: ")

    def raise_for(self, what: str, error: type[AdaptrtError] = AdapterError) -> None:
        """Raise one `error` about `what` when there is any problem."""
        if not self.lines:
            return
        # the same fault in layer after layer differs only in words with a digit
        kinds: dict[str, list[str]] = {}
        for line in self.lines:
            kinds.setdefault(re.sub(r"\S*\d\S*", "#", line), []).append(line)
        shown = [
            first + (f" (and {len(others)} more like it)" if others else "")
            for first, *others in kinds.values()
        ]
        more = [f"and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
        raise error(f"{what}: {'; '.join(shown[:SHOWN] + more)}")


def brief(value: object, limit: int = 120) -> str:
    """A value from a file as JSON-like text of bounded length on one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
