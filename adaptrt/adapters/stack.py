"""Lowering a whole adapter to the normal form. How they stack is in spec/adapters.md, "Stacking"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import numpy as np

from adaptrt.adapters.carried import CARRIED
from adaptrt.adapters.check import check_adapter, find_variant, sizes
from adaptrt.adapters.fit import AttachPoint, check_fit, check_numbers
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
    return at_scale(adapter, prepare(adapter, variants, base, progress), variants, base, scale)


def prepare(
    adapter: Adapter, variants: Mapping[str, Variant], base: Base, progress: Progress = no_progress
) -> LoweredAdapter:
    """What of lowering takes time and is the same at every scale, for `at_scale`. Raises as `lower`."""
    variant = _checked(adapter, variants, base)
    return dict(_each(adapter, base, partial(_prepare, adapter, variant), progress))


def at_scale(
    adapter: Adapter,
    prepared: LoweredAdapter,
    variants: Mapping[str, Variant],
    base: Base,
    scale: float,
    progress: Progress = no_progress,
) -> LoweredAdapter:
    """What `prepare` gave, at the user's `scale`; all scales have the tensors in common. Raises as `lower`."""
    if not math.isfinite(scale):
        raise AdapterError(f"adapter {adapter.name!r}: scale is {scale}, expected a finite number")
    if scale == 0:
        return {}
    variant = find_variant(adapter, variants)

    def scaled(target: Target, weight: BaseWeight, problems: Problems) -> Lowered:
        return _scale(adapter, variant, scale, prepared[target.target], target, weight, problems)

    return dict(_each(adapter, base, scaled, progress))


def check_lowers(
    adapter: Adapter, variants: Mapping[str, Variant], base: Base, progress: Progress = no_progress
) -> None:
    """Raise AdapterError for what cannot be lowered, as `lower` does, before it is written anywhere.

    None of it is kept, so that memory is needed for one target.
    """
    variant = _checked(adapter, variants, base)

    def both(target: Target, weight: BaseWeight, problems: Problems) -> Lowered:
        before = len(problems.lines)
        prepared = _prepare(adapter, variant, target, weight, problems)
        if len(problems.lines) > before:
            return prepared
        return _scale(adapter, variant, 1.0, prepared, target, weight, problems)

    for _ in _each(adapter, base, both, progress):
        pass


def _checked(adapter: Adapter, variants: Mapping[str, Variant], base: Base) -> Variant:
    """The variant of an adapter that fits it and the base."""
    variant, problems = find_variant(adapter, variants), Problems()
    check_adapter(adapter, variant, base.targets, problems)
    problems.raise_for(f"adapter {adapter.name!r}")
    return variant


def _each(
    adapter: Adapter,
    base: Base,
    work: Callable[[Target, BaseWeight, Problems], Lowered],
    progress: Progress,
) -> Iterator[tuple[str, Lowered]]:
    """What `work` makes of each target. Raises AdapterError with all that is wrong by its end."""
    problems = Problems()
    for done, target in enumerate(adapter.targets, start=1):
        try:
            with np.errstate(all="ignore"):  # what overflows is no longer finite, which is refused
                result = work(target, base.targets[target.target], problems.about(target.target))
        except (AdapterError, np.linalg.LinAlgError) as error:
            problems.add(f"{target.target}: {error}")
            continue
        progress(done, len(adapter.targets))
        yield target.target, result
    problems.raise_for(f"adapter {adapter.name!r}: lowered by variant {adapter.variant}")


def _prepare(
    adapter: Adapter, variant: Variant, target: Target, base: BaseWeight, problems: Problems
) -> Lowered:
    """One target as trained, all of it checked."""
    roles, carried = _roles(adapter, target)
    lowered = _lower_own(target, roles, variant, base) if roles else Lowered()
    for role, tensor in carried.items():
        lowered = CARRIED[role].add(lowered, tensor, target.params, base)
    check_fit(lowered, _point(base), problems)
    return lowered


def _scale(
    adapter: Adapter,
    variant: Variant,
    scale: float,
    prepared: Lowered,
    target: Target,
    base: BaseWeight,
    problems: Problems,
) -> Lowered:
    """One target at a scale; of what is checked the tensors are the same as before."""
    roles, _ = _roles(adapter, target)
    if roles:
        given = _declared(roles, variant)
        lowered = variant.at_scale(prepared, target.params, given, base, scale)
    else:
        lowered = prepared.scaled(scale)
    check_numbers(lowered, _point(base), problems)
    return lowered


def _roles(adapter: Adapter, target: Target) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a target by role: the variant's own, and what it carries."""
    roles = {role: adapter.tensors[name] for role, name in target.tensors.items()}
    carried = {role: roles.pop(role) for role in CARRIED if role in roles}
    return roles, carried


def _declared(roles: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    return {role: declared_form(tensor, variant.roles[role]) for role, tensor in roles.items()}


def _lower_own(target: Target, roles: Mapping[str, Tensor], variant: Variant, base: BaseWeight) -> Lowered:
    given = _declared(roles, variant)
    stored = {given[role]: roles[role] for role in roles}
    return with_stored(variant.lower(target.params, given, base), stored)


def _point(base: BaseWeight) -> AttachPoint:
    size = sizes(base)
    return AttachPoint(base.kind, size["out"], size["in"])
