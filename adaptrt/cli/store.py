"""Put adapters into a model's file: what `pack` and `adapter add` have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adaptrt.adapters.base import BaseView
from adaptrt.adapters.stack import check_lowers
from adaptrt.adapters.storage import (
    PREFIX,
    check_base,
    check_name,
    only_adapter,
    read_adapter,
    write_adapter,
)
from adaptrt.adapters.variant import Progress as TargetsDone
from adaptrt.adapters.variant import no_progress
from adaptrt.cli.notes import show_adapter_notes
from adaptrt.convert.peft import import_peft
from adaptrt.format import Appender, Writer, open_file
from adaptrt.plugins import Registry


def store_adapter(
    writer: Writer | Appender,
    source: Path,
    name: str | None,
    base: BaseView,
    registry: Registry,
    progress: TargetsDone = no_progress,
) -> str:
    """Copy an adapter file's section verbatim, or import a PEFT folder; returns the name it is stored under.

    Raises AdapterError, and BaseMismatchError for an adapter that was made for another base.
    """
    if source.is_dir():
        adapter = import_peft(source, registry.variants, base, name, progress=progress)
        check_lowers(adapter, registry.variants, base, progress)
        show_adapter_notes(adapter)
        write_adapter(writer, replace(adapter, base=base.record()))
        return adapter.name
    with open_file(source) as file:
        found = only_adapter(file)
        check_base(read_adapter(file, PREFIX + found), base)
        stored = found if name is None else name
        check_name(stored)
        writer.copy_section(file, PREFIX + found, PREFIX + stored)
    return stored
