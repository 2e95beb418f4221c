"""PEFT adapter folders: every key of the weights and every option of the config is honoured or refused.

How PEFT 0.21 names and uses what it saves is in spec/adapters.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptrt.adapters.base import BaseTarget, BaseView, open_base
from adaptrt.adapters.check import PEFT_PREFIX, REPLACED_BIAS, check_adapter
from adaptrt.adapters.lora import other_methods
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.stack import lower_each
from adaptrt.adapters.storage import check_name, write_adapter
from adaptrt.adapters.variant import Adapter, Module, Target, Variant
from adaptrt.convert.base import ConvertOptions, Progress
from adaptrt.convert.files import open_regular, parse_object, read_exactly
from adaptrt.convert.safetensors import SafetensorsFile, open_safetensors
from adaptrt.errors import AdapterError
from adaptrt.format import Writer, open_file
from adaptrt.tensor import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CONFIG_LIMIT = 4 << 20  # bytes

FROZEN_WEIGHT = "base_layer.weight"  # PEFT saves it when an embedding or head is targeted
BIASES = ("base_layer.bias", "bias")  # of an adapted module, of any other
ROWS_COMPARED = 64
LARGEST_DIFFERENCE = 0.3  # ‖theirs - ours‖ / ‖theirs‖; NF4 stays near 0.1, unrelated weights near 1.4


class PeftImporter:
    """Writes a PEFT folder as an adapter file."""

    name = "peft"

    def claims(self, path: Path) -> bool:
        """See Importer.claims."""
        return (path / CONFIG).is_file()

    def convert(self, src: Path, out: Path, options: ConvertOptions, progress: Progress) -> None:
        """Convert for the base `options.base`. Raises AdapterError or ConvertError naming what is wrong."""
        if options.base is None:
            raise AdapterError(f"{src}: an adapter needs the base it belongs to (--base BASE.adrt)")
        for key, value in (("dtype", options.dtype), ("head", options.head)):
            if value is not None:
                raise AdapterError(
                    f"{src}: an adapter keeps its own dtypes; option {key} goes with a model folder"
                )
        if out.exists() and out.samefile(options.base):
            raise AdapterError(f"{out}: is the base itself; an adapter goes into a file of its own")
        with open_file(options.base) as file:
            base = open_base(file, options.architectures)
            adapter = import_peft(src, options.variants, base, options.name)
            check_name(adapter.name)
            for _ in lower_each(adapter, options.variants, base, 1.0):
                pass  # what cannot be run is not written
            adapter = replace(adapter, base=base.record())
            with Writer(out, _file_metadata(adapter)) as writer:
                write_adapter(writer, adapter)
        total = sum(tensor.data.nbytes for tensor in adapter.tensors.values())
        for note in adapter.notes:
            progress(total, total, note)
        progress(total, total, f"{adapter.variant} adapter {adapter.name!r}, {len(adapter.targets)} targets")


def import_peft(
    folder: str | Path, variants: Mapping[str, Variant], base: BaseView, name: str | None = None
) -> Adapter:
    """Read a PEFT folder into memory and check it against the base. `name` is the folder's own unless given.

    Raises AdapterError naming everything that is not understood, ConvertError for files that cannot be read.
    """
    folder = Path(folder)
    text, config = _read_config(folder)
    variant = _find_variant(folder, config, variants)
    problems = Problems()
    variant.check_config(config, problems)
    sound = not problems.lines
    with _open_weights(folder) as file:
        content = _Content(file, base, problems)
        _take_common(config, content, base, problems)
        if sound:
            _take_targets(config, variant, content, problems)
        tensors = {key: content.load(key) for target in content.targets() for key in target.tensors.values()}
    adapter = Adapter(
        name=name or folder.resolve().name,
        variant=variant.name,
        targets=tuple(content.targets()),
        tensors=tensors,
        config_text=text,
        notes=tuple(content.notes),
    )
    if sound:
        check_adapter(adapter, variant, base.targets, problems)
    problems.raise_for(str(folder))
    return adapter


def _file_metadata(adapter: Adapter) -> dict[str, Any]:
    return {
        "general.type": "adapter",
        "general.architecture": adapter.base["architecture"],
        "general.name": adapter.name,
        "general.base_model.0.name": adapter.base["name"],
        "adapter.type": adapter.variant,
    }


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of adapter_config.json and its content."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder}: not a PEFT adapter folder, {CONFIG} is missing")
    file, size = open_regular(path)
    with file:
        if size > CONFIG_LIMIT:
            raise AdapterError(f"{path}: {size} bytes, expected at most {CONFIG_LIMIT}")
        text = bytearray(size)
        read_exactly(file, memoryview(text), path)
    config = parse_object(bytes(text), str(path))
    return text.decode(), config


def _find_variant(folder: Path, config: Mapping[str, Any], variants: Mapping[str, Variant]) -> Variant:
    claimed = [variant for _, variant in sorted(variants.items()) if variant.claims(config)]
    if len(claimed) == 1:
        return claimed[0]
    method = f"peft_type {brief(config.get('peft_type'))}"
    if switches := sorted(other_methods(config)):
        method += f" with {', '.join(switches)}"
    if claimed:
        raise AdapterError(f"{folder}: {method} is claimed by variants {', '.join(v.name for v in claimed)}")
    installed = ", ".join(sorted(variants)) or "none"
    raise AdapterError(
        f"{folder}: no installed variant handles {method}: it needs a variant plugin; installed: {installed}"
    )


def _open_weights(folder: Path) -> SafetensorsFile:
    if (folder / WEIGHTS).exists():
        return open_safetensors(folder / WEIGHTS)
    if (folder / PICKLED).exists():
        raise AdapterError(
            f"{folder}: has {PICKLED}, a pickle, which may run code; load it in PEFT once and save it with "
            f"save_pretrained(…, safe_serialization=True) to get {WEIGHTS}"
        )
    raise AdapterError(f"{folder}: {WEIGHTS} is missing")


class _Lazy(Mapping[str, Tensor]):
    """Tensors by name, each loaded when it is indexed."""

    def __init__(self, content: _Content, keys: Mapping[str, str]) -> None:
        self._content, self._keys = content, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._content.load(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass
class _Part:
    """What the file holds for one module: `keys` still to be taken by suffix, and what was taken."""

    base: BaseTarget
    keys: dict[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)  # role → PEFT key


class _Content:
    """The keys of an adapter's weights, sorted by the base's modules."""

    def __init__(self, file: SafetensorsFile, base: BaseView, problems: Problems) -> None:
        self.file = file
        self.notes: list[str] = []
        self.parts: dict[str, _Part] = {}  # by module path
        self.shared: dict[str, str] = {}  # keys of no module, by themselves
        self._loaded: dict[str, Tensor] = {}
        for key in file.names:
            module, suffix = _split(key, base)
            if module is None and key.startswith(PEFT_PREFIX):
                problems.add(f"{brief(key)} belongs to no module of the base that can be adapted")
                continue
            if module is None:
                self.shared[suffix] = key
                continue
            part = self.parts.setdefault(module, _Part(base.modules[module], {}))
            if part.keys.setdefault(suffix, key) != key:
                problems.add(f"{brief(key)} and {brief(part.keys[suffix])} name the same tensor")
        self.parts = {module: self.parts[module] for module in base.modules if module in self.parts}

    def load(self, key: str) -> Tensor:
        """A tensor by its PEFT key, read once."""
        if key not in self._loaded:
            self._loaded[key] = self.file.tensor(key)
        return self._loaded[key]

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor of no module that the file does not hold."""
        self.shared[key] = key
        self._loaded[key] = tensor

    def targets(self) -> list[Target]:
        """What was resolved, in the base's order of modules."""
        return [
            Target(part.base.target, part.params, part.roles) for part in self.parts.values() if part.roles
        ]


