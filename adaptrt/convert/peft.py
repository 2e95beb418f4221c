"""PEFT adapter folders: every key of the weights and every option of the config is honoured or refused.

How PEFT 0.21 names and uses what it saves is in spec/adapters.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrt.adapters.base import BaseView, open_base
from adaptrt.adapters.check import PEFT_PREFIX, check_adapter
from adaptrt.adapters.derive import with_derived
from adaptrt.adapters.lora import other_methods
from adaptrt.adapters.options import names
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.stack import check_lowers, lower
from adaptrt.adapters.storage import check_name, write_adapter
from adaptrt.adapters.stored import AdapterDtype, convert_tensors
from adaptrt.adapters.variant import Adapter, Module, Variant, no_progress
from adaptrt.adapters.variant import Progress as TargetsDone
from adaptrt.convert.base import ConvertOptions, Progress
from adaptrt.convert.files import open_regular, parse_object, read_exactly
from adaptrt.convert.measure import TOKENS, logit_error
from adaptrt.convert.peft_carried import take_carried
from adaptrt.convert.peft_content import Content, Lazy
from adaptrt.convert.peft_initial import DoubledWeights, changed_base, doubled_config, find_initial
from adaptrt.convert.safetensors import SafetensorsFile, open_safetensors
from adaptrt.errors import AdapterError
from adaptrt.format import Writer, open_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CONFIG_LIMIT = 4 << 20  # bytes
INITIAL_NOTE = (
    "its initialisation changed the base: converted to LoRA of twice the rank on the unchanged base"
)

NO_CHANGE = (  # PEFT's methods that are not changes of layers
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip

log = logging.getLogger("adaptrt.convert")


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

            def targets_done(done: int, total: int) -> None:
                progress(done, total, "")

            adapter = import_peft(src, options.variants, base, options.name, options.initial, targets_done)
            check_name(adapter.name)
            if options.adapter_dtype is None:
                check_lowers(adapter, options.variants, base, targets_done)
            else:
                adapter = _with_dtype(adapter, base, options.variants, options.adapter_dtype, targets_done)
            adapter = replace(adapter, base=base.record())
            write_adapter_file(out, adapter)
        total = sum(tensor.data.nbytes for tensor in adapter.tensors.values())
        for note in adapter.notes:
            progress(total, total, note)
        progress(total, total, f"{adapter.variant} adapter {adapter.name!r}, {len(adapter.targets)} targets")


def _with_dtype(
    adapter: Adapter,
    base: BaseView,
    variants: Mapping[str, Variant],
    dtype: AdapterDtype,
    progress: TargetsDone,
) -> Adapter:
    """The adapter with its large tensors in another dtype; says what that does to the logits."""
    variant = variants[adapter.variant]
    converted = with_derived(convert_tensors(adapter, variant, dtype), variant, base.targets, progress)
    before, after = (lower(one, variants, base, 1.0, progress) for one in (adapter, converted))
    error = logit_error(base, before, after)
    cost = f"moves the logits by {error:.2e} of their norm ({TOKENS} random token ids, float32)"
    log.info("%s: stored as %s, it %s", adapter.name, dtype, cost)
    return converted


def import_peft(
    folder: str | Path,
    variants: Mapping[str, Variant],
    base: BaseView,
    name: str | None = None,
    initial: Path | None = None,
    progress: TargetsDone = no_progress,
) -> Adapter:
    """Read a PEFT folder into memory and check it against the base. `name` is the folder's own unless given.

    `initial` is the folder of the adapter as it was initialised, for one whose initialisation changed the base; it is
    looked for in the usual subfolders when not given. Raises AdapterError naming everything that is not understood,
    ConvertError for files that cannot be read.
    """
    folder = Path(folder)
    text, config = _read_config(folder)
    variant = _find_variant(folder, config, variants)
    problems = Problems()
    initial = _find_initial(folder, config, initial)
    variant.check_config({**config, "init_lora_weights": True} if initial else config, problems)
    sound = not problems.lines
    with ExitStack() as files:
        if initial and sound:
            config = doubled_config(folder, config, _read_config(initial)[1])
            text = json.dumps(config, indent=2)
            source = files.enter_context(open_safetensors(_weights(initial)))
            file: SafetensorsFile = files.enter_context(DoubledWeights(_weights(folder), source))
        else:
            file = files.enter_context(open_safetensors(_weights(folder)))
        content = Content(file, base, problems)
        take_carried(config, content, base, problems)
        if sound:
            _take_targets(config, variant, content, problems)
        tensors = {key: content.load(key) for target in content.targets() for key in target.tensors.values()}
    adapter = Adapter(
        name=folder.resolve().name if name is None else name,
        variant=variant.name,
        targets=tuple(content.targets()),
        tensors=tensors,
        config_text=text,
        notes=(*content.notes, *([INITIAL_NOTE] if initial else [])),
    )
    if sound:
        check_adapter(adapter, variant, base.targets, problems)
    problems.raise_for(str(folder))
    return with_derived(adapter, variant, base.targets, progress)


def write_adapter_file(out: Path, adapter: Adapter) -> None:
    """An `.adrt` file of this one adapter, which has the record of its base."""
    metadata = {
        "general.type": "adapter",
        "general.architecture": adapter.base["architecture"],
        "general.name": adapter.name,
        "general.base_model.0.name": adapter.base["name"],
        "adapter.type": adapter.variant,
    }
    with Writer(out, metadata) as writer:
        write_adapter(writer, adapter)


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of adapter_config.json and its content."""
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; there is one in {', '.join(inside[:5])}" if inside else ""
        raise AdapterError(f"{folder}: not a PEFT adapter folder, {CONFIG} is missing{hint}")
    file, size = open_regular(path)
    with file:
        if size > CONFIG_LIMIT:
            raise AdapterError(f"{path}: {size} bytes, expected at most {CONFIG_LIMIT}")
        text = bytearray(size)
        read_exactly(file, memoryview(text), path)
    config = parse_object(bytes(text), str(path))
    return text.decode(), config


