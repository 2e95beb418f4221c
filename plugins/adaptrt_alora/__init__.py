"""Activated LoRA (Greenewald et al., arXiv:2504.12397): LoRA that acts from its invocation tokens on.

Before them the base works alone, so that the KV cache of what came before is the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.invocation import INVOCATION
from adaptrt.adapters.lora import LoraVariant
from adaptrt.adapters.numbers import whole_numbers
from adaptrt.adapters.options import Rule
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import Module, Params, Roles
from adaptrt.hookspecs import hookimpl

OPTION = "alora_invocation_tokens"


def _tokens(value: object) -> str | None:
    sound = isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value)
    return None if sound else "expected a list of token ids"


class AloraVariant(LoraVariant):
    """LoRA with the tokens that invoke it; where they are looked for is in adaptrt/adapters/invocation.py."""

    name = "alora"
    methods = frozenset({OPTION})
    options: ClassVar[Mapping[str, Rule]] = {**LoraVariant.options, OPTION: _tokens}
    params: ClassVar[Mapping[str, type]] = {**LoraVariant.params, INVOCATION: str}
    adds: ClassVar[bool] = False  # in PEFT the rows are replaced before the invocation too

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        params, roles = super().resolve(config, module, problems)
        return {**params, INVOCATION: whole_numbers(config[OPTION])}, roles


@hookimpl
def adaptrt_variants() -> list[AloraVariant]:
    """Activated LoRA."""
    return [AloraVariant()]
