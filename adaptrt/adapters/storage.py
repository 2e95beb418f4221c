"""Adapters as sections of an `.adrt` file: `adapter/NAME`, with PEFT's own tensor names and config text.

The section's metadata is {variant, config, targets: [{target, params, tensors}], base, notes}; what each
means is in spec/adapters.md, "Storage".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from adaptrt.adapters.base import DIGEST_DIGITS, BaseView
from adaptrt.adapters.derive import DERIVED
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.variant import Adapter, Target
from adaptrt.errors import AdapterError, BaseMismatchError
from adaptrt.format import File, SectionWriter
from adaptrt.tensor import Tensor

KIND = "adapter"
PREFIX = "adapter/"
MAX_NAME = 100
SHOWN_TENSORS = 3  # of those that differ in another base

_FIELDS: Mapping[str, type] = {"variant": str, "config": str, "targets": list, "base": dict, "notes": list}
_TARGET: Mapping[str, type] = {"target": str, "params": dict, "tensors": dict}
_BASE: Mapping[str, type] = {"fingerprint": str, "architecture": str, "name": str, "tensors": dict}


class SectionTaker(Protocol):
    """What `write_adapter` writes to: a format Writer or Appender."""

    def section(
        self, name: str, *, kind: str, critical: bool, codec: str, metadata: Mapping[str, Any]
    ) -> AbstractContextManager[SectionWriter]:
        """Open a section."""


def check_name(name: str) -> None:
    """Refuse a name that a command line or a section name cannot carry. Raises AdapterError."""
    fits = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()
    if not fits or set(name) & set("/\\:"):
        raise AdapterError(
            f"adapter name {brief(name)}: expected 1 to {MAX_NAME} printable characters without / \\ and :, "
            "and no space at either end"
        )


def write_adapter(writer: SectionTaker, adapter: Adapter) -> None:
    """Store an adapter as the section `adapter/NAME`. The same adapter gives the same bytes."""
    check_name(adapter.name)
    metadata = {
        "variant": adapter.variant,
        "config": adapter.config_text,
        "targets": [
            {"target": t.target, "params": dict(t.params), "tensors": dict(t.tensors)}
            for t in adapter.targets
        ],
        "base": dict(adapter.base),
        "notes": list(adapter.notes),
    }
    name = PREFIX + adapter.name
    with writer.section(name, kind=KIND, critical=False, codec="zstd", metadata=metadata) as section:
        for tensor in sorted(adapter.tensors):
            section.add(tensor, adapter.tensors[tensor])


def list_adapters(file: File) -> list[str]:
    """Names of the adapters in a file, in file order."""
    return [
        name.removeprefix(PREFIX)
        for name, section in file.sections.items()
        if section.kind == KIND and name.startswith(PREFIX)
    ]


def only_adapter(file: File) -> str:
    """The name of a file's one adapter. Raises AdapterError when there are none or several."""
    names = list_adapters(file)
    if len(names) != 1:
        listed = f" ({', '.join(names)})" if names else ""
        raise AdapterError(f"{file.path}: found {len(names)} adapters{listed}, expected one")
    return names[0]


def read_adapter(file: File, section_name: str) -> Adapter:
    """The adapter in a section, checked as far as that needs no base and no variant; `lower` does that.

    Raises AdapterError naming everything that is malformed, MissingError when there is no such section, and
    another FormatError when its bytes are damaged.
    """
    section = file.section(section_name)
    what = f"{file.path}: {section_name}"
    if section.kind != KIND or not section_name.startswith(PREFIX):
        raise AdapterError(f"{what}: section of kind {brief(section.kind)}, expected an adapter")
    problems = Problems()
    _check_fields(section.metadata, _FIELDS, problems)
    problems.raise_for(what)
    metadata = section.metadata
    tensors = file.read_section(section_name)
    targets = _read_targets(metadata["targets"], tensors, problems)
    if metadata["base"]:
        _check_base_record(metadata["base"], problems.about("base"))
    elif derived := sorted(name for name in tensors if name.startswith(DERIVED)):
        problems.add(f"base is empty, expected the one that {brief(derived[0])} was derived from")
    if not all(isinstance(note, str) for note in metadata["notes"]):
        problems.add("notes are not all strings")
    problems.raise_for(what)
    return Adapter(
        name=section_name.removeprefix(PREFIX),
        variant=metadata["variant"],
        targets=targets,
        tensors=tensors,
        config_text=metadata["config"],
        base=metadata["base"],
        notes=tuple(metadata["notes"]),
    )


