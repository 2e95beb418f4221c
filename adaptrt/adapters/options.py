"""Rules for the options of a PEFT adapter_config.json: each is honoured or refused by name.

A rule takes an option's value and returns what is wrong with it, or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from adaptrt.adapters.problems import Problems, brief

Rule = Callable[[Any], str | None]

PATTERN_LENGTH = 512
PATH_LENGTH = 60  # characters of a module path, about: what one repetition may try
MATCH_BUDGET = 1 << 20  # steps that matching one path may take, about, for all patterns of a table together


def any_value(value: object) -> str | None:
    """It does not change what the adapter computes, or the tensors already show it."""
    return None


def rest(reason: str) -> Rule:
    """A rule that refuses, for this reason, every value but null, false, zero and empty."""
    return lambda value: reason if value else None


def boolean(value: object) -> str | None:
    """It is true or false."""
    return None if isinstance(value, bool) else "expected true or false"


def flag(value: object) -> str | None:
    """It is true, or at rest: some trainers write null for what nobody set."""
    return None if value is None else boolean(value)


def positive_int(value: object) -> str | None:
    """It is a whole number above 0."""
    return None if type(value) is int and value > 0 else "expected a whole number above 0"


def finite(value: object) -> str | None:
    """It is a finite number."""
    try:
        if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
            return None
    except OverflowError:  # an integer beyond every float
        pass
    return "expected a finite number"


def patterns(rule: Rule) -> Rule:
    """A rule for rank_pattern and the like: module-path patterns to values that each obey `rule`."""

    def check(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            return "expected an object"
        for pattern, item in value.items():
            problem = _pattern_problem(pattern) or rule(item)
            if problem:
                return f"{brief(pattern)}: {brief(item)}: {problem}"
        if sum(map(_match_cost, value)) > MATCH_BUDGET:
            return "these patterns could take too long to match"
        return None

    return check


def match_pattern(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value for a module path by PEFT's rule: the first match of `(.*\\.)?(pattern)$` wins."""
    for pattern, value in (table or {}).items():
        if _compiled(pattern).match(path):
            return value
    return default


def plain_patterns(rule: Rule) -> Rule:
    """`patterns` for `match_ending`: without choices and groups, which PEFT would read in its own way there."""

    def check(value: Any) -> str | None:
        if problem := patterns(rule)(value):
            return problem
        odd = [pattern for pattern in value or () if re.search(r"[|()]", pattern)]
        return f"{brief(odd[0])}: write the choices of a pattern one by one" if odd else None

    return check


def match_ending(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value for a module path by FourierFT's and C3A's rule: `.*\\.pattern$`, else the path word for word."""
    table = table or {}
    for pattern, value in table.items():
        if re.match(rf".*\.{pattern}$", path):
            return value
    return table.get(path, default)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _pattern_problem(pattern: str) -> str | None:
    """Why a pattern is not used. A repeated group can take time exponential in the path's length."""
    if len(pattern) > PATTERN_LENGTH:
        return f"pattern of {len(pattern)} characters, expected at most {PATTERN_LENGTH}"
    if re.search(r"\)[*+{]", pattern):
        return "pattern repeats a group"
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression ({error})"
    return None


def _match_cost(pattern: str) -> int:
    """An upper estimate of the steps that backtracking can take: repetitions and choices multiply."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    choices = len(re.findall(r"(?<![\\(])[?|]", pattern))
    return int(PATH_LENGTH**repeats * 2**choices)


def bias(value: object) -> str | None:
    """`none`, `all` or `<method>_only`; it stores replacements (adapters/carried.py)."""
    if isinstance(value, str) and (value in ("none", "all") or value.endswith("_only")):
        return None
    return "expected none, all or a method's _only"


def names(value: object) -> str | None:
    """Null, or a list of names."""
    if value is None or (isinstance(value, list) and all(isinstance(name, str) and name for name in value)):
        return None
    return "expected a list of names"


def token_rows(value: object) -> str | None:
    """Null, a list of token ids, or an object of such lists by module name."""
    lists = value.values() if isinstance(value, dict) else [value]
    if value is None or all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in lists):
        return None
    return "expected a list of token ids, or an object of them"


_BOOKKEEPING = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip

COMMON_OPTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(_BOOKKEEPING, any_value),
    "bias": bias,
    "modules_to_save": names,  # and with the next one: replacements too
    "trainable_token_indices": token_rows,
    "target_parameters": rest("adapted parameters of mixture-of-experts layers are not supported"),
    "layer_replication": rest("it needs a base with replicated layers"),
    "ensure_weight_tying": boolean,  # PEFT saves the tied adapter under both modules
}


def check_options(config: Mapping[str, Any], rules: Mapping[str, Rule], problems: Problems) -> None:
    """Apply each option's rule; an option without one must be at rest (null, false, zero or empty)."""
    for name, value in config.items():
        problem = rules.get(name, rest("unknown option"))(value)
        if problem:
            problems.add(f"option {brief(name)[1:-1]} = {brief(value)}: {problem}")
