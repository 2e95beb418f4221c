"""Lowering a whole adapter to the normal form. How they stack is in spec/adapters.md, "Stacking"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from adaptrt.adapters.carried import CARRIED
from adaptrt.adapters.check import check_adapter, find_variant, sizes
from adaptrt.adapters.fit import AttachPoint, check_fit
from adaptrt.adapters.normal import Lowered, LoweredAdapter
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.stored import declared_form, with_stored
from adaptrt.adapters.variant import Adapter, BaseWeight, Progress, Target, Variant, no_progress
from adaptrt.errors import AdapterError
from adaptrt.tensor import Tensor


class Base(Protocol):
    """What lowering needs of a base: its attach points by name."""

    @property
    def targets(self) -> Mapping[str, BaseWeight]:
        """BaseWeight by target name."""


def lower(
    adapter: Adapter,
    variants: Mapping[str, Variant],
    base: Base,
    scale: float,
    progress: Progress = no_progress,
) -> LoweredAdapter:
    """The normal form of every target at the user's `scale`; nothing at scale 0.

    Raises AdapterError for a scale that is not finite, for a variant that is not installed, and naming
    everything in the adapter that does not fit its variant or the base.
    """
    return dict(lower_each(adapter, variants, base, scale, progress))


def lower_each(
    adapter: Adapter,
    variants: Mapping[str, Variant],
    base: Base,
    scale: float,
    progress: Progress = no_progress,
) -> Iterator[tuple[str, Lowered]]:
    """As `lower`, a target at a time, so that whoever keeps none needs memory for one. Raises by its end."""
    what = f"adapter {adapter.name!r}"
    if not math.isfinite(scale):
        raise AdapterError(f"{what}: scale is {scale}, expected a finite number")
    variant = find_variant(adapter, variants)
    problems = Problems()
    check_adapter(adapter, variant, base.targets, problems)
    problems.raise_for(what)
    if scale == 0:
        return
    for done, target in enumerate(adapter.targets, start=1):
        weight = base.targets[target.target]
        try:
            with np.errstate(all="ignore"):  # what overflows is no longer finite: check_fit refuses it
                result = _lower_target(target, adapter.tensors, variant, weight, scale)
        except (AdapterError, np.linalg.LinAlgError) as error:
            problems.add(f"{target.target}: {error}")
            continue
        size = sizes(weight)
        point = AttachPoint(weight.kind, size["out"], size["in"])
        check_fit(result, point, problems.about(target.target))
        progress(done, len(adapter.targets))
        yield target.target, result
    problems.raise_for(f"{what}: lowered by variant {variant.name}")


def check_lowers(
    adapter: Adapter, variants: Mapping[str, Variant], base: Base, progress: Progress = no_progress
) -> None:
    """Raise AdapterError for what cannot be lowered, as `lower` does, before it is written anywhere."""
    for _ in lower_each(adapter, variants, base, 1.0, progress):
        pass


def _lower_target(
    target: Target, tensors: Mapping[str, Tensor], variant: Variant, base: BaseWeight, scale: float
) -> Lowered:
    roles = {role: tensors[name] for role, name in target.tensors.items()}
    carried = {role: roles.pop(role) for role in CARRIED if role in roles}
    lowered = _lower_own(target, roles, variant, base, scale) if roles else Lowered()
    for role, tensor in carried.items():
        lowered = CARRIED[role].add(lowered, tensor, target.params, base, scale)
    return lowered


def _lower_own(
    target: Target, roles: Mapping[str, Tensor], variant: Variant, base: BaseWeight, scale: float
) -> Lowered:
    given = {role: declared_form(tensor, variant.roles[role]) for role, tensor in roles.items()}
    stored = {given[role]: roles[role] for role in roles}
    return with_stored(variant.lower(target.params, given, base, scale), stored)
