"""`adaptrt merge`: a base and adapters become one model, an `.adrt` file or a Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import click

from adaptrt.adapters.base import open_base
from adaptrt.api import find_adapter
from adaptrt.cli.notes import SOON, Progress, note, show_adapter_notes
from adaptrt.cli.options import PATH, check_new, model_path, parse_adapter
from adaptrt.convert.merge import MergedModel, merge_model, quantization_error, write_merged
from adaptrt.convert.to_hf import FullDtype, write_hf
from adaptrt.errors import ConvertError
from adaptrt.format import open_file
from adaptrt.model.architecture import Architecture
from adaptrt.plugins import load_registry


@click.command()
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:SCALE]...")
@click.option("-o", "--out", type=PATH, required=True, metavar="OUT", help="The file or folder to write.")
@click.option(
    "--to", type=click.Choice(["adrt", "hf"]), default="adrt", show_default=True, help="What OUT is."
)
@click.option(
    "--dtype", type=click.Choice(get_args(FullDtype)), help="Of a Hugging Face folder.  [default: f32]"
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a file that exists.")
def command(
    base: str, adapters: tuple[str, ...], out: Path, to: str, dtype: FullDtype | None, force: bool
) -> None:
    """Fold ADAPTERs, stacked in this order, each at its scale, into BASE.

    An .adrt file keeps the base's data types, so what changed is quantized anew: the error that makes is printed. With
    --to hf OUT is a new folder in full precision, which transformers loads.
    """
    if dtype is not None and to == "adrt":
        raise ConvertError(f"{out}: option dtype goes with --to hf; an .adrt file keeps the base's own")
    source, choices = model_path(base), [parse_adapter(text) for text in adapters]
    if to == "adrt":
        check_new(out, [source, *(Path(choice.source) for choice in choices)], force)
    elif force:
        raise ConvertError(f"{out}: option force goes with an .adrt file; a folder must be new")
    registry = load_registry()
    with ExitStack() as cleanup:
        file = cleanup.enter_context(open_file(source))
        view = open_base(file, registry.architectures)
        architecture = registry.architectures[view.architecture]
        stack = []
        with Progress("preparing the adapters", after=SOON) as progress:
            for choice in choices:
                adapter = find_adapter(choice.source, file, view, registry.variants, cleanup, progress)
                stack.append((adapter, choice.scale))
            model = merge_model(file, architecture, view, stack, registry.variants, progress)
        for adapter, _ in stack:
            show_adapter_notes(adapter)
        if to == "hf":
            with Progress(f"merging into {out}") as progress:
                write_hf(model, architecture, out, dtype or "f32", progress)
        else:
            _write_file(model, architecture, out)
    note(f"wrote {out}")


def _write_file(model: MergedModel, architecture: Architecture, out: Path) -> None:
    with Progress(f"merging into {out}") as progress:
        write_merged(model, out, progress)
    with Progress("reading it back") as progress:
        error = quantization_error(model, out, architecture, progress)
    note(f"quantizing the merged weights anew changed them by {error:.2e} of their norm")
