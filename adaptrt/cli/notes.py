"""What goes to stderr: notes, warnings and progress."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from adaptrt.adapters.variant import Adapter

BAR_WIDTH = 30
REDRAW_SECONDS = 0.1


def note(message: str) -> None:
    """One line on stderr."""
    click.echo(f"adaptrt: {message}", err=True)


def show_adapter_notes(adapter: Adapter) -> None:
    """What a user should know about an adapter."""
    for line in adapter.notes:
        note(f"adapter {adapter.name}: {line}")


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        note(level + " ".join(record.getMessage().split()))


def show_warnings() -> None:
    """Send the library's notes and warnings to stderr, one line each."""
    logger = logging.getLogger("adaptrt")
    logger.handlers = [_Warnings()]
    logger.setLevel(logging.INFO)


class Progress:
    """Called with (done, in all, what): a bar on a terminal, elsewhere a line at the start and at the end."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        if not self._terminal:
            note(f"{self._label} …")
        return self

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Redraw the bar, at most ten times a second; `what` is too quick to be read."""
        now = time.monotonic()
        if self._terminal and (now - self._drawn > REDRAW_SECONDS or done >= total):
            self._drawn = now
            share = min(1.0, done / total) if total else 1.0
            bar = "█" * round(share * BAR_WIDTH)
            click.echo(f"\r{self._label} {bar:░<{BAR_WIDTH}} {share:4.0%}", nl=False, err=True)

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if self._terminal:
            click.echo(f"\r{' ' * (len(self._label) + BAR_WIDTH + 6)}\r", nl=False, err=True)
        if kind is None:
            note(f"{self._label}: done in {time.monotonic() - self._started:.1f} s")