def _split(key: str, base: BaseView) -> tuple[str | None, str]:
    """A PEFT key as (module path, suffix); (None, key) when no module of the base is in it.

    The adapter's name `default` is dropped: PEFT saves without it, but a raw state dict has it.
    """
    plain = re.sub(r"\.default(?=\.|$)", "", key)
    path = plain.removeprefix(PEFT_PREFIX)
    end = len(path) if path != plain else 0
    while end > 0:
        end = path.rfind(".", 0, end)
        if path[: max(end, 0)] in base.modules:
            return path[:end], path[end + 1 :]
    return None, plain


def _take_common(config: Mapping[str, Any], content: _Content, base: BaseView, problems: Problems) -> None:
    """What any PEFT method may save: frozen copies of the base, replaced biases, a tied adapter."""
    for module, part in content.parts.items():
        if FROZEN_WEIGHT in part.keys:
            problem = _frozen_problem(content.file, part.keys[FROZEN_WEIGHT], part.base)
            if problem:
                problems.add(f"{module}.{FROZEN_WEIGHT} {problem}")
            del part.keys[FROZEN_WEIGHT]
            content.notes.append(f"{module}.{FROZEN_WEIGHT} left out: a frozen copy of the base")
        for suffix in BIASES:
            if config.get("bias", "none") != "none" and suffix in part.keys:
                part.roles[REPLACED_BIAS] = part.keys.pop(suffix)
    if config.get("ensure_weight_tying"):
        _check_tying(content, base, problems)


