"""RandLoRA (Albert et al., arXiv:2502.00987): W x + alpha / r · Σ over n bases of B_j Λ_j A Γ_j x.

A and the B_j are random, fixed and shared by all modules; Λ_j [r] and Γ_j are trained and scale A along both of its
sides. A has the smaller of the two sizes of the weight; where that is `out`, all is transposed. The n bases together
have full rank. Still the change is kept as the low-rank product that it is, of all B_j side by side, which are one
tensor for all modules, and of the scaled A: multiplied out it would be larger, and 4 TFLOP away for a 1B model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np

from adaptrt.adapters.dense import transposed
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, finite, flag, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import PLAIN_ITEM_BYTES, Tensor

PEFT_DEFAULTS = {"r": 32, "randlora_alpha": 640}


def _saved(value: object) -> str | None:
    if value is True:
        return None
    return "the random bases are not in the file; load it in PEFT once and save it with save_projection=True"


class RandLoraVariant(Variant):
    """RandLoRA on linear layers, with stored bases."""

    name = "randlora"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "randlora_alpha": finite,
        "save_projection": _saved,
        "fan_in_fan_out": flag,  # says how the base stores W
        # how the stored bases were made, of training, of the start
        **dict.fromkeys(
            ("projection_prng_key", "sparse", "very_sparse", "randlora_dropout", "init_weights"), any_value
        ),
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int, "scale": float}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "A": ("rank", 1, "smallest"),
        "B": ("largest", "most bases", "rank"),
        "lambda": ("rank", "bases"),
        "gamma": ("bases", "smaller"),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "RANDLORA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        rank, alpha = (config.get(name, value) for name, value in PEFT_DEFAULTS.items())
        roles = {role: f"base_model.randlora_{role}" for role in "AB"}
        for role in "AB":
            if f"randlora_{role}" in module.tensors:
                module.discard(
                    f"randlora_{role}", "PEFT saves the shared random bases again with every module"
                )
        roles |= {role: f"randlora_{role}" for role in ("lambda", "gamma")}
        return {"rank": rank, "scale": float(alpha) / rank}, roles

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = the bases and V = the scaled A, or both transposed. Raises AdapterError for too small bases."""
        lambdas, gammas = to_float32(tensors["lambda"]), to_float32(tensors["gamma"])
        (bases, smaller), larger = gammas.shape, max(base.shape)
        a, b = tensors["A"], tensors["B"]
        if smaller != min(base.shape) or a.shape[2] < smaller or b.shape[0] < larger or b.shape[1] < bases:
            raise AdapterError(
                f"randlora_A {list(a.shape)}, B {list(b.shape)} and gamma {list(gammas.shape)} do not fit the "
                f"weight {list(base.shape)}"
            )
        # PEFT's order of the inner index: A's runs over the bases first, B's over the rank, and they meet as they are
        scaled = lambdas[:, :, None] * to_float32(a)[:, :, :smaller]
        scaled *= gammas
        scaled_a, scale = Tensor.from_numpy(scaled.reshape(-1, smaller)), float(params["scale"])
        if base.shape == (larger, smaller):
            return Lowered(terms=(LowRank(side_by_side(b, bases, False), scaled_a, scale),))
        return Lowered(terms=(LowRank(transposed(scaled_a), side_by_side(b, bases, True), scale),))


_side_by_side: WeakKeyDictionary[Tensor, dict[tuple[int, bool], Tensor]] = WeakKeyDictionary()


def side_by_side(b: Tensor, bases: int, turned: bool) -> Tensor:
    """The first bases of B as [largest, bases · rank], or transposed; one object for all modules while B lives."""
    known = _side_by_side.setdefault(b, {})
    if (bases, turned) not in known:
        bits = b.data.view(f"u{PLAIN_ITEM_BYTES[b.dtype]}").reshape(b.shape)[:, :bases]
        matrix = bits.reshape(len(bits), -1)
        found = Tensor(b.dtype, matrix.shape, np.ascontiguousarray(matrix).reshape(-1).view(np.uint8))
        known[bases, turned] = transposed(found) if turned else found
    return known[bases, turned]


@hookimpl
def adaptrt_variants() -> list[RandLoraVariant]:
    """RandLoRA."""
    return [RandLoraVariant()]
