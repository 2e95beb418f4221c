"""`adaptrt convert`: a foreign folder becomes one `.adrt` file, by whichever importer knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from adaptrt.adapters.storage import PREFIX, list_adapters, read_adapter
from adaptrt.cli.notes import Progress, note, show_adapter_notes
from adaptrt.cli.options import PATH, check_new, grouped
from adaptrt.convert.base import ConvertOptions, Importer, WeightDtype
from adaptrt.errors import ConvertError
from adaptrt.format import open_file
from adaptrt.plugins import Registry, load_registry

DTYPE = click.Choice(get_args(WeightDtype))

convert_options = grouped(
    "options",
    dict,
    click.option("--base", type=PATH, metavar="BASE", help="The .adrt file that an adapter belongs to."),
    click.option("--dtype", type=DTYPE, help="Of the linear layers.  [default: nf4]"),
    click.option(
        "--head", type=DTYPE, help="Of the embedding and head.  [default: int8 if --dtype is quantized]"
    ),
    click.option("--name", help="The name to store.  [default: its own]"),
)


@click.command()
@click.argument("src", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, metavar="OUT.adrt", help="The file to write.")
@convert_options
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(src: Path, out: Path, options: dict[str, Any], force: bool) -> None:
    """Convert SRC, a Hugging Face model folder or a PEFT adapter folder, to an .adrt file."""
    if not src.exists():
        raise ConvertError(f"{src}: no such file or folder")
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
    note(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")


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
