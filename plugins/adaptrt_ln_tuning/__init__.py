"""LN tuning (Zhao et al., arXiv:2312.11420): the norms' weights are trained and stored whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor


class LnTuningVariant(Variant):
    """New weights for norms."""

    name = "ln_tuning"
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {"weight": ("out",)}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "LN_TUNING"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        if module.base.kind != "norm":
            problems.add(f"is of kind {module.base.kind}, expected a norm")
        return {}, {"weight": "ln_tuning_layers.weight"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight, scale: float) -> Lowered:
        """The gain 1 + scale · (new / old - 1). Raises AdapterError where old is 0 and new is not."""
        old, new = base.weight(), to_float32(tensors["weight"])
        gone = np.flatnonzero((old == 0) & (new != 0))
        if gone.size:
            raise AdapterError(
                f"LN tuning: the base's norm is 0 at {gone[0]}, where the adapter's is {new[gone[0]]}: no gain gives it"
            )
        ratio = np.divide(new, old, out=np.ones_like(old), where=old != 0)
        return Lowered(g_out=1 + np.float32(scale) * (ratio - 1))


@hookimpl
def adaptrt_variants() -> list[LnTuningVariant]:
    """LN tuning."""
    return [LnTuningVariant()]
