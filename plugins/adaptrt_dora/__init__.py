"""DoRA (Liu et al., arXiv:2402.09353): LoRA, then every row of the changed weight gets a learned length m.

    y = m / ‖W + s·B A‖ ⊙ (W x + s·B (A x)) + b, the norm over each output's row

The norm is over the dequantized base. Its square is ‖W‖² + 2 s W·(B A) + s² ‖B A‖² in every row: the first two, which
need all of W, are derived once, at import, so that neither a load nor another scale goes over the base again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.lora import LoraVariant, other_methods
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import Rule, rest
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Floats, Module, Params, Roles, over_rows
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

CANCELLED = 0.01  # a row this much shorter, squared, than its parts: rounding them shows


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
        "squares": ("out",),  # ‖W‖² of every output
        "products": ("out",),  # W·(B A) of every output
    }
    optional: ClassVar[frozenset[str]] = frozenset()
    derived: ClassVar[frozenset[str]] = frozenset({"squares", "products"})
    adds: ClassVar[bool] = False

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

    def derive(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Mapping[str, Tensor]:
        """‖W‖² and W·(B A) of every output, a few rows of the dequantized W at a time."""
        b, a = to_float32(tensors["B"]), to_float32(tensors["A"])
        squares, products = of_columns(base, a, b) if base.kind == "embedding" else of_rows(base, a, b)
        return {"squares": Tensor.from_numpy(squares), "products": Tensor.from_numpy(products)}

    def at_scale(
        self,
        lowered: Lowered,
        params: Params,
        tensors: Mapping[str, Tensor],
        base: BaseWeight,
        scale: float,
    ) -> Lowered:
        """LoRA with g_out = m / ‖W + s·B A‖. Raises AdapterError when a row of W + s·B A is zero."""
        if not self.derived <= tensors.keys():
            tensors = {**tensors, **self.derive(params, tensors, base)}
        norm = changed_norm(base, tensors, scale * float(params["scale"]))
        if not norm.all():
            raise AdapterError(
                f"DoRA: row {int(np.argmin(norm))} of the changed weight is zero, it has no direction"
            )
        return replace(lowered.scaled(scale), g_out=to_float32(tensors["magnitude"]) / norm)


def of_rows(base: BaseWeight, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """‖W‖² and W·(B A) of every row of W [out, in]."""

    def work(which: slice, rows: Floats) -> Floats:
        return np.stack([np.square(rows).sum(axis=1), np.sum((rows @ a.T) * b[which], axis=1)])

    squares, products = np.concatenate([*over_rows(base, work)], axis=1)
    return squares, products


def of_columns(base: BaseWeight, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """‖W‖² and W·(B A)ᵀ of every column of an embedding's W [vocabulary, width]."""

    def work(which: slice, rows: Floats) -> Floats:
        return np.stack([np.square(rows).sum(axis=0), np.sum((a[:, which] @ rows).T * b, axis=1)])

    squares, products = sum(over_rows(base, work), np.zeros((2, base.shape[1]))).astype(np.float32)
    return squares, products


def changed_norm(base: BaseWeight, tensors: Mapping[str, Tensor], scale: float) -> Floats:
    """‖W + scale·B A‖ of every output [out], from the derived tensors where they are exact enough."""
    b, a, squares, products = (
        to_float32(tensors[role]).astype(np.float64) for role in ("B", "A", "squares", "products")
    )
    own = scale**2 * np.einsum("or,rs,os->o", b, a @ a.T, b, optimize=True)
    square = squares + 2 * scale * products + own
    if (square < CANCELLED * (squares + own)).any():
        return summed_norm(base, to_float32(tensors["A"]) * np.float32(scale), to_float32(tensors["B"]))
    return np.asarray(np.sqrt(square), np.float32)


def summed_norm(base: BaseWeight, a: Floats, b: Floats) -> Floats:
    """‖W + B A‖ of every output, the sum made a few rows at a time."""
    if base.kind != "embedding":
        parts = over_rows(base, lambda which, rows: np.square(rows + b[which] @ a).sum(axis=1))
        return np.asarray(np.sqrt(np.concatenate([*parts])))
    parts = over_rows(base, lambda which, rows: np.square(rows + a[:, which].T @ b.T).sum(axis=0))
    return np.asarray(np.sqrt(sum(parts, np.zeros(base.shape[1]))), np.float32)


@hookimpl
def adaptrt_variants() -> list[DoraVariant]:
    """DoRA."""
    return [DoraVariant()]
