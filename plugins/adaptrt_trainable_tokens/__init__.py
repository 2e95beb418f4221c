"""Trainable tokens, PEFT's method of that name: new rows of the embedding or the head and nothing else.

Any adapter may carry such rows (adaptrt/adapters/carried.py); this one has no tensors of its own beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.carried import ROW_IDS, ROWS
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.numbers import whole_numbers
from adaptrt.adapters.options import Rule, any_value, token_rows
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.tensor import Tensor


class TrainableTokensVariant(Variant):
    """Rows that are replaced."""

    name = "trainable_tokens"
    options: ClassVar[Mapping[str, Rule]] = {"token_indices": token_rows, "init_weights": any_value}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "TRAINABLE_TOKENS"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        return {ROW_IDS: whole_numbers(config.get("token_indices") or ())}, {ROWS: "trainable_tokens_delta"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """Nothing beside what is carried."""
        return Lowered()


@hookimpl
def adaptrt_variants() -> list[TrainableTokensVariant]:
    """Trainable tokens."""
    return [TrainableTokensVariant()]
