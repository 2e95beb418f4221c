"""IA3 (Liu et al., arXiv:2205.05638): a learned vector l multiplies a layer's output, or a feed-forward one's input.

y = l ⊙ (W x + b), or y = W (l ⊙ x) + b. The tensor's shape tells which: [out, 1] or [1, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import Rule, any_value
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

TENSOR = "ia3_l"


class Ia3Variant(Variant):
    """IA3 on linear layers and the head."""

    name = "ia3"
    options: ClassVar[Mapping[str, Rule]] = dict.fromkeys(
        # the tensors show which modules are feed-forward ones
        ("feedforward_modules", "fan_in_fan_out", "init_ia3_weights"), any_value
    )  # fmt: skip
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {"output": ("out", 1), "input": (1, "in")}
    optional: ClassVar[frozenset[str]] = frozenset(roles)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "IA3"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        if TENSOR in module.tensors and module.tensors[TENSOR].shape[:1] == (1,):
            return {}, {"input": TENSOR}
        return {}, {"output": TENSOR}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """The gain l, of the inputs or the outputs."""
        ((role, tensor),) = tensors.items()
        gain = to_float32(tensor).reshape(-1)
        return Lowered(g_in=gain) if role == "input" else Lowered(g_out=gain, scales_bias=True)


@hookimpl
def adaptrt_variants() -> list[Ia3Variant]:
    """IA3."""
    return [Ia3Variant()]
