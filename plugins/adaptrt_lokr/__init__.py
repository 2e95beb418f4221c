"""LoKr (Edalati et al., KronA, arXiv:2212.10650; Yeh et al., LyCORIS, arXiv:2309.14859): W x + alpha / r · (w1 ⊗ w2) x.

Each factor is stored whole or as a product of rank r. It lowers to a Kronecker term as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.normal import Kronecker, Lowered
from adaptrt.adapters.options import Rule, any_value, boolean, finite, match_pattern, patterns, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = 8  # of r and of alpha
FACTORS = ("w1", "w2")


class LoKrVariant(Variant):
    """LoKr on linear layers."""

    name = "lokr"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "alpha": finite,
        "rank_pattern": patterns(positive_int),
        "alpha_pattern": patterns(finite),
        "use_effective_conv2d": boolean,  # of convolutions only
        # of training, of the start, and which factors are products and of which sizes, as the tensors show
        **dict.fromkeys(
            ("rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights", "decompose_both",
             "decompose_factor"),
            any_value,
        ),
    }  # fmt: skip
    params: ClassVar[Mapping[str, type]] = {"rank": int, "scale": float}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "w1": ("out1", "in1"),
        "w1_a": ("out1", "rank"),
        "w1_b": ("rank", "in1"),
        "w2": ("out2", "in2"),
        "w2_a": ("out2", "rank"),
        "w2_b": ("rank", "in2"),
    }
    optional = frozenset(roles)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "LOKR"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """A factor that is not there whole must be there as a product."""
        rank = match_pattern(config.get("rank_pattern"), module.path, config.get("r", PEFT_DEFAULT))
        alpha = match_pattern(config.get("alpha_pattern"), module.path, config.get("alpha", PEFT_DEFAULT))
        roles = [
            role
            for factor in FACTORS
            for role in ([factor] if f"lokr_{factor}" in module.tensors else [f"{factor}_a", f"{factor}_b"])
        ]
        return {"rank": rank, "scale": float(alpha) / rank}, {role: f"lokr_{role}" for role in roles}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """One Kronecker term. Raises AdapterError for a factor that is there twice or not at all."""
        w1, w2 = (_factor(name, tensors) for name in FACTORS)
        return Lowered(terms=(Kronecker(w1, w2, float(params["scale"])),))


def _factor(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    found = [role for role in (name, f"{name}_a", f"{name}_b") if role in tensors]
    if found == [name]:
        return tensors[name]
    if found == [f"{name}_a", f"{name}_b"]:
        left, right = (to_float32(tensors[role]) for role in found)
        return Tensor.from_numpy(left @ right)
    raise AdapterError(
        f"found {', '.join(found) or 'no tensors'} for {name}, expected it whole or {name}_a, {name}_b"
    )


@hookimpl
def adaptrt_variants() -> list[LoKrVariant]:
    """LoKr."""
    return [LoKrVariant()]
