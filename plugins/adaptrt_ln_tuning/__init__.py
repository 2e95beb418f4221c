"""LN tuning (Zhao et al., arXiv:2312.11420): the norms' weights are trained and stored whole.

Any adapter may carry such weights (adaptrt/adapters/carried.py); this one has no tensors of its own beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.carried import WEIGHT
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.tensor import Tensor


class LnTuningVariant(Variant):
    """New weights for norms."""

    name = "ln_tuning"
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "LN_TUNING"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        if module.base.kind != "norm":
            problems.add(f"is of kind {module.base.kind}, expected a norm")
        return {}, {WEIGHT: "ln_tuning_layers.weight"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """Nothing beside what is carried."""
        return Lowered()


@hookimpl
def adaptrt_variants() -> list[LnTuningVariant]:
    """LN tuning."""
    return [LnTuningVariant()]
