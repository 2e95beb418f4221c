"""`adaptrt pack`: a base and adapters in one new file."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrt.adapters.base import open_base
from adaptrt.cli.notes import Progress, note, size_text
from adaptrt.cli.options import PATH, check_new, model_path
from adaptrt.cli.store import store_adapter
from adaptrt.format import Writer, open_file
from adaptrt.plugins import load_registry


@click.command()
@click.argument("out", type=PATH)
@click.argument("base")
@click.argument("adapters", type=PATH, nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(out: Path, base: str, adapters: tuple[Path, ...], force: bool) -> None:
    """Write OUT with everything in BASE and each ADAPTER, an .adrt file or a PEFT folder."""
    source = model_path(base)
    check_new(out, (source, *adapters), force)
    registry = load_registry()
    names = []
    with open_file(source) as file, Progress(f"packing {out}") as progress:
        view = open_base(file, registry.architectures)
        with Writer(out, file.metadata) as writer:
            steps = len(file.sections) + len(adapters)
            for done, section in enumerate(file.sections, start=1):
                writer.copy_section(file, section)
                progress(done, steps)
            for done, adapter in enumerate(adapters, start=len(file.sections) + 1):
                names.append(store_adapter(writer, adapter, None, view, registry))
                progress(done, steps)
    note(f"wrote {out} with adapters {', '.join(names)}, {size_text(out.stat().st_size)}")
