"""In which dtype an adapter's tensors are stored, and how quantized ones reach variants and backends.

Only a **factor** is ever quantized: a role of two dimensions of which one is the base's `out` or `in`. Its stored form
has that one last, so that blocks of 64 run along it: what backends take as V, and as a quantized U. Variants know
nothing of this. They get float32 in the declared shape, and where they return such a tensor untouched in a low-rank
term, the stored one takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from adaptrt.adapters.carried import ROWS, WEIGHT
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.variant import Adapter, Variant
from adaptrt.errors import AdapterError
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.tensor import Tensor

AdapterDtype = Literal["bf16", "f16", "int8", "nf4"]
QUANTIZED = ("int8", "nf4")
Dims = tuple[str | int, ...]


def is_factor(dims: Dims) -> bool:
    """Whether a role of these dimensions may be quantized."""
    return len(dims) == 2 and (dims[0] in ("out", "in")) != (dims[1] in ("out", "in"))


def stored_dims(dims: Dims, dtype: str) -> Dims:
    """The dimensions of a factor as stored: quantized, the base's own comes last."""
    return dims[::-1] if dtype in QUANTIZED and is_factor(dims) and dims[0] in ("out", "in") else dims


def declared_form(tensor: Tensor, dims: Dims) -> Tensor:
    """A quantized factor as float32 in its declared shape; any other tensor as it is."""
    if tensor.dtype not in QUANTIZED:
        return tensor
    values = to_float32(tensor)
    return Tensor.from_numpy(values.T if stored_dims(dims, tensor.dtype) != dims else values)


def with_stored(lowered: Lowered, stored: Mapping[Tensor, Tensor]) -> Lowered:
    """Terms with the stored tensor wherever they hold its float32 form; `stored` maps that to it."""

    def exchanged(term: LowRank) -> LowRank:
        u = term.u if term.u is None else stored.get(term.u, term.u)
        return replace(term, u=u, v=stored.get(term.v, term.v))

    terms = tuple(exchanged(term) if isinstance(term, LowRank) else term for term in lowered.terms)
    return replace(lowered, terms=terms)


def convert_tensors(adapter: Adapter, variant: Variant, dtype: AdapterDtype) -> Adapter:
    """The adapter with its large tensors in another dtype: to int8 and nf4 its factors, else all matrices.

    Vectors and whole numbers stay, and what was derived from the old tensors is left out. Raises AdapterError
    when there is nothing to convert, or a value is beyond the dtype's range.
    """
    adapter = without_derived(adapter, variant)
    chosen: dict[str, Dims] = {}
    for target in adapter.targets:
        for role, name in target.tensors.items():
            dims = variant.roles.get(role, ("", "") if role in (WEIGHT, ROWS) else ())
            matrix = len(adapter.tensors[name].shape) == 2 and role not in variant.integers
            if is_factor(dims) if dtype in QUANTIZED else matrix:
                chosen[name] = dims
    if not chosen:
        raise AdapterError(
            f"adapter {adapter.name!r}: a {variant.name} adapter has no tensors to store as {dtype}"
        )
    converted = {name: _convert(name, adapter.tensors[name], dims, dtype) for name, dims in chosen.items()}
    return replace(adapter, tensors={**adapter.tensors, **converted})


def without_derived(adapter: Adapter, variant: Variant) -> Adapter:
    """The adapter without the tensors of `variant.derived`."""
    targets = tuple(
        replace(t, tensors={role: name for role, name in t.tensors.items() if role not in variant.derived})
        for t in adapter.targets
    )
    kept = {name for target in targets for name in target.tensors.values()}
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name in kept}
    return replace(adapter, targets=targets, tensors=tensors)


def _convert(name: str, tensor: Tensor, dims: Dims, dtype: AdapterDtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    values = to_float32(tensor)
    try:
        return from_float32(
            np.ascontiguousarray(values.T) if stored_dims(dims, dtype) != dims else values, dtype
        )
    except ValueError as error:
        raise AdapterError(f"{name}: {error}") from error
