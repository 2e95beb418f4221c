"""What a caller asks for and what comes back."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from adaptrt.errors import AdapterError, RequestError

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; raises RequestError naming an impossible value.

    Filters apply in llama.cpp's order: repeat penalty, top_k, top_p, min_p, temperature. `temperature` 0 is greedy;
    `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 switch a filter off; `max_tokens` None generates to the end
    of the context; `seed` None draws one at random; `stop` strings end the text and are not part of it.
    """

    max_tokens: int | None = 256
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.stop, str | list | tuple):
            raise RequestError(f"stop: found {self.stop!r}, expected text or a list of texts")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if isinstance(value, np.generic):  # of np.arange, say
                object.__setattr__(self, name, value := value.item())
            check_range(name, value, low, high)
        for name in ("max_tokens", "top_k", "seed"):
            check_integer(name, getattr(self, name))
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop: found {list(stop)!r}, expected non-empty strings")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Sampling:
        """Build from keyword options; an unknown one is refused by name."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(f"unknown option {name!r}, expected one of {', '.join(known)}")
        return cls(**options)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, 2**31 - 1),
    ("temperature", 0.0, 100.0),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repeat_penalty", 1e-3, 1e3),
    ("seed", 0, 2**64 - 1),
)
_OPTIONAL = ("max_tokens", "seed")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise RequestError unless value is a finite number in [low, high]; None passes for optional fields."""
    if value is None and name in _OPTIONAL:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # which NaN never is
        raise RequestError(f"{name}: found {value!r}, expected a number from {low:g} to {high:g}")


def check_integer(name: str, value: Any) -> None:
    """Raise RequestError unless value is None or a whole number."""
    if value is not None and not isinstance(value, int):
        raise RequestError(f"{name}: found {value!r}, expected a whole number")


AdapterSpec = str | Mapping[str, float] | Sequence[str | tuple[str, float]] | None


def as_stack(adapters: AdapterSpec) -> list[tuple[str, float]]:
    """(adapter name, scale) in stacking order; a name alone has scale 1. Raises AdapterError naming what it is not."""
    try:
        if isinstance(adapters, Mapping):
            pairs: list[Any] = list(adapters.items())
        else:
            items = [adapters] if isinstance(adapters, str) else adapters or ()
            pairs = [(item, 1.0) if isinstance(item, str) else tuple(item) for item in items]
        stack = [(name, scale) for name, scale in pairs]
        named = all(isinstance(name, str) for name, _ in stack)
    except (TypeError, ValueError):
        named = False
    if not named:
        expected = "a name, a list of names or (name, scale), or scales by name"
        raise AdapterError(f"adapters: found {adapters!r}, expected {expected}")
    return [(name, as_scale(name, scale)) for name, scale in stack]


def as_scale(name: str, scale: Any) -> float:
    """A finite number. Raises AdapterError for anything else."""
    try:
        number = math.nan if isinstance(scale, bool | str) else float(scale)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(f"adapter {name!r}: scale is {scale!r}, expected a finite number")
    return number


def as_ids(tokens: Sequence[int] | str) -> list[int]:
    """Token ids as plain integers. Raises RequestError for what is none: 1.0 is no id."""
    try:
        return [operator.index(token) for token in tokens]  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"prompt: found {tokens!r:.80}, expected token ids") from None


@dataclass(frozen=True)
class Request:
    """One prompt (text, or token ids used as they are) with its adapter stack and sampling.

    `adapters` None means the model's active adapters, an empty mapping the plain base; the order is the stacking
    order.
    """

    prompt: str | Sequence[int]
    adapters: AdapterSpec = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise RequestError(f"sampling: found {self.sampling!r:.80}, expected a Sampling")


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer: text that is complete UTF-8, and on the last chunk why generation ended.

    `token_ids` are the ids chosen since the last chunk (text may lag behind them), `n_tokens` counts them all.
    `n_prompt_tokens` is how much of the prompt is read: a long one goes through in pieces, each with a chunk.
    `error` is set with finish_reason "error": the request could not be run; the others of its batch go on.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    n_prompt_tokens: int
    n_tokens: int
    finish_reason: FinishReason | None = None
    error: str | None = None