def _frozen_problem(file: SafetensorsFile, key: str, base: BaseTarget) -> str | None:
    """Why a saved base weight is no copy of our base's, judged by its shape and its first rows."""
    _, shape = file.info(key)
    if shape != base.shape:
        return f"is {list(shape)}, expected the base's {list(base.shape)}: another vocabulary or base"
    ours = base.rows(0, min(ROWS_COMPARED, base.shape[0]))
    theirs = next(file.chunks(key, ours.size), np.zeros(0, np.float32)).reshape(ours.shape)
    difference = float(np.linalg.norm(theirs - ours)) / max(float(np.linalg.norm(theirs)), 1e-30)
    if not difference <= LARGEST_DIFFERENCE:
        return (
            f"differs from the base by {difference:.0%} in its first {len(ours)} rows, expected at most "
            f"{LARGEST_DIFFERENCE:.0%}: the adapter was made on another base"
        )
    return None


def _check_tying(content: _Content, base: BaseView, problems: Problems) -> None:
    """With a tied base PEFT shares one adapter between embedding and head, and saves it under both."""
    ends = {target.kind: target for target in base.targets.values() if target.kind in ("embedding", "head")}
    if len({target.weight_name for target in ends.values()}) == 1:
        adapted = [target.module in content.parts for target in ends.values()]
        if any(adapted) and not all(adapted):
            modules = " and ".join(target.module for target in ends.values())
            problems.add(f"option 'ensure_weight_tying' = True: expected tensors of both {modules}")


def _take_targets(config: Mapping[str, Any], variant: Variant, content: _Content, problems: Problems) -> None:
    """Let the variant resolve each module and refuse what is missing or left over."""
    shared = _Lazy(content, content.shared)
    parts = {path: part for path, part in content.parts.items() if part.keys}
    modules = {
        path: Module(path, part.base, _Lazy(content, part.keys), shared) for path, part in parts.items()
    }
    for name, tensor in variant.complete(config, list(modules.values()), problems).items():
        content.add(name, tensor)
        content.notes.append(f"{name} is not in the folder; variant {variant.name} computed it")
    used: set[str] = set()
    discarded: dict[tuple[str, str], list[str]] = {}  # (suffix, reason) → paths
    for path, module in modules.items():
        part = parts[path]
        part.params, roles = variant.resolve(config, module, problems.about(path))
        for role, name in roles.items():
            key = part.keys.get(name) or content.shared.get(name)
            if key is None:
                problems.add(f"{path}.{name} is missing")
            else:
                part.roles[role] = key
        for suffix, reason in module.discarded.items():
            discarded.setdefault((suffix, reason), []).append(path)
        for suffix in sorted(part.keys.keys() - set(roles.values()) - module.discarded.keys()):
            problems.add(f"{path}.{brief(suffix)[1:-1]} is not understood by variant {variant.name}")
        used.update(roles.values())
    for (suffix, reason), paths in discarded.items():
        what = f"{paths[0]}.{suffix}" if len(paths) == 1 else f"{suffix} of {len(paths)} modules"
        content.notes.append(f"{what} left out: {reason}")
    for name in sorted(content.shared.keys() - used):
        problems.add(f"{brief(name)} is not understood by variant {variant.name}")
