"""DoRA (Liu et al., arXiv:2402.09353): LoRA, then every row of the changed weight gets a learned length m.

    y = m / ‖W + s·B A‖ ⊙ (W x + s·B (A x)) + b, the norm over each output's row

The norm is over the dequantized base and is computed once, when the adapter is lowered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.lora import LoraVariant, other_methods
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import Rule, rest
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, over_rows
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor


class DoraVariant(LoraVariant):
    """DoRA on linear layers, the head and the embedding, with LoRA's or rsLoRA's scale."""

    name = "dora"
    options: ClassVar[Mapping[str, Rule]] = {
        **LoraVariant.options,
        "lora_bias": rest("PEFT does not support it together with use_dora"),
    }
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "A": ("rank", "in"),
        "B": ("out", "rank"),
        "magnitude": ("out",),
    }
    optional: ClassVar[frozenset[str]] = frozenset()

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Use_dora, with or without use_rslora."""
        return config.get("peft_type") == "LORA" and other_methods(config) - {"use_rslora"} == {"use_dora"}

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """LoRA's, and the magnitude."""
        params, roles = super().resolve(config, module, problems)
        if config.get("use_rslora"):
            rank = int(params["rank"])
            params = {"rank": rank, "scale": float(params["scale"]) * rank / math.sqrt(rank)}
        return params, {**roles, "magnitude": "lora_magnitude_vector"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight, scale: float) -> Lowered:
        """LoRA with g_out = m / ‖W + s·B A‖. Raises AdapterError when a row of W + s·B A is zero."""
        lowered = super().lower(params, tensors, base, scale)
        norm = changed_norm(base, tensors["A"], tensors["B"], scale * float(params["scale"]))
        if not norm.all():
            raise AdapterError(
                f"DoRA: row {int(np.argmin(norm))} of the changed weight is zero, it has no direction"
            )
        return replace(lowered, g_out=to_float32(tensors["magnitude"]) / norm)


def changed_norm(base: BaseWeight, a: Tensor, b: Tensor, scale: float) -> NDArray[np.float32]:
    """‖W + scale·B A‖ of every output [out], a few rows of the dequantized W at a time.

    An embedding's W + scale·(B A)ᵀ is [vocabulary, width] and its outputs are the columns.
    """
    left, right = to_float32(b), to_float32(a) * np.float32(scale)
    if base.kind != "embedding":
        return np.concatenate(over_rows(base, lambda which, rows: _norm(rows + left[which] @ right, axis=1)))
    parts = over_rows(base, lambda which, rows: _norm(rows + right[:, which].T @ left.T, axis=0))
    return _norm(np.stack(parts), axis=0)


def _norm(x: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    return np.asarray(np.linalg.norm(x, axis=axis), np.float32)


@hookimpl
def adaptrt_variants() -> list[DoraVariant]:
    """DoRA."""
    return [DoraVariant()]
