"""Low-rank terms beyond the ranks that a backend's kernels are made for, multiplied out where that makes them smaller.

What RandLoRA lowers to has the full rank of the weight. As a dense change it takes no more memory, and a step goes over
one product instead of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from adaptrt.adapters.dense import filled
from adaptrt.adapters.fit import FLOAT_DTYPES, AttachPoint
from adaptrt.adapters.normal import LoweredAdapter, LowRank, Term
from adaptrt.quant.plain import rows_to_float32, to_float32
from adaptrt.tensor import Tensor

_products: WeakKeyDictionary[Tensor, WeakKeyDictionary[Tensor, Tensor]] = WeakKeyDictionary()


def multiplied_out(
    adapter: LoweredAdapter, points: Mapping[str, AttachPoint], widest_rank: int
) -> LoweredAdapter:
    """The adapter with U V in the place of such terms: one object for all scales, as long as U and V live."""
    return {
        target: replace(
            lowered, terms=tuple(_smaller(term, points.get(target), widest_rank) for term in lowered.terms)
        )
        for target, lowered in adapter.items()
    }


def _smaller(term: Term, point: AttachPoint | None, widest_rank: int) -> Term:
    if point is None or not isinstance(term, LowRank) or term.u is None or term.d is not None:
        return term
    (rows, rank), (ranks, cols), out, inner = term.u.shape, term.v.shape, point.out, point.inner
    fits = rank == ranks and rows >= out and cols >= inner and point.kind in ("linear", "head")
    floats = term.u.dtype in FLOAT_DTYPES and term.v.dtype in FLOAT_DTYPES
    if not (fits and floats) or rank <= widest_rank or rank * (out + inner) < out * inner:
        return term
    return replace(term, u=None, v=_product(term.u, term.v, out, inner))


def _product(u: Tensor, v: Tensor, out: int, inner: int) -> Tensor:
    """U V [out, in], the outputs and inputs beyond left aside."""
    known = _products.setdefault(v, WeakKeyDictionary())
    found = known.get(u)
    if found is None or found.shape != (out, inner):
        right = to_float32(v)[:, :inner]
        change = filled((out, inner), lambda part: rows_to_float32(u, part.start, part.stop) @ right)
        found = known[u] = Tensor.from_numpy(change)
    return found
