"""`adaptrt convert`: a foreign folder becomes one `.adrt` file, and an adapter file a PEFT folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from adaptrt.adapters.storage import PREFIX, list_adapters, only_adapter, read_adapter
from adaptrt.adapters.stored import AdapterDtype
from adaptrt.cli.notes import SOON, Progress, note, show_adapter_notes, size_text
from adaptrt.cli.options import PATH, check_new, grouped, model_path
from adaptrt.convert.base import ConvertOptions, Importer, WeightDtype
from adaptrt.convert.to_peft import export_peft
from adaptrt.errors import ConvertError
from adaptrt.format import open_file
from adaptrt.plugins import Registry, load_registry

DTYPE = click.Choice(get_args(WeightDtype))

convert_options = grouped(
    "options",
    dict,
    click.option(
        "--base",
        callback=lambda _ctx, _param, text: model_path(text) if text else None,
        metavar="BASE",
        help="The .adrt file that an adapter belongs to.",
    ),
    click.option("--dtype", type=DTYPE, help="Of the linear layers.  [default: nf4]"),
    click.option(
        "--head", type=DTYPE, help="Of the embedding and head.  [default: int8 if --dtype is quantized]"
    ),
    click.option(
        "--adapter-dtype",
        type=click.Choice(get_args(AdapterDtype)),
        help="Of an adapter's large tensors; prints what it costs.  [default: as stored]",
    ),
    click.option(
        "--initial",
        type=PATH,
        metavar="DIR",
        help="For PiSSA, OLoRA, CorDA and LoRA-GA: the adapter as it was initialised.  [default: DIR/*_init]",
    ),
    click.option("--name", help="The name to store.  [default: its own]"),
)


@click.command()
@click.argument("src", type=PATH)
@click.option(
    "-o", "--out", type=PATH, required=True, metavar="OUT", help="The .adrt file, or with --to the folder."
)
@click.option("--to", type=click.Choice(["peft"]), help="Write an adapter file as a PEFT folder.")
@convert_options
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(src: Path, out: Path, to: str | None, options: dict[str, Any], force: bool) -> None:
    """Convert SRC, a Hugging Face model folder or a PEFT adapter folder, to an .adrt file.

    With --to peft SRC is an .adrt adapter file instead, and OUT a new PEFT folder.
    """
    if not src.exists():
        raise ConvertError(f"{src}: no such file or folder")
    if to is not None:
        _export(src, out, {**options, "force": force or None})
        return
    base = options["base"]
    check_new(out, [src, *([base] if base else [])], force)
    registry = load_registry()
    importer = _choose(registry, src)
    everything = ConvertOptions(**options, architectures=registry.architectures, variants=registry.variants)
    with Progress(f"converting {src}") as progress:
        importer.convert(src, out, everything, progress)
    with open_file(out) as file:
        for name in list_adapters(file):
            show_adapter_notes(read_adapter(file, PREFIX + name))
    note(f"wrote {out}, {size_text(out.stat().st_size)}")


def _export(src: Path, out: Path, options: dict[str, Any]) -> None:
    for key, value in options.items():
        if value is not None:
            raise ConvertError(f"{src}: option {key} does not go with --to peft")
    with open_file(src) as file:
        with Progress(f"exporting {src}", after=SOON):
            adapter = read_adapter(file, PREFIX + only_adapter(file))
            lines = export_peft(adapter, load_registry().variants, out)
        for line in lines:
            note(f"adapter {adapter.name}: {line}")
    note(f"wrote {out}")


def _choose(registry: Registry, src: Path) -> Importer:
    claims = [importer for importer in registry.importers.values() if importer.claims(src)]
    if len(claims) == 1:
        return claims[0]
    if claims:
        names = " and ".join(importer.name for importer in claims)
        raise ConvertError(f"{src}: importers {names} both claim it, expected one")
    raise ConvertError(
        f"{src}: not a model or adapter folder (no config.json, no adapter_config.json); "
        f"importers: {', '.join(registry.importers)}"
    )