def _find_variant(folder: Path, config: Mapping[str, Any], variants: Mapping[str, Variant]) -> Variant:
    claimed = [variant for _, variant in sorted(variants.items()) if _claims(variant, config)]
    if len(claimed) == 1:
        return claimed[0]
    method = f"peft_type {brief(config.get('peft_type'))}"
    if switches := sorted(other_methods(config)):
        method += f" with {', '.join(switches)}"
    if claimed:
        raise AdapterError(f"{folder}: {method} is claimed by variants {', '.join(v.name for v in claimed)}")
    if config.get("peft_type") is None:
        raise AdapterError(
            f"{folder}: {CONFIG} has no peft_type, so it is not PEFT's: no installed variant claims it"
        )
    if config.get("peft_type") in NO_CHANGE:
        raise AdapterError(
            f"{folder}: {method} is not supported: it gives the model more to attend to and changes no weight, so that "
            "no variant plugin can express it"
        )
    installed = ", ".join(sorted(variants)) or "none"
    raise AdapterError(
        f"{folder}: no installed variant handles {method}: it needs a variant plugin, or, where PEFT can merge it "
        f"(merge_and_unload()), the merged model; installed: {installed}"
    )


def _claims(variant: Variant, config: Mapping[str, Any]) -> bool:
    try:
        return variant.claims(config)
    except Exception as error:  # a stranger's code; the other variants may still know this adapter
        log.warning("variant %s passed over: it cannot read the config: %r", variant.name, error)
        return False


def _find_initial(folder: Path, config: Mapping[str, Any], initial: Path | None) -> Path | None:
    if config.get("peft_type") == "LORA" and changed_base(config):
        return initial or find_initial(folder)
    if initial is None:
        return None
    if config.get("peft_type") == "LORA" and config.get("init_lora_weights", True) is True:
        return initial  # PEFT's guide sets the option to true before saving; a start without effect is refused later
    raise AdapterError(f"{folder}: its initialisation left the base alone, it needs no initial adapter")


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    if (folder / PICKLED).exists():
        raise AdapterError(
            f"{folder}: has {PICKLED}, a pickle, which may run code; load it in PEFT once and save it with "
            f"save_pretrained(…, safe_serialization=True) to get {WEIGHTS}"
        )
    raise AdapterError(f"{folder}: {WEIGHTS} is missing")


def _check_named(config: Mapping[str, Any], modules: Mapping[str, Module], problems: Problems) -> None:
    """A list of `target_modules` names, as PEFT reads it, every module that has tensors: PEFT leaves others out.

    A tied embedding or head is adapted without being named.
    """
    listed = config.get("target_modules")
    if not listed or names(listed) is not None:  # a pattern, "all-linear", or nothing
        return
    endings = tuple(f".{name}" for name in listed)
    for path, module in modules.items():
        if module.base.kind in ("linear", "norm") and not f".{path}".endswith(endings):
            problems.add(f"{path} has tensors, but option target_modules does not name it")


def _take_targets(config: Mapping[str, Any], variant: Variant, content: Content, problems: Problems) -> None:
    """Let the variant resolve each module and refuse what is missing or left over."""
    shared = Lazy(content, content.shared)
    parts = {path: part for path, part in content.parts.items() if part.keys}
    modules = {
        path: Module(path, part.base, Lazy(content, part.keys), shared) for path, part in parts.items()
    }
    _check_named(config, modules, problems)
    for name, tensor in variant.complete(config, list(modules.values()), problems).items():
        content.add(name, tensor)
        content.notes.append(f"{name} is not in the folder; variant {variant.name} computed it")
    used: set[str] = set()
    discarded: dict[tuple[str, str], list[str]] = {}  # (suffix, reason) → paths
    for path, module in modules.items():
        part = parts[path]
        params, roles = variant.resolve(config, module, problems.about(path))
        part.params.update(params)
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
        hint = "" if name.startswith("base_model.") else f"; PEFT's names begin with {PEFT_PREFIX}"
        problems.add(f"{brief(name)} is not understood by variant {variant.name}{hint}")
