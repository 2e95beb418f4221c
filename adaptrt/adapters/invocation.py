"""Adapters that act from a position on: the start of the last match of their invocation tokens in the prompt.

A variant says so with the param INVOCATION on each of its targets, the same on all. PEFT's rule (aLoRA): what is
generated later does not move the position, and an adapter whose tokens do not occur in the prompt does not act.
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptrt.adapters.numbers import read_whole_numbers
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.variant import Adapter

INVOCATION = "invocation_tokens"  # token ids as `whole_numbers` writes them


def invocation_tokens(adapter: Adapter) -> list[int]:
    """The tokens that invoke a checked adapter; empty when it acts everywhere."""
    return read_whole_numbers(adapter.targets[0].params.get(INVOCATION)) or []


def check_invocation(adapter: Adapter, vocabulary: int | None, problems: Problems) -> None:
    """All targets act from the same position, after tokens of the vocabulary; None when that is not known."""
    found = dict.fromkeys(target.params.get(INVOCATION) for target in adapter.targets)
    if len(found) > 1:
        problems.add(f"its targets act from different positions: {INVOCATION} {brief(list(found))}")
    for text in found:
        ids = read_whole_numbers(text)
        if text is not None and ids is None:
            problems.add(f"param {INVOCATION} is {brief(text)}, expected token ids")
        if ids and vocabulary is not None and max(ids) >= vocabulary:
            problems.add(
                f"param {INVOCATION} is {brief(text)}, expected token ids from 0 to {vocabulary - 1}: "
                "the base has no others"
            )


def acts_from(invocation: Sequence[int], prompt_ids: Sequence[int]) -> int | None:
    """The position an adapter acts from, or None when nothing invokes it."""
    tokens, ids = list(invocation), list(prompt_ids)
    starts = range(len(ids) - len(tokens), -1, -1)
    return 0 if not tokens else next((at for at in starts if ids[at : at + len(tokens)] == tokens), None)
