"""`adaptrt eval`: perplexity over a text."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from adaptrt.cli.notes import Progress, note
from adaptrt.cli.options import (
    PATH,
    AdapterChoice,
    Loading,
    adapter_option,
    as_json,
    loading_options,
    read_text,
)


@click.command()
@click.argument("model")
@click.option("--text", required=True, type=PATH, metavar="FILE", help="UTF-8 text to score.")
@click.option(
    "--ctx", type=int, metavar="N", help="Tokens in a window.  [default: the context, at most 2048]"
)
@adapter_option
@loading_options
@as_json
def command(
    model: str, text: Path, ctx: int | None, adapters: list[AdapterChoice], loading: Loading, as_json: bool
) -> None:
    """Print the perplexity of MODEL over a text, cut into windows that are scored one by one."""
    words = read_text(text)
    with loading.open(model) as (loaded, attached):
        stack = attached.stack(adapters)
        note(f"{model}: {loaded.describe()}")
        started = time.perf_counter()
        with Progress(f"scoring {text}") as progress:
            perplexity = loaded.perplexity(words, adapters=stack, ctx=ctx, progress=progress)
        seconds = time.perf_counter() - started
    if as_json:
        result = {
            "model": model,
            "text": str(text),
            "adapters": stack,
            "perplexity": perplexity,
            "seconds": seconds,
        }
        click.echo(json.dumps(result))
    else:
        click.echo(f"{perplexity:.4f}")
