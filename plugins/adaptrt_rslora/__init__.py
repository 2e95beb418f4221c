"""rsLoRA (Kalajdzievski, arXiv:2312.03732): LoRA whose product is scaled by alpha / sqrt(rank)."""

from __future__ import annotations

import math

from adaptrt.adapters.lora import LoraVariant
from adaptrt.hookspecs import hookimpl


class RsLoraVariant(LoraVariant):
    """LoRA with the rank-stabilized scale."""

    name = "rslora"
    methods = frozenset({"use_rslora"})

    def scaling(self, alpha: float, rank: int) -> float:
        """What B (A x) is multiplied by."""
        return alpha / math.sqrt(rank)


@hookimpl
def adaptrt_variants() -> list[RsLoraVariant]:
    """RsLoRA."""
    return [RsLoraVariant()]
