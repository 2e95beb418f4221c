"""Whether a lowered target fits its attach point: what a variant promises to the backends (spec/adapters.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptrt.adapters.normal import Lowered, LowRank, Sparse, Term, Vector
from adaptrt.adapters.problems import Problems
from adaptrt.tensor import Tensor

LARGEST = float(np.finfo(np.float32).max)
FLOAT_DTYPES = ("f32", "f16", "bf16")
TERM_DTYPES = (*FLOAT_DTYPES, "int8", "nf4")


@dataclass(frozen=True)
class AttachPoint:
    """Where adapters act: `embedding`, `norm`, `linear` or `head`, mapping `inner` values (or token ids) to `out`."""

    kind: str
    out: int
    inner: int

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight, one row a token id for an embedding."""
        return (self.inner, self.out) if self.kind == "embedding" else (self.out, self.inner)


def check_fit(lowered: Lowered, point: AttachPoint, problems: Problems) -> None:
    """The promise a variant makes to the backends: shapes, dtypes and finite numbers."""
    others = (lowered.g_in, lowered.rotation, lowered.c)
    if point.kind == "norm" and (lowered.terms or any(part is not None for part in others)):
        problems.add("a norm takes g_out and nothing else")
    for k, term in enumerate(lowered.terms):
        _check_term(k, term, point, problems)
    check_numbers(lowered, point, problems)


def check_numbers(lowered: Lowered, point: AttachPoint, problems: Problems) -> None:
    """The part of it that a scale changes: gains, constants, rotations and the factors of terms."""
    for k, term in enumerate(lowered.terms):
        if not abs(term.scale) <= LARGEST:
            problems.add(f"scale{k} is {term.scale}, expected a finite float32")
    rotation = lowered.rotation
    if rotation is not None:
        fits = rotation.ndim == 3 and rotation.shape[1] == rotation.shape[2]
        if point.kind == "embedding" or not fits or rotation.shape[0] * rotation.shape[1] != point.inner:
            problems.add(f"rotation is {list(rotation.shape)}, expected [{point.inner}/b, b, b]")
    _check_vector("g_in", lowered.g_in, point.inner, problems)
    _check_vector("g_out", lowered.g_out, point.out, problems)
    _check_vector("c", lowered.c, point.out, problems)
    _check_finite("rotation", rotation, problems)


def _check_term(k: int, term: Term, point: AttachPoint, problems: Problems) -> None:
    if isinstance(term, LowRank):
        _check_low_rank(k, term, point, problems)
    elif isinstance(term, Sparse):
        rows, cols = point.weight_shape
        _check_sparse(k, term, rows, cols, problems)
    else:
        (a, b), (c, d) = (_rows_cols(tensor) for tensor in (term.w1, term.w2))
        if point.kind == "embedding" or (a * c, b * d) != (point.out, point.inner):
            problems.add(
                f"W{k} is [{a}, {b}] ⊗ [{c}, {d}], expected a product of [{point.out}, {point.inner}]"
            )
        _check_items(f"W1 of term {k}", term.w1, FLOAT_DTYPES, problems)
        _check_items(f"W2 of term {k}", term.w2, FLOAT_DTYPES, problems)


def _check_low_rank(k: int, term: LowRank, point: AttachPoint, problems: Problems) -> None:
    rank, inner = _rows_cols(term.v)
    _check_items(f"V{k}", term.v, TERM_DTYPES, problems)
    if inner < point.inner or (inner > point.inner and term.v.dtype not in FLOAT_DTYPES):
        problems.add(f"V{k} is {list(term.v.shape)}, expected [rank, {point.inner}]")
    if term.u is None:
        if rank != point.out:
            problems.add(f"V{k} is {list(term.v.shape)} without U, expected [{point.out}, {point.inner}]")
    else:
        _check_items(f"U{k}", term.u, TERM_DTYPES, problems)
        quantized = term.u.dtype not in FLOAT_DTYPES
        out, inner_rank = _rows_cols(term.u)[:: -1 if quantized else 1]
        if inner_rank != rank or out < point.out or (quantized and out > point.out):
            expected = f"[{rank}, {point.out}]" if quantized else f"[{point.out}, {rank}]"
            problems.add(f"U{k} is {list(term.u.shape)}, expected {expected}")
    _check_vector(f"d{k}", term.d, rank, problems)
    _check_vector(f"e{k}", term.e, point.out, problems)


def _check_sparse(k: int, term: Sparse, rows: int, cols: int, problems: Problems) -> None:
    start, columns = term.row_start, term.columns
    _check_vector(f"values{k}", term.values, len(columns), problems)
    fits = start.shape == (rows + 1,) and start[0] == 0 and start[-1] == len(columns)
    if not fits or (np.diff(start) < 0).any():
        problems.add(f"row_start{k} does not rise from 0 to {len(columns)} entries in {rows} rows")
        return
    if len(columns) and not (columns.min() >= 0 and columns.max() < cols):
        problems.add(f"columns{k} are {columns.min()} to {columns.max()}, expected 0 to {cols - 1}")
    falls = np.flatnonzero(np.diff(columns) <= 0) + 1
    if not np.isin(falls, start).all():
        problems.add(f"columns{k} do not rise within a row")


def _rows_cols(tensor: Tensor) -> tuple[int, int]:
    """Two sizes of a tensor; (0, 0), which fits nothing, unless it has two dimensions."""
    return (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) == 2 else (0, 0)


def _check_items(name: str, tensor: Tensor, dtypes: tuple[str, ...], problems: Problems) -> None:
    if tensor.dtype not in dtypes:
        problems.add(f"{name} is of dtype {tensor.dtype}, expected {', '.join(dtypes)}")
    if tensor.dtype == "f32":  # it may have been computed; what was read is finite
        _check_finite(name, tensor.data.view(np.float32), problems)


def _check_vector(name: str, vector: Vector | None, size: int, problems: Problems) -> None:
    if vector is not None and vector.shape != (size,):
        problems.add(f"{name} is {list(vector.shape)}, expected [{size}]")
    _check_finite(name, vector, problems)


def _check_finite(name: str, values: Vector | None, problems: Problems) -> None:
    if values is not None and not (values.dtype == np.float32 and np.isfinite(values).all()):
        problems.add(f"{name} is not all finite float32")
