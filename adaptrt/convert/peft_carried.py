"""What any PEFT method may save beside its own tensors: frozen copies of the base, and replacements of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptrt.adapters.base import BaseTarget, BaseView
from adaptrt.adapters.carried import BIAS, ROW_IDS, ROWS, WEIGHT
from adaptrt.adapters.numbers import whole_numbers
from adaptrt.adapters.options import names, token_rows
from adaptrt.adapters.problems import Problems, brief
from adaptrt.backends.native_quant import best_kernels
from adaptrt.convert.peft_content import Content, Part
from adaptrt.convert.safetensors import SafetensorsFile
from adaptrt.quant.encode import Encoder

FROZEN_WEIGHT = "base_layer.weight"  # PEFT saves it when an embedding or head is targeted
BIASES = ("base_layer.bias", "bias")  # of an adapted module, of any other
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
ROWS_COMPARED = 64
LARGEST_DIFFERENCE = 0.3  # ‖theirs - ours‖ / ‖theirs‖; NF4 stays near 0.1, unrelated weights near 1.4


def take_carried(config: Mapping[str, Any], content: Content, base: BaseView, problems: Problems) -> None:
    """Take what the config says any target may carry out of the content, into the roles of adapters/carried.py."""
    for module, part in content.parts.items():
        _drop_frozen(module, part, content, problems)
        if config.get("bias", "none") != "none":
            _take_bias(part)
    if names(config.get("modules_to_save")) is None:
        _take_modules(config, content, base, problems)
    _take_embeddings(content, base)
    if token_rows(config.get("trainable_token_indices")) is None:
        _take_token_rows(config.get("trainable_token_indices") or {}, content, base, problems)
    if config.get("ensure_weight_tying"):
        _check_tying(content, base, problems)


def _drop_frozen(module: str, part: Part, content: Content, problems: Problems) -> None:
    if FROZEN_WEIGHT in part.keys:
        problem = _frozen_problem(content.file, part.keys[FROZEN_WEIGHT], part.base)
        if problem:
            problems.add(f"{module}.{FROZEN_WEIGHT} {problem}")
        del part.keys[FROZEN_WEIGHT]
        content.notes.append(f"{module}.{FROZEN_WEIGHT} left out: a frozen copy of the base")


def _take_bias(part: Part) -> None:
    for suffix in BIASES:
        if suffix in part.keys:
            part.roles[BIAS] = part.keys.pop(suffix)


def _take_modules(config: Mapping[str, Any], content: Content, base: BaseView, problems: Problems) -> None:
    """`modules_to_save`: whole modules, chosen as PEFT does by the end of their path, with all that is in them.

    `ensure_weight_tying` saves a tied embedding or head under the other's name too, without listing it.
    """
    saved = config.get("modules_to_save") or []
    for name in saved:
        chosen = [module for module in content.parts if any(p.endswith(name) for p in _with_parents(module))]
        if config.get("ensure_weight_tying") and {e.module for e in _tied(base)} & set(chosen):
            chosen += [end.module for end in _tied(base) if end.module in content.parts]
        for part in (content.parts[module] for module in chosen):
            if "weight" in part.keys:
                part.roles[WEIGHT] = part.keys.pop("weight")
                _take_bias(part)
        if not any(WEIGHT in content.parts[module].roles for module in chosen):
            problems.add(f"option modules_to_save = {brief(saved)}: the weights hold no module {brief(name)}")


def _with_parents(module: str) -> list[str]:
    """A module's path and those of all that it is in."""
    names = module.split(".")
    return [".".join(names[:count]) for count in range(len(names), 0, -1)]


def _take_embeddings(content: Content, base: BaseView) -> None:
    """Embedding and head that PEFT saved whole (`save_embedding_layers`), which it loads in the place of the base's.

    What the base holds already is left out. PEFT loads into the base's own tensor, so with a tied base into both.
    """
    ends = [_find_kind(base, kind) for kind in ("embedding", "head")]
    tied = bool(_tied(base))
    for end, other in zip(ends, reversed(ends), strict=True):
        part = content.parts.get(end.module)
        if part is None or "weight" not in part.keys:
            continue
        key = part.keys.pop("weight")
        if _holds_already(end, content.file, key):
            content.notes.append(f"{end.module}.weight left out: the base holds it already")
            continue
        part.roles[WEIGHT] = key
        if tied and not (twin := content.part(other.module)).keys and not twin.roles:
            twin.roles[WEIGHT] = key


def _holds_already(base: BaseTarget, file: SafetensorsFile, key: str) -> bool:
    """Whether a saved weight, stored as the base stores its own, gives the very bytes that are there."""
    stored = base.stored()
    if file.info(key)[1] != stored.shape:
        return False
    encoder, position = Encoder(stored.dtype, stored.shape, best_kernels()), 0
    try:
        for chunk in file.chunks(key):
            found = encoder.feed(chunk)
            if not np.array_equal(found, stored.data[position : position + found.size]):
                return False
            position += found.size
    except ValueError:  # NaN, or beyond the range of the base's dtype
        return False
    return np.array_equal(encoder.finish(), stored.data[position:])


def _take_token_rows(
    chosen: list[int] | dict[str, list[int]], content: Content, base: BaseView, problems: Problems
) -> None:
    """`trainable_token_indices`: rows of the embedding, or of each module that is named.

    With a tied base the head uses the embedding's rows too, unless it has rows of its own.
    """
    by_name = {_find_kind(base, "embedding").module: chosen} if isinstance(chosen, list) else chosen
    for name, ids in by_name.items():
        for part in _ending(content, name):
            if TOKEN_ROWS in part.keys:
                part.roles[ROWS] = part.keys.pop(TOKEN_ROWS)
                part.params[ROW_IDS] = whole_numbers(ids)
    _tie_rows(content, base)
    for name in by_name:
        if not any(ROWS in part.roles for part in _ending(content, name)):
            option = f"option trainable_token_indices = {brief(chosen)}"
            problems.add(f"{option}: the weights hold no {TOKEN_ROWS} of {brief(name)}")


def _tie_rows(content: Content, base: BaseView) -> None:
    """Give a tied head the embedding's rows, unless it has its own."""
    tied = _tied(base)
    source = content.parts.get(tied[0].module) if tied else None
    if source is None or ROWS not in source.roles:
        return
    head = content.part(tied[1].module)
    if ROWS not in head.roles:
        head.roles[ROWS], head.params[ROW_IDS] = source.roles[ROWS], source.params[ROW_IDS]


def _ending(content: Content, name: str) -> list[Part]:
    """The modules whose path ends so, which is how PEFT chooses them."""
    return [part for module, part in content.parts.items() if module.endswith(name)]


def _find_kind(base: BaseView, kind: str) -> BaseTarget:
    """The base's embedding or head."""
    return next(target for target in base.targets.values() if target.kind == kind)


def _tied(base: BaseView) -> list[BaseTarget]:
    """The embedding and the head when they share one weight."""
    ends = [_find_kind(base, kind) for kind in ("embedding", "head")]
    return ends if ends[0].weight_name == ends[1].weight_name else []


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


def _check_tying(content: Content, base: BaseView, problems: Problems) -> None:
    """With a tied base PEFT shares one adapter between embedding and head, and saves it under both."""
    adapted = [end.module in content.parts for end in _tied(base)]
    if any(adapted) and not all(adapted):
        modules = " and ".join(end.module for end in _tied(base))
        problems.add(f"option 'ensure_weight_tying' = True: expected tensors of both {modules}")
