"""`adaptrt run`: continue one prompt; `--prompts` runs a batch (prompts.py), `--chat` converses (chat.py)."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptrt.cli.chat import Chat
from adaptrt.cli.notes import note
from adaptrt.cli.options import (
    PATH,
    AdapterChoice,
    Loading,
    Stack,
    adapter_option,
    as_json,
    grouped,
    loading_options,
    read_stream,
    read_text,
    sampling_options,
)
from adaptrt.cli.prompts import read_prompts, run_prompts
from adaptrt.engine.request import Chunk, Sampling

if TYPE_CHECKING:
    from adaptrt.api import Model

NO_PROMPT = "there is no prompt: give -p TEXT, -f FILE or text on standard input"


LONG_PROMPT = 400  # characters; reading more may take a while


@dataclass(frozen=True)
class Input:
    """Where the words come from; at most one of the first three is given."""

    prompt: str | None
    prompt_file: Path | None
    prompts: Path | None
    chat: bool
    system: str | None

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.prompt, self.prompt_file, self.prompts)) > 1:
            raise click.UsageError("give one of -p, -f and --prompts")
        if self.prompts is not None and self.chat:
            raise click.UsageError("--chat does not go with --prompts")

    def given(self) -> str | None:
        """The prompt of -p, -f or piped standard input, if any; one final newline is dropped."""
        if self.prompts is not None:
            return None
        text = self.prompt
        if self.prompt_file is not None:
            text = read_text(self.prompt_file).removesuffix("\n")
        if text == "":
            raise click.UsageError("the prompt is empty")
        if text is not None or self.chat or sys.stdin.isatty():
            return text
        return read_stream(sys.stdin.buffer, "standard input").removesuffix("\n") or None


input_options = grouped(
    "source",
    Input,
    click.option("-p", "--prompt", metavar="TEXT", help="The prompt; without -p, -f or piped text: a chat."),
    click.option(
        "-f", "--file", "prompt_file", type=PATH, metavar="FILE", help="Read the prompt from a file."
    ),
    click.option("--prompts", type=PATH, metavar="FILE.jsonl", help="A batch, one JSON object a line."),
    click.option("--chat", is_flag=True, help="Converse, with the model's chat template."),
    click.option("--system", metavar="TEXT", help="The chat's system message."),
)


@click.command()
@click.argument("model")
@input_options
@adapter_option
@sampling_options
@loading_options
@as_json
def command(
    model: str,
    source: Input,
    adapters: list[AdapterChoice],
    sampling: Sampling,
    loading: Loading,
    as_json: bool,
) -> None:
    """Generate text with MODEL, an .adrt file or "demo".

    A batch line is {"prompt": TEXT} with, as wished, "adapters" and any of max_tokens, temperature, top_k,
    top_p, min_p, repeat_penalty, seed and stop; the options given here hold for every line that does not say
    otherwise.
    """
    tasks = read_prompts(source.prompts, adapters, sampling) if source.prompts else []
    prompt = source.given()
    chatting = source.chat or (prompt is None and not tasks and model != "demo" and sys.stdin.isatty())
    if chatting and as_json:
        raise click.UsageError("--json does not go with a chat")
    if source.system is not None and not chatting:
        raise click.UsageError("--system goes with a chat only")
    if prompt is None and not tasks and not chatting and model != "demo":
        raise click.UsageError(NO_PROMPT)
    started = time.perf_counter()
    with loading.open(model) as (loaded, attached):
        stack = attached.stack(adapters)
        load_seconds = time.perf_counter() - started
        note(f"{model}: {loaded.describe()}, loaded in {1000 * load_seconds:.0f} ms")
        if tasks:
            run_prompts(loaded, attached, tasks)
        elif chatting:
            Chat(loaded, stack, sampling, source.system).loop(first=prompt)
        else:
            prompt = prompt or loaded.metadata.get("general.sample_prompt")  # the demo brings its own
            if prompt is None:
                raise click.UsageError(NO_PROMPT)
            answer(loaded, prompt, stack, replace(sampling, seed=_seed(sampling)), as_json, load_seconds)


def _seed(sampling: Sampling) -> int:
    """The seed given, or a new one short enough to be typed again."""
    return secrets.randbits(32) if sampling.seed is None else sampling.seed


@dataclass
class Result:
    """An answer and how fast it came; `--json` prints it."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    tokens: int
    adapters: Stack
    seed: int | None
    load_seconds: float
    prompt_seconds: float  # until the first token
    seconds: float  # from the first token to the last

    def summary(self) -> str:
        """Rates and what is needed to repeat the run, in one line."""
        prefill = _rate(self.prompt_tokens, self.prompt_seconds)
        decode_rate = _rate(self.tokens - 1, self.seconds)
        stack = " + ".join(f"{name}:{scale:g}" for name, scale in self.adapters) or "none"
        return (
            f"prompt {self.prompt_tokens} tokens, {prefill}; answer {self.tokens} tokens, {decode_rate}; "
            f"adapters {stack}; seed {self.seed}"
        )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "too short to time"


def answer(
    model: Model, prompt: str, stack: Stack, sampling: Sampling, as_json: bool, load_seconds: float
) -> None:
    """Print the answer: text as it comes, or one JSON object at the end; the timings go to stderr."""
    if len(prompt) > LONG_PROMPT:
        note("reading the prompt …")
    started = time.perf_counter()
    chunks = model.generate(prompt, adapters=stack, stream=True, **asdict(sampling))
    result = Result("", None, 0, 0, stack, sampling.seed, load_seconds, 0.0, 0.0)
    try:
        follow(chunks, result, started, echo=not as_json)
    finally:
        if not as_json and result.tokens:
            click.echo()
    if as_json:
        click.echo(json.dumps(asdict(result), ensure_ascii=False))
    note(result.summary())


def follow(chunks: Iterable[Chunk], result: Result, started: float, echo: bool) -> None:
    """Collect chunks into `result`, showing their text as it comes."""
    for chunk in chunks:
        if chunk.n_tokens == 0 and chunk.finish_reason is None:
            note(f"read {chunk.n_prompt_tokens} tokens of the prompt")
            continue
        if result.prompt_tokens == 0:
            result.prompt_tokens = chunk.n_prompt_tokens
            result.prompt_seconds = time.perf_counter() - started
        if echo and chunk.text:
            click.echo(chunk.text, nl=False)
        result.text += chunk.text
        result.tokens = chunk.n_tokens
        result.finish_reason = chunk.finish_reason
        result.seconds = time.perf_counter() - started - result.prompt_seconds
