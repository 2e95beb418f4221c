"""What any PEFT method may save beside its own tensors: frozen copies of the base, and replacements of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptrt.adapters.base import BaseTarget, BaseView
from adaptrt.adapters.carried import BIAS, RESIZED_HINT, ROW_IDS, ROWS, WEIGHT
from adaptrt.adapters.numbers import read_whole_numbers, whole_numbers
from adaptrt.adapters.options import names, token_rows
from adaptrt.adapters.problems import Problems, brief
from adaptrt.backends.native_quant import best_kernels
from adaptrt.convert.peft_content import Content, Part
from adaptrt.convert.safetensors import CHUNK_BYTES, SafetensorsFile, same_bytes
from adaptrt.quant.encode import Encoder

# `save_embedding_layers`, which PEFT turns on by itself when an embedding is adapted or the vocabulary was resized,
# saves all that is in the embedding and the head: frozen copies of the base, and what PEFT saved already once more.
FROZEN_WEIGHTS = ("base_layer.weight", "token_adapter.base_layer.weight")
UNUSED_WEIGHT = "original_module.weight"  # what `modules_to_save` replaces
SAVED_AGAIN = "modules_to_save.weight"  # and what by; alone in a state dict that PEFT has not tidied
BIASES = ("base_layer.bias", "bias")  # of an adapted module, of any other
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
# ‖theirs - ours‖ / ‖theirs‖ of a row; NF4 stays near 0.1, unrelated weights near 1.4.
LARGEST_DIFFERENCE = 0.3


def take_carried(config: Mapping[str, Any], content: Content, base: BaseView, problems: Problems) -> None:
    """Take what the config says any target may carry out of the content, into the roles of adapters/carried.py."""
    if config.get("bias", "none") != "none":
        for part in content.parts.values():
            _take_bias(part)
    if names(config.get("modules_to_save")) is None:
        _take_modules(config, content, base, problems)
    _take_embeddings(content, base)
    if token_rows(config.get("trainable_token_indices")) is None:
        _take_token_rows(config.get("trainable_token_indices") or {}, content, base, problems)
    for module, part in content.parts.items():
        _drop_frozen(module, part, content, problems)
    if config.get("ensure_weight_tying"):
        _check_tying(content, base, problems)


def _drop_frozen(module: str, part: Part, content: Content, problems: Problems) -> None:
    for suffix in FROZEN_WEIGHTS:
        if suffix in part.keys:
            replaced = read_whole_numbers(part.params.get(ROW_IDS)) or []
            problem = _frozen_problem(content.file, part.keys.pop(suffix), part.base, replaced)
            if problem:
                problems.add(f"{module}.{suffix} {problem}")
            content.notes.append(f"{module}.{suffix} left out: a frozen copy of the base")


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
        for module in chosen:
            _take_weight(module, content, problems)
        if not any(WEIGHT in content.parts[module].roles for module in chosen):
            problems.add(f"option modules_to_save = {brief(saved)}: the weights hold no module {brief(name)}")


def _take_weight(module: str, content: Content, problems: Problems) -> None:
    """A module's new weight, saved once or twice, and its bias."""
    part = content.parts[module]
    again = part.keys.pop(SAVED_AGAIN, None)
    key = part.keys.pop("weight", again)
    if key is None:
        return
    if again is not None and not same_bytes(content.file, key, again):
        problems.add(f"{module}.weight and {module}.{SAVED_AGAIN} differ, expected one weight")
    part.roles[WEIGHT] = key
    part.keys.pop(UNUSED_WEIGHT, None)
    _take_bias(part)


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
    _tie_rows(content, base, problems)
    for name in by_name:
        if not any(ROWS in part.roles for part in _ending(content, name)):
            option = f"option trainable_token_indices = {brief(chosen)}"
            problems.add(f"{option}: the weights hold no {TOKEN_ROWS} of {brief(name)}")


def _tie_rows(content: Content, base: BaseView, problems: Problems) -> None:
    """Give a tied head the embedding's rows, unless it has its own; the same ones may be saved there once more."""
    tied = _tied(base)
    source = content.parts.get(tied[0].module) if tied else None
    if source is None or ROWS not in source.roles:
        return
    head, key = content.part(tied[1].module), source.roles[ROWS]
    if ROWS in head.roles:
        return
    again = head.keys.pop(TOKEN_ROWS, key)
    if again != key and not same_bytes(content.file, key, again):
        problems.add(
            f"{tied[1].module}.{TOKEN_ROWS} differs from that of {tied[0].module}, which it is tied to"
        )
    head.roles[ROWS], head.params[ROW_IDS] = key, source.params[ROW_IDS]


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


def _frozen_problem(file: SafetensorsFile, key: str, base: BaseTarget, replaced: list[int]) -> str | None:
    """Why a saved base weight is no copy of our base's; the rows in `replaced` are not used and may be any."""
    _, shape = file.info(key)
    if shape != base.shape:
        return f"is {list(shape)}, expected the base's {list(base.shape)}{RESIZED_HINT}"
    cols, start = base.shape[1], 0
    for chunk in file.chunks(key, max(CHUNK_BYTES // 4 // cols, 1) * cols):
        theirs = chunk.reshape(-1, cols)
        difference = np.linalg.norm(theirs - base.rows(start, start + len(theirs)), axis=1)
        size = np.linalg.norm(theirs, axis=1)
        share = difference / np.maximum(
            size, max(size.mean(), 1e-30)
        )  # a row of next to nothing is quantized badly
        far = start + np.flatnonzero(~(share <= LARGEST_DIFFERENCE))
        if (far := np.setdiff1d(far, replaced)).size:
            return (
                f"differs from the base by {share[far[0] - start]:.0%} in row {far[0]}, expected at most "
                f"{LARGEST_DIFFERENCE:.0%}: the adapter was made on another base"
            )
        start += len(theirs)
    return None


def _check_tying(content: Content, base: BaseView, problems: Problems) -> None:
    """With a tied base PEFT shares one adapter between embedding and head, and saves it under both."""
    adapted = [end.module in content.parts for end in _tied(base)]
    if any(adapted) and not all(adapted):
        modules = " and ".join(end.module for end in _tied(base))
        problems.add(f"option 'ensure_weight_tying' = True: expected tensors of both {modules}")
