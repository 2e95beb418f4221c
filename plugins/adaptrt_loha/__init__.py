"""LoHa (Hyeon-Woo et al., FedPara, arXiv:2108.06098): W x + alpha / r · ((w1a w1b) ⊙ (w2a w2b)) x.

The entrywise product of two products of rank r has rank r² (the Khatri-Rao product of their factors). Where that
costs no less than the change itself, the change is computed at load and is a dense term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.dense import Floats, dense_term, filled
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, boolean, finite, match_pattern, patterns, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = 8  # of r and of alpha


class LoHaVariant(Variant):
    """LoHa on linear layers."""

    name = "loha"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "alpha": finite,
        "rank_pattern": patterns(positive_int),
        "alpha_pattern": patterns(finite),
        "use_effective_conv2d": boolean,  # of convolutions only
        # of training, of the start
        **dict.fromkeys(("rank_dropout", "module_dropout", "init_weights"), any_value),
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int, "scale": float}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "w1_a": ("out", "rank"),
        "w1_b": ("rank", "in"),
        "w2_a": ("out", "rank"),
        "w2_b": ("rank", "in"),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "LOHA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        rank = match_pattern(config.get("rank_pattern"), module.path, config.get("r", PEFT_DEFAULT))
        alpha = match_pattern(config.get("alpha_pattern"), module.path, config.get("alpha", PEFT_DEFAULT))
        return {"rank": rank, "scale": float(alpha) / rank}, {role: f"hada_{role}" for role in self.roles}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """Column i r + j of U is w1a's column i times w2a's column j; the rows of V likewise."""
        scale = float(params["scale"])
        w1_a, w1_b, w2_a, w2_b = (to_float32(tensors[role]) for role in self.roles)
        (out, rank), inner = w1_a.shape, w1_b.shape[1]
        if rank * rank * (out + inner) < out * inner:
            u = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(out, -1)
            v = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(-1, inner)
            return Lowered(terms=(LowRank(Tensor.from_numpy(u), Tensor.from_numpy(v), scale),))

        def rows(part: slice) -> Floats:
            return (w1_a[part] @ w1_b) * (w2_a[part] @ w2_b)

        return Lowered(terms=(dense_term(filled((out, inner), rows), scale),))


@hookimpl
def adaptrt_variants() -> list[LoHaVariant]:
    """LoHa."""
    return [LoHaVariant()]
