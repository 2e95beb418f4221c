"""Lowering a whole adapter to the normal form. How they stack is in spec/adapters.md, "Stacking"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from adaptrt.adapters.check import REPLACED_BIAS, check_adapter, find_variant, sizes
from adaptrt.adapters.normal import Lowered, LoweredAdapter
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import Adapter, BaseWeight, Target, Variant
from adaptrt.errors import AdapterError
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

LARGEST = float(np.finfo(np.float32).max)
TERM_DTYPES = ("f32", "f16", "bf16")


class Base(Protocol):
    """What lowering needs of a base: its attach points by name."""

    @property
    def targets(self) -> Mapping[str, BaseWeight]:
        """BaseWeight by target name."""


def lower(adapter: Adapter, variants: Mapping[str, Variant], base: Base, scale: float) -> LoweredAdapter:
    """The normal form of every target at the user's `scale`; nothing at scale 0.

    Raises AdapterError for a scale that is not finite, for a variant that is not installed, and naming
    everything in the adapter that does not fit its variant or the base.
    """
    what = f"adapter {adapter.name!r}"
    if not math.isfinite(scale):
        raise AdapterError(f"{what}: scale is {scale}, expected a finite number")
    variant = find_variant(adapter, variants)
    problems = Problems()
    check_adapter(adapter, variant, base.targets, problems)
    problems.raise_for(what)
    if scale == 0:
        return {}
    lowered = {}
    for target in adapter.targets:
        weight = base.targets[target.target]
        result = _lower_target(target, adapter.tensors, variant, weight, scale)
        lowered[target.target] = result
        _check_lowered(result, weight, problems.about(target.target))
    problems.raise_for(f"{what}: lowered by variant {variant.name}")
    return lowered


def _lower_target(
    target: Target, tensors: Mapping[str, Tensor], variant: Variant, base: BaseWeight, scale: float
) -> Lowered:
    roles = {role: tensors[name] for role, name in target.tensors.items()}
    replaced = roles.pop(REPLACED_BIAS, None)
    lowered = variant.lower(target.params, roles, base, scale) if roles else Lowered()
    if replaced is None:
        return lowered
    old = base.bias()
    change = np.float32(scale) * (to_float32(replaced) - (0 if old is None else old))
    return replace(lowered, c=change if lowered.c is None else lowered.c + change)


def _check_lowered(lowered: Lowered, base: BaseWeight, problems: Problems) -> None:
    """The promise a variant makes to the backends: shapes, dtypes and finite numbers."""
    for name, found, expected in _shapes(lowered, sizes(base)):
        if found != expected:
            problems.add(f"{name} is {list(found)}, expected {list(expected)}")
    for k, term in enumerate(lowered.terms):
        if not abs(term.scale) <= LARGEST:
            problems.add(f"scale{k} is {term.scale}, expected a finite float32")
        for name, dtype in ((f"U{k}", term.u.dtype), (f"V{k}", term.v.dtype)):
            if dtype not in TERM_DTYPES:
                problems.add(f"{name} is of dtype {dtype}, expected {', '.join(TERM_DTYPES)}")
    vectors = [(f"d{k}", term.d) for k, term in enumerate(lowered.terms)]
    for name, vector in [*vectors, ("g_in", lowered.g_in), ("g_out", lowered.g_out), ("c", lowered.c)]:
        if vector is not None and not (vector.dtype == np.float32 and np.isfinite(vector).all()):
            problems.add(f"{name} is not all finite float32")


def _shapes(
    lowered: Lowered, size: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, found, expected) of every part."""
    for k, term in enumerate(lowered.terms):
        rank = term.v.shape[0] if term.v.shape else 0
        yield f"U{k}", term.u.shape, (size["out"], rank)
        yield f"V{k}", term.v.shape, (rank, size["in"])
        if term.d is not None:
            yield f"d{k}", term.d.shape, (rank,)
    for name, vector, side in (
        ("g_in", lowered.g_in, "in"),
        ("g_out", lowered.g_out, "out"),
        ("c", lowered.c, "out"),
    ):
        if vector is not None:
            yield name, vector.shape, (size[side],)
