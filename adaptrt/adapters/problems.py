"""Everything wrong with one adapter, in one message."""

from __future__ import annotations

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
        if self.lines:
            more = len(self.lines) - SHOWN
            shown = self.lines[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
            raise error(f"{what}: {'; '.join(shown)}")


def brief(value: object, limit: int = 120) -> str:
    """A value from a file as JSON-like text of bounded length on one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
