"""Put adapters into a model's file: what `pack` and `adapter add` have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adaptrt.adapters.base import BaseView
from adaptrt.adapters.storage import (
    PREFIX,
    check_base,
    check_name,
    list_adapters,
    read_adapter,
    write_adapter,
)
from adaptrt.cli.notes import show_adapter_notes
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdapterError
from adaptrt.format import Appender, Writer, open_file
from adaptrt.plugins import Registry


def store_adapter(
    writer: Writer | Appender, source: Path, name: str | None, base: BaseView, registry: Registry
) -> str:
    """Copy an adapter file's section verbatim, or import a PEFT folder; returns the name it is stored under.

    Raises AdapterError, and BaseMismatchError for an adapter that was made for another base.
    """
    if source.is_dir():
        adapter = import_peft(source, registry.variants, base, name)
        show_adapter_notes(adapter)
        write_adapter(writer, replace(adapter, base=base.record()))
        return adapter.name
    with open_file(source) as file:
        names = list_adapters(file)
        if len(names) != 1:
            raise AdapterError(f"{source}: found {len(names)} adapters, expected one")
        check_base(read_adapter(file, PREFIX + names[0]), base)
        stored = name or names[0]
        check_name(stored)
        writer.copy_section(file, PREFIX + names[0], PREFIX + stored)
    return stored
