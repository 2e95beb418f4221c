"""AdaLoRA (Zhang et al., arXiv:2303.10512): LoRA as a singular value decomposition whose rank training prunes.

y = W x + s · B (E ⊙ (A x)) + b, s = alpha / (r + 1e-5), r being the rank before pruning; an alpha of 0 or less stands
for the rank left, as PEFT loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.lora import LoraVariant
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, finite, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = {"init_r": 12, "lora_alpha": 8}  # where the config leaves them out
ROLES = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}


def _kept_ranks(value: Any) -> str | None:
    """A rule: tensor names to which of their singular values were kept, as lists of true and false."""
    lists = value.values() if isinstance(value, dict) else [None]
    kept = (isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags) for flags in lists)
    return None if value is None or all(kept) else "expected an object of lists of true and false"


class AdaLoraVariant(Variant):
    """AdaLoRA on linear layers and the head."""

    name = "adalora"
    options: ClassVar[Mapping[str, Rule]] = {
        "init_r": positive_int,
        "lora_alpha": finite,
        "rank_pattern": _kept_ranks,
        **dict.fromkeys(
            # the schedule of training, and what PEFT's AdaLoRA takes over from LoraConfig and does not use
            ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
             "r", "alpha_pattern", "lora_bias", "init_lora_weights", "use_rslora"),
            any_value,
        ),
        **{name: rule for name, rule in LoraVariant.options.items() if rule is any_value},
        "fan_in_fan_out": any_value,
    }  # fmt: skip
    params: ClassVar[Mapping[str, type]] = {"rank": int, "scale": float}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "A": ("rank", "in"),
        "B": ("out", "rank"),
        "E": ("rank", 1),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "ADALORA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve. A module pruned to rank 0 is left out."""
        before, alpha = (config.get(name, default) for name, default in PEFT_DEFAULT.items())
        kept = (config.get("rank_pattern") or {}).get(f"{module.path}.lora_E")
        rank = before if kept is None else sum(kept)
        if rank == 0:
            for suffix in ROLES.values():
                module.discard(suffix, "training pruned it to rank 0")
            return {}, {}
        return {"rank": rank, "scale": (alpha if alpha > 0 else rank) / (before + 1e-5)}, ROLES

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = B, V = A, d = E."""
        values = to_float32(tensors["E"]).reshape(-1)
        return Lowered(terms=(LowRank(tensors["B"], tensors["A"], float(params["scale"]), d=values),))


@hookimpl
def adaptrt_variants() -> list[AdaLoraVariant]:
    """AdaLoRA."""
    return [AdaLoraVariant()]
