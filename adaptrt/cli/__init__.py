"""The command line: one file per command, imported only when called; errors become one line and an exit code.

Data goes to stdout, notes and progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

import click

from adaptrt import __version__
from adaptrt.errors import AdaptrtError

COMMANDS = {  # name → one-line help; `adaptrt --help` imports nothing else
    "run": "Generate text, run a batch of prompts, or chat.",
    "eval": "Measure perplexity over a text.",
    "convert": "Convert a Hugging Face or PEFT folder.",
    "inspect": "Show what is inside a file.",
    "verify": "Check every byte of a file.",
    "adapter": "Add, remove, list or combine adapters.",
    "merge": "Fold adapters into a base for good.",
    "pack": "Put a base and adapters into one new file.",
    "bench": "Measure speed against memory bandwidth.",
    "plugins": "List what is installed, or start a plugin of your own.",
}


class LazyGroup(click.Group):
    """Knows its commands by name and imports the file of the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import adaptrt/cli/NAME.py and take its `command`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"adaptrt.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, message="adaptrt %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run language models with stacked adapters, locally. First try: adaptrt run demo."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        return
    from adaptrt.cli.notes import show_warnings

    show_warnings()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a terminal that lacks a character shows '?' instead of failing
    debug = bool(os.environ.get("ADAPTRT_DEBUG"))
    sys.exit(_invoke(args) if debug else _guarded(args))


def _replace_closed_streams() -> None:
    """What the caller closed (`>&-`) is None in Python; a null device also keeps our files off its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 - for the life of the process


def _invoke(args: Sequence[str] | None) -> int:
    code = cli.main(args, prog_name="adaptrt", standalone_mode=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _guarded(args: Sequence[str] | None) -> int:
    """Run, turn every failure into one line on stderr, and return the exit code."""
    try:
        return _invoke(args)
    except (click.Abort, KeyboardInterrupt):
        return _finish(130)
    except BrokenPipeError:
        return _finish(1)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "adaptrt"
        message = error.format_message().rstrip(".")
        return _finish(2, f"{message} (see '{command} --help')")
    except click.ClickException as error:
        return _finish(1, error.format_message())
    except AdaptrtError as error:
        return _finish(1, str(error))
    except MemoryError:
        return _finish(1, "out of memory")
    except OSError as error:
        return _finish(1, _describe(error))
    except SystemExit:
        raise
    except BaseException as error:  # a bug of ours, or a library's own kind; users still deserve one line
        return _finish(1, f"internal error, ADAPTRT_DEBUG=1 shows where: {type(error).__name__}: {error}")


def _finish(code: int, message: str | None = None) -> int:
    """Leave stdout flushed or, if it is gone, silenced; say what went wrong in one line."""
    _flush_or_silence(sys.stdout)
    if message is not None:
        from adaptrt.cli.notes import printable

        line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
        click.echo(f"adaptrt: error: {printable(line)}", err=True)
    return code


def _flush_or_silence(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):  # full disk or closed pipe: the interpreter would complain again at exit
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason
