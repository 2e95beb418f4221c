"""The chat loop of `adaptrt run`: typed turns, streamed answers, prompts by the model's chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from adaptrt.cli.notes import note
from adaptrt.cli.options import Stack
from adaptrt.engine.request import Sampling
from adaptrt.errors import AdaptrtError

if TYPE_CHECKING:
    from adaptrt.api import Model

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class Chat:
    """A conversation with one model. Without a chat template every line is a prompt of its own."""

    def __init__(self, model: Model, stack: Stack, sampling: Sampling, system: str | None) -> None:
        self._model = model
        self._stack = stack
        self._sampling = sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def loop(self, first: str | None = None) -> None:
        """Answer `first`, if given, and then every line typed until /exit or the end of input."""
        plain = (
            "" if self._model.chat_template else "the model has no chat template, so lines are continued; "
        )
        note(plain + HELP)
        if first is not None:
            self._turn(first)
        for line in _typed():
            if line == "/exit":
                return
            if line == "/reset":
                self._messages = list(self._opening)
            elif line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        """One answer; a refusal is shown and the conversation stays as it was."""
        self._messages.append({"role": "user", "content": line})
        try:
            text = self._answer(line)
        except AdaptrtError as error:
            note(f"error: {error}")
            self._messages.pop()
        else:
            self._messages.append({"role": "assistant", "content": text})

    def _answer(self, line: str) -> str:
        """Stream the answer; Ctrl-C ends it and keeps what was said."""
        prompt: str | list[int] = line
        if self._model.chat_template:
            text = self._model.apply_chat_template(self._messages)
            prompt = self._model.tokenize(text, add_special_tokens=False)
        said = ""
        try:
            for chunk in self._model.generate(
                prompt, adapters=self._stack, stream=True, **asdict(self._sampling)
            ):
                click.echo(chunk.text, nl=False)
                said += chunk.text
        except KeyboardInterrupt:
            note("stopped")
        click.echo()
        return said


def _typed() -> Iterator[str]:
    """Lines from the terminal, with line editing, or from standard input. Ctrl-C clears the line."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):  # not every Python was built with it
        import readline  # noqa: F401 - gives input() its editing and history

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            click.echo(err=True)
        except EOFError:
            click.echo(err=True)
            return
