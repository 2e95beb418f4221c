"""What lowering needs of the base's whole weights (Variant.derive), computed once and kept in the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from adaptrt.adapters.stored import declared_form, without_derived
from adaptrt.adapters.variant import Adapter, BaseWeight, Progress, Target, Variant, no_progress
from adaptrt.errors import AdapterError
from adaptrt.tensor import Tensor

DERIVED = "derived."  # before the names of such tensors: `derived.TARGET.ROLE`


def with_derived(
    adapter: Adapter, variant: Variant, base: Mapping[str, BaseWeight], progress: Progress = no_progress
) -> Adapter:
    """A checked adapter with its derived tensors computed anew."""
    if not variant.derived:
        return adapter
    adapter = without_derived(adapter, variant)
    targets, tensors = [], dict(adapter.tensors)
    for done, target in enumerate(adapter.targets, start=1):
        try:
            derived = _derive(target, tensors, variant, base[target.target])
        except AdapterError as error:
            raise AdapterError(f"adapter {adapter.name!r}: {target.target}: {error}") from error
        names = {role: f"{DERIVED}{target.target}.{role}" for role in derived}
        tensors |= {names[role]: tensor for role, tensor in derived.items()}
        targets.append(replace(target, tensors={**target.tensors, **names}))
        progress(done, len(adapter.targets))
    return replace(adapter, targets=tuple(targets), tensors=tensors)


def _derive(
    target: Target, tensors: Mapping[str, Tensor], variant: Variant, base: BaseWeight
) -> Mapping[str, Tensor]:
    own = {role: tensors[name] for role, name in target.tensors.items() if role in variant.roles}
    if not own:  # what any adapter may carry, on a target of its own
        return {}
    given = {role: declared_form(tensor, variant.roles[role]) for role, tensor in own.items()}
    with np.errstate(all="ignore"):  # what overflows is not finite, and `lower` refuses it
        return variant.derive(target.params, given, base)