def check_base(adapter: Adapter, base: BaseView) -> None:
    """Raises BaseMismatchError saying what differs when the adapter was converted for another base."""
    record = adapter.base
    same = (base.fingerprint, base.architecture)
    if not record or (record["fingerprint"], record["architecture"]) == same:
        return
    theirs = _base_line(record["name"], record["architecture"], record["fingerprint"])
    ours = _base_line(base.name, base.architecture, base.fingerprint)
    raise BaseMismatchError(
        f"adapter {adapter.name!r} belongs to another base, {theirs}: "
        f"this one, {ours}, {_difference(record['tensors'], base.tensors)}"
    )


def _base_line(name: str, architecture: str, fingerprint: str) -> str:
    return f"{brief(name)} ({architecture}, {fingerprint[:DIGEST_DIGITS]})"


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = dict.fromkeys([*ours, *theirs])
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    shown = [
        f"{name} is {_described(ours.get(name))} here, expected {_described(theirs.get(name))}"
        for name in differing[:SHOWN_TENSORS]
    ]
    more = len(differing) - len(shown)
    tail = [f"and {more} more"] if more else []
    return f"differs in {len(differing)} of {len(names)} tensors: {'; '.join(shown + tail)}"


def _described(entry: Any) -> str:
    return "absent" if entry is None else f"{entry[0]} {entry[1]} {entry[2]}"


def _check_fields(value: Any, types: Mapping[str, type], problems: Problems) -> bool:
    """Whether `value` is an object with exactly these fields of these types."""
    if not isinstance(value, dict) or value.keys() != types.keys():
        problems.add(
            f"found {brief(sorted(value) if isinstance(value, dict) else value)}, expected {sorted(types)}"
        )
        return False
    wrong = [key for key, kind in types.items() if type(value[key]) is not kind]
    for key in wrong:
        problems.add(f"{key} is {brief(value[key])}, expected {types[key].__name__}")
    return not wrong


def _read_targets(items: list[Any], tensors: Mapping[str, Tensor], problems: Problems) -> tuple[Target, ...]:
    targets: dict[str, Target] = {}
    used: set[str] = set()
    for number, item in enumerate(items):
        if not _check_fields(item, _TARGET, problems.about(f"targets[{number}]")):
            continue
        target = Target(item["target"], item["params"], item["tensors"])
        about = problems.about(brief(target.target)[1:-1])
        if target.target in targets:
            about.add("listed twice")
        _check_target(target, tensors, about)
        targets[target.target] = target
        used.update(name for name in target.tensors.values() if isinstance(name, str))
    for name in sorted(tensors.keys() - used):
        problems.add(f"tensor {brief(name)} belongs to no target")
    return tuple(targets.values())


def _check_target(target: Target, tensors: Mapping[str, Tensor], problems: Problems) -> None:
    if not target.tensors:
        problems.add("has no tensors")
    for name, value in target.params.items():
        scalar = isinstance(value, str | bool) or type(value) is int
        if not scalar and not (type(value) is float and math.isfinite(value)):
            problems.add(
                f"param {brief(name)} is {brief(value)}, expected a finite number, a string or a boolean"
            )
    for role, tensor in target.tensors.items():
        if not isinstance(tensor, str) or tensor not in tensors:
            problems.add(f"role {brief(role)} names tensor {brief(tensor)}, which is missing")


def _check_base_record(record: Any, problems: Problems) -> None:
    if not _check_fields(record, _BASE, problems):
        return
    for name, entry in record["tensors"].items():
        kinds = [type(part) for part in entry] if isinstance(entry, list) else []
        if kinds != [str, list, str] or not all(type(size) is int for size in entry[1]):
            problems.add(f"{brief(name)} is {brief(entry)}, expected [dtype, shape, digest]")
