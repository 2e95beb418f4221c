"""Every variant's adapters as PEFT makes them: one row a case. A new variant adds rows here, not tests.

A case is a PEFT config and what is unusual about it. Its adapter has every trainable tensor perturbed by noise, since
PEFT initialises many methods to do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from helpers.oracle import LINEARS
from peft import LoraConfig, PeftConfig

# How PEFT, or torch by hand, says what "stacked after a LoRA" means (tests/helpers/variant_oracle.py):
#   active  several active adapters of one PeftModel
#   mixed   PeftMixedModel
#   merged  the LoRA is merged into the base, then PEFT applies the variant
#   beside  the variant acts on the base's weight alone, the LoRA's product is added: for methods that change the
#           input which W sees (spec/adapters.md, "Stacking", rule 1)
Stacking = Literal["active", "mixed", "merged", "beside"]


@dataclass(frozen=True)
class VariantCase:
    """`noise` maps a part of a tensor's name to the standard deviation of its noise, else 0.6 / √columns."""

    variant: str  # its name in our registry
    config: Callable[..., PeftConfig]  # called without arguments
    stacking: Stacking = "merged"
    noise: Mapping[str, float] = field(default_factory=dict)


def case(
    variant: str,
    config: Callable[..., PeftConfig],
    stacking: Stacking = "merged",
    noise: Mapping[str, float] | None = None,
    **options: Any,
) -> VariantCase:
    """A case on every linear layer unless `options` say otherwise."""
    return VariantCase(
        variant, partial(config, **{"target_modules": LINEARS} | options), stacking, noise or {}
    )


# The rows of the parity table in spec/adapters.md: single, scaled, stacked and in a mixed batch.
CASES: dict[str, VariantCase] = {
    "LoRA": case("lora", LoraConfig, "active", r=4, lora_alpha=8),
    "rsLoRA": case("rslora", LoraConfig, "active", r=16, lora_alpha=4, use_rslora=True),
}

# Other ranks, patterns and options: compared with PEFT once, alone, and not in the table.
OPTIONS: dict[str, VariantCase] = {
    "LoRA, rank 256": case("lora", LoraConfig, r=256, lora_alpha=32),
    "LoRA, one module": case("lora", LoraConfig, target_modules=["k_proj"], layers_to_transform=[1]),
    "LoRA, embedding and head": case(
        "lora", LoraConfig, target_modules=["embed_tokens", "lm_head", "q_proj"]
    ),
}
