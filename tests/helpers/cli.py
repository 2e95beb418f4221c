"""Call the command line in this process, or in one of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from adaptrt.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line, without its prefix."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("adaptrt: error: ")]
        return line.removeprefix("adaptrt: error: ")


def adaptrt_cli(*args: object, stdin: str | bytes = "") -> Outcome:
    """Call `main` here, with text or bytes on standard input, which is not a terminal."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code: object = None
    with (
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8")),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Outcome(code, *texts)


def adaptrt_process(*args: object, stdin: str = "", setup: Callable[[], None] | None = None) -> Outcome:
    """Run `python -m adaptrt` as a user would; `setup` runs in the new process before anything else."""
    done = subprocess.run(
        [sys.executable, "-m", "adaptrt", *(str(arg) for arg in args)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        preexec_fn=setup,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
