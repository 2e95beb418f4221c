"""`adaptrt adapter add|remove|list|combine`: what is inside a file, whose base stays as it is; one of several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from adaptrt.adapters.algebra import Combination, Recipe, SignMethod, combine
from adaptrt.adapters.base import open_base
from adaptrt.adapters.stack import check_lowers
from adaptrt.adapters.storage import PREFIX, check_name, list_adapters
from adaptrt.api import find_adapter
from adaptrt.cli.inspect import adapter_line, describe_adapter
from adaptrt.cli.notes import SOON, Progress, note, printable, size_text
from adaptrt.cli.options import PATH, as_json, check_new, grouped, model_path, parse_adapter
from adaptrt.cli.store import store_adapter
from adaptrt.convert.peft import write_adapter_file
from adaptrt.errors import UnknownAdapterError
from adaptrt.format import append, open_file
from adaptrt.plugins import load_registry


@click.group()
def command() -> None:
    """Add, remove or list the adapters inside a file; combine several into one."""


@command.command()
@click.argument("file", type=PATH)
@click.argument("adapter", type=PATH)
@click.option("--name", help="The name to store it under.  [default: its own]")
def add(file: Path, adapter: Path, name: str | None) -> None:
    """Append ADAPTER, an .adrt file or a PEFT folder, to FILE."""
    registry = load_registry()
    with (
        open_file(file) as model,
        append(file) as appender,
        Progress(f"adding {adapter}", after=SOON) as progress,
    ):
        base = open_base(model, registry.architectures)
        stored = store_adapter(appender, adapter, name, base, registry, progress)
    note(f"added adapter {stored} to {file}")


@command.command()
@click.argument("file", type=PATH)
@click.argument("name")
def remove(file: Path, name: str) -> None:
    """Remove the adapter NAME from FILE. Its bytes stay until the file is packed anew."""
    with append(file) as appender, open_file(file) as model:
        names = list_adapters(model)
        if name not in names:
            raise UnknownAdapterError(
                f"{file}: has no adapter {name!r}; it has: {', '.join(names) or 'none'}"
            )
        appender.remove(PREFIX + name)
    note(f"removed adapter {name} from {file}")


def _build_recipe(**values: Any) -> Recipe:
    return Recipe(**values)


recipe_options = grouped(
    "recipe",
    _build_recipe,
    click.option(
        "--type",
        "combination_type",
        type=click.Choice(get_args(Combination)),
        default="svd",
        show_default=True,
        help="How, by PEFT's names.",
    ),
    click.option("--rank", "svd_rank", type=int, help="Of the result, for svd.  [default: the largest]"),
    click.option(
        "--density", type=float, help="The share of values to keep, for ties, dare and magnitude_prune."
    ),
    click.option(
        "--sign",
        "majority_sign_method",
        type=click.Choice(get_args(SignMethod)),
        default="total",
        show_default=True,
        help="What elects a sign, for ties.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="What dare drops."),
)


@command.command("combine")
@click.argument("out", type=PATH, metavar="OUT.adrt")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("--base", required=True, metavar="BASE", help="The .adrt file that they belong to.")
@recipe_options
@click.option("--name", help="The name to store.  [default: OUT's]")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def combine_command(
    out: Path, adapters: tuple[str, ...], base: str, recipe: Recipe, name: str | None, force: bool
) -> None:
    """Make one LoRA of several LoRAs and rsLoRAs: .adrt files, PEFT folders or names inside BASE."""
    source, choices = model_path(base), [parse_adapter(text) for text in adapters]
    check_new(out, [source, *(Path(choice.source) for choice in choices)], force)
    name = out.stem if name is None else name
    check_name(name)
    registry = load_registry()
    with ExitStack() as cleanup:
        file = cleanup.enter_context(open_file(source))
        view = open_base(file, registry.architectures)
        found = [find_adapter(choice.source, file, view, registry.variants, cleanup) for choice in choices]
        weights = [choice.scale for choice in choices]
        with Progress(f"combining into {out}") as progress:
            for one in found:
                check_lowers(one, registry.variants, view)
            adapter = combine(found, weights, name, recipe, progress)
            check_lowers(adapter, registry.variants, view)
            write_adapter_file(out, replace(adapter, base=view.record()))
    note(f"wrote {out}, {size_text(out.stat().st_size)}")


@command.command("list")
@click.argument("file")
@as_json
def list_command(file: str, as_json: bool) -> None:
    """List the adapters inside FILE."""
    with open_file(model_path(file)) as model:
        adapters = [describe_adapter(model, name) for name in list_adapters(model)]
    if as_json:
        click.echo(json.dumps(adapters, ensure_ascii=False))
    else:
        click.echo("".join(f"{printable(adapter_line(adapter))}\n" for adapter in adapters), nl=False)
