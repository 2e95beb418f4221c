"""What goes to stderr: notes, warnings and progress."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from adaptrt.adapters.variant import Adapter

BAR_WIDTH = 30
REDRAW_SECONDS = 0.1
SOON = 1.0  # seconds after which something that is usually quick shows its progress


_bars: list[Progress] = []  # on the terminal now: a note wipes them away, and they draw themselves anew


def printable(text: str) -> str:
    """Text for a terminal, control characters escaped: what a stranger's file says must not steer it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def note(message: str) -> None:
    """One line on stderr."""
    for bar in _bars:
        bar.wipe()
    click.echo(f"adaptrt: {printable(message)}", err=True)


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


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
    """Called with (done, in all, what): a bar on a terminal, elsewhere a line at the start and at the end.

    With `after`, nothing is shown before so many seconds have passed: for what is quick most of the time.
    """

    def __init__(self, label: str, after: float = 0.0) -> None:
        self._label = label
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._share, self._drawn = 0.0, 0.0
        self._shown = False
        self._timer = threading.Timer(after, self._show) if after else None

    def __enter__(self) -> Progress:
        if self._timer is None:
            self._show()
        else:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Redraw the bar, at most ten times a second; `what` is too quick to be read."""
        self._share = min(1.0, done / total) if total else 1.0
        now = time.monotonic()
        if self._shown and self._terminal and (now - self._drawn > REDRAW_SECONDS or done >= total):
            self._draw()

    def _show(self) -> None:
        self._shown = True
        if self._terminal:
            _bars.append(self)
            self._draw()
        else:
            note(f"{self._label} …")

    def wipe(self) -> None:
        """Clear the line of the bar."""
        click.echo(f"\r{' ' * (len(self._label) + BAR_WIDTH + 6)}\r", nl=False, err=True)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        bar = "█" * round(self._share * BAR_WIDTH)
        click.echo(f"\r{self._label} {bar:░<{BAR_WIDTH}} {self._share:4.0%}", nl=False, err=True)

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self in _bars:
            self.wipe()
            _bars.remove(self)
        if self._shown and kind is None:
            note(f"{self._label}: done in {time.monotonic() - self._started:.1f} s")
