"""Adapters whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), made to fit the unchanged one.

They start from factors A0, B0 and train on the residual W - s·B0·A0. So W_residual + s·B·A = W + s·(B·A - B0·A0), which
is LoRA of rank 2r on W: A' = [A; A0], B' = [B, -B0]. It takes the adapter as it was initialised, saved before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptrt.adapters.lora import CHANGES_BASE, PEFT_DEFAULT
from adaptrt.adapters.problems import brief
from adaptrt.convert.safetensors import SafetensorsFile
from adaptrt.errors import AdapterError
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.tensor import Tensor

SUBFOLDERS = ("initial", "init", *(f"{name}_init" for name in CHANGES_BASE))
SAME = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")  # of both configs

A_SUFFIXES = (".lora_A.weight", ".lora_embedding_A")
B_SUFFIXES = (".lora_B.weight", ".lora_embedding_B")


def changed_base(config: Mapping[str, Any]) -> bool:
    """Whether this initialisation took B0 A0 out of the base."""
    found = config.get("init_lora_weights")
    return isinstance(found, str) and found.lower().startswith(CHANGES_BASE)


def find_initial(folder: Path) -> Path | None:
    """The subfolder that holds the adapter as it was initialised, by the usual names. Raises AdapterError for two."""
    found = [folder / name for name in SUBFOLDERS if (folder / name / "adapter_config.json").is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise AdapterError(f"{folder}: holds several initial adapters ({names}); choose one with --initial")
    return found[0] if found else None


def doubled_config(folder: Path, config: Mapping[str, Any], initial: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the rank-2r adapter, its scale unchanged. Raises AdapterError when the two do not go together."""
    for option in SAME:
        ours, theirs = config.get(option), initial.get(option)
        if ours != theirs and (ours or theirs):
            raise AdapterError(
                f"{folder}: option {option} is {brief(ours)}, and {brief(theirs)} in the initial adapter"
            )
    alpha = 2**0.5 if config.get("use_rslora") else 2  # s = alpha / √r, or alpha / r

    def patterns(option: str, factor: float) -> dict[str, Any]:
        return {key: value * factor for key, value in (config.get(option) or {}).items()}

    return {
        **config,
        "init_lora_weights": True,
        "r": 2 * config.get("r", PEFT_DEFAULT),
        "lora_alpha": alpha * config.get("lora_alpha", PEFT_DEFAULT),
        "rank_pattern": patterns("rank_pattern", 2),
        "alpha_pattern": patterns("alpha_pattern", alpha),
    }


class DoubledWeights(SafetensorsFile):
    """An adapter's weights with every A and B joined with the initial one's; all else as it is."""

    def __init__(self, path: Path, initial: SafetensorsFile) -> None:
        super().__init__(path)
        self._initial = initial

    def tensor(self, name: str) -> Tensor:
        """See SafetensorsFile.tensor. Raises AdapterError when the initial adapter has no such factor."""
        ours = super().tensor(name)
        if not name.endswith(A_SUFFIXES + B_SUFFIXES):
            return ours
        if name not in self._initial.names or self._initial.info(name)[1] != ours.shape:
            raise AdapterError(f"{self._initial.path}: holds no {name} of shape {list(ours.shape)}")
        initial = to_float32(self._initial.tensor(name))
        if name.endswith(B_SUFFIXES) and not initial.any():
            raise AdapterError(
                f"{self._initial.path}: {name} is all zeros, expected one that changed the base"
            )
        pair = (to_float32(ours), initial if name.endswith(A_SUFFIXES) else -initial)
        joined = np.concatenate(pair, axis=0 if name.endswith(A_SUFFIXES) else 1)
        return from_float32(joined, ours.dtype if self._initial.info(name)[0] == ours.dtype else "f32")
