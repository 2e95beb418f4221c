"""`adaptrt adapter add|remove|list`: the adapters inside a file; its base is neither moved nor rewritten."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adaptrt.adapters.base import open_base
from adaptrt.adapters.storage import PREFIX, list_adapters
from adaptrt.cli.inspect import adapter_line, describe_adapter
from adaptrt.cli.notes import note
from adaptrt.cli.options import PATH, as_json, model_path
from adaptrt.cli.store import store_adapter
from adaptrt.errors import UnknownAdapterError
from adaptrt.format import append, open_file
from adaptrt.plugins import load_registry


@click.group()
def command() -> None:
    """Add, remove or list the adapters inside a file."""


@command.command()
@click.argument("file", type=PATH)
@click.argument("adapter", type=PATH)
@click.option("--name", help="The name to store it under.  [default: its own]")
def add(file: Path, adapter: Path, name: str | None) -> None:
    """Append ADAPTER, an .adrt file or a PEFT folder, to FILE."""
    registry = load_registry()
    with open_file(file) as model, append(file) as appender:
        stored = store_adapter(appender, adapter, name, open_base(model, registry.architectures), registry)
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
        click.echo("".join(f"{adapter_line(adapter)}\n" for adapter in adapters), nl=False)
