"""`adaptrt inspect`: what is inside a file, in words or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from adaptrt.adapters.storage import list_adapters, read_adapter
from adaptrt.cli.notes import printable, size_text
from adaptrt.cli.options import as_json, model_path
from adaptrt.format import File, open_file

LONGEST_VALUE = 100  # characters of a metadata value that are shown
FINGERPRINT_DIGITS = 16  # shown where a whole one would fill the line


@click.command()
@click.argument("file")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@as_json
def command(file: str, tensors: bool, as_json: bool) -> None:
    """Show what is inside FILE: sizes, metadata, sections and adapters. Contents are checked by `verify`."""
    with open_file(model_path(file)) as opened:
        content = describe(opened, tensors)
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False))
    else:
        click.echo("\n".join(map(printable, _lines(content))))


def describe(file: File, tensors: bool) -> dict[str, Any]:
    """Everything `inspect` shows, as JSON values."""
    base = file.sections.get("base")
    return {
        "path": str(file.path),
        "bytes": file.size,
        "generation": file.committed.slot.generation,
        "fingerprint": base.digest if base else None,
        "metadata": file.metadata,
        "sections": [_section(file, name, tensors) for name in file.sections],
        "adapters": [describe_adapter(file, name) for name in list_adapters(file)],
        "warnings": file.warnings,
    }


def _section(file: File, name: str, tensors: bool) -> dict[str, Any]:
    section = file.sections[name]
    fields: dict[str, Any] = {
        "name": name,
        "kind": section.kind,
        "codec": section.codec,
        "bytes": section.bytes,
        "stored_bytes": section.stored_bytes,
        "digest": section.digest,
        "dtypes": dict(Counter(entry.dtype for entry in section.tensors.values())),
    }
    if tensors:
        fields["tensors"] = [
            {"name": entry.name, "dtype": entry.dtype, "shape": entry.shape, "bytes": entry.nbytes}
            for entry in section.tensors.values()
        ]
    return fields


def describe_adapter(file: File, name: str) -> dict[str, Any]:
    """One stored adapter: method, size, the base it belongs to, and every target with its parameters."""
    section = f"adapter/{name}"
    adapter = read_adapter(file, section)
    return {
        "name": name,
        "variant": adapter.variant,
        "stored_bytes": file.sections[section].stored_bytes,
        "base": {key: value for key, value in adapter.base.items() if key != "tensors"},
        "notes": list(adapter.notes),
        "targets": [{"target": target.target, **target.params} for target in adapter.targets],
    }


def _lines(content: dict[str, Any]) -> list[str]:
    lines = [f"{content['path']}: {size_text(content['bytes'])}, generation {content['generation']}"]
    lines += [f"warning: {warning}" for warning in content["warnings"]]
    if content["fingerprint"]:
        lines.append(f"fingerprint {content['fingerprint']}")
    lines += ["", "metadata"]
    lines += [f"  {key} = {_short(value)}" for key, value in content["metadata"].items()]
    lines += ["", "sections"]
    for section in content["sections"]:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in section["dtypes"].items())
        lines.append(
            f"  {section['name']}: {size_text(section['stored_bytes'])} {section['codec']}, tensors: {dtypes}"
        )
        for tensor in section.get("tensors", ()):
            lines.append(
                f"    {tensor['name']} {tensor['dtype']} {list(tensor['shape'])} {size_text(tensor['bytes'])}"
            )
    if content["adapters"]:
        lines += ["", "adapters", *(f"  {adapter_line(adapter)}" for adapter in content["adapters"])]
    return lines


def adapter_line(adapter: dict[str, Any]) -> str:
    """A stored adapter in one line: method, size, parameters and targets, the layers of each counted."""
    params: dict[str, set[Any]] = {}
    kinds: Counter[str] = Counter()
    for target in adapter["targets"]:
        kinds[target["target"].rpartition(".")[2]] += 1
        for key, value in target.items():
            if key != "target":
                params.setdefault(key, set()).add(value)
    parts = [adapter["variant"], size_text(adapter["stored_bytes"])]
    parts += [f"{key} {' '.join(sorted(map(_plain, found)))}" for key, found in params.items()]
    parts.append("targets " + ", ".join(f"{kind} ×{count}" for kind, count in kinds.items()))
    if adapter["base"]:
        parts.append(f"base {adapter['base']['name']} {adapter['base']['fingerprint'][:FINGERPRINT_DIGITS]}")
    return f"{adapter['name']}: {'; '.join([*parts, *adapter['notes']])}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text)} characters)"
