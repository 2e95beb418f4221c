"""A stack of lowered adapters folded into the base's own tensors, from the normal form alone (spec/adapters.md).

Everything is made in runs of rows, so that memory does not grow with a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.base import BaseTarget
from adaptrt.adapters.fit import FLOAT_DTYPES
from adaptrt.adapters.normal import Kronecker, Lowered, LowRank, Sparse, Term
from adaptrt.quant.plain import rows_to_float32, to_float32

Floats = NDArray[np.float32]


def changes_weight(stack: Sequence[Lowered]) -> bool:
    """Whether the weight is another one under these adapters."""
    parts = [part for one in stack for part in (one.g_in, one.rotation, one.g_out)]
    return any(one.terms for one in stack) or any(part is not None for part in parts)


@np.errstate(over="ignore", invalid="ignore")
def merged_rows(base: BaseTarget, stack: Sequence[Lowered], start: int, stop: int) -> Floats:
    """Rows start … stop - 1 of the weight under a stack: a linear layer's, the head's, or the embedding's table's.

    What outgrows float32 is infinite or NaN.
    """
    if base.kind == "embedding":
        return _merged_table(base, stack, start, stop)
    rows = base.rows(start, stop)
    for lowered in reversed(stack):  # W (R_n G_n) … (R_1 G_1): the last adapter's map is the nearest to W
        if lowered.rotation is not None:
            blocks, b, _ = lowered.rotation.shape
            rows = np.einsum("tnc,ncb->tnb", rows.reshape(-1, blocks, b), lowered.rotation).reshape(
                rows.shape
            )
        rows = rows if lowered.g_in is None else rows * lowered.g_in
    for lowered in stack:
        for term in lowered.terms:
            rows = rows + np.float32(term.scale) * _term_rows(term, base.shape, start, stop)
        rows = rows if lowered.g_out is None else rows * lowered.g_out[start:stop, None]
    return np.asarray(rows, np.float32)


def _merged_table(base: BaseTarget, stack: Sequence[Lowered], start: int, stop: int) -> Floats:
    """Rows of the embedding: each is what the normal form gives for one token, constants included."""
    rows = base.rows(start, stop)
    for lowered in stack:
        rows = rows if lowered.g_in is None else rows * lowered.g_in[start:stop, None]
    constant = np.zeros(base.shape[1], np.float32)
    for lowered in stack:
        for term in lowered.terms:
            rows = rows + np.float32(term.scale) * _table_rows(term, base.shape, start, stop)
        if lowered.g_out is not None:
            rows = rows * lowered.g_out
            constant = constant * lowered.g_out if lowered.scales_bias else constant
        constant = constant if lowered.c is None else constant + lowered.c
    return np.asarray(rows + constant, np.float32)


def merged_bias(bias: Floats | None, stack: Sequence[Lowered], out: int) -> Floats | None:
    """The constant [out] added at the end; None when there is none."""
    constant = bias
    for lowered in stack:
        if constant is not None and lowered.g_out is not None and lowered.scales_bias:
            constant = constant * lowered.g_out
        if lowered.c is not None:
            constant = lowered.c if constant is None else constant + lowered.c
    return constant


def merged_norm(weight: Floats, stack: Sequence[Lowered]) -> Floats:
    """A norm's diagonal [width] under its gains."""
    for lowered in stack:
        weight = weight if lowered.g_out is None else weight * lowered.g_out
    return weight


def _term_rows(term: Term, shape: tuple[int, int], start: int, stop: int) -> Floats:
    """Rows of the change a term makes to a weight [out, in], before its scale."""
    if isinstance(term, Sparse):
        return _sparse_rows(term, shape[1], start, stop)
    if isinstance(term, Kronecker):
        w1, w2 = to_float32(term.w1), to_float32(term.w2)
        outer, inner = np.divmod(np.arange(start, stop), len(w2))
        return np.asarray(np.einsum("tb,td->tbd", w1[outer], w2[inner]).reshape(stop - start, -1))
    if term.u is None:
        change = rows_to_float32(term.v, start, stop)[:, : shape[1]]
        change = change if term.d is None else change * term.d[start:stop, None]
    else:
        quantized = term.u.dtype not in FLOAT_DTYPES
        u = to_float32(term.u)[:, start:stop].T if quantized else rows_to_float32(term.u, start, stop)
        change = np.asarray((u if term.d is None else u * term.d) @ to_float32(term.v)[:, : shape[1]])
    return np.asarray(change if term.e is None else change * term.e[start:stop, None])


def _table_rows(term: Term, shape: tuple[int, int], start: int, stop: int) -> Floats:
    """Rows of the change a term makes to the embedding's table [vocabulary, width], before its scale."""
    if isinstance(term, Sparse):
        return _sparse_rows(term, shape[1], start, stop)
    if not isinstance(term, LowRank):
        raise TypeError("an embedding takes no Kronecker term")  # check_fit lets none through
    hidden = to_float32(term.v)[:, start:stop].T
    hidden = hidden if term.d is None else hidden * term.d
    if term.u is not None:
        u = to_float32(term.u)
        hidden = hidden @ (u if term.u.dtype not in FLOAT_DTYPES else u.T)[:, : shape[1]]
    return np.asarray(hidden if term.e is None else hidden * term.e)


def _sparse_rows(term: Sparse, cols: int, start: int, stop: int) -> Floats:
    change = np.zeros((stop - start, cols), np.float32)
    counts = np.diff(term.row_start[start : stop + 1])
    here = slice(term.row_start[start], term.row_start[stop])
    change[np.repeat(np.arange(stop - start), counts), term.columns[here]] = term.values[here]
    return change
