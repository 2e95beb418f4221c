"""The normal form over a mixed batch: tokens are grouped by matrix, so one batched product serves every adapter.

What an adapter brings to an attach point is of two sorts. Vectors (gains, biases, d, e, scales) become tables with one
row a member of a level, from which each token picks its own. Matrices become groups: those of one kind and shape are
stacked [elements, …], the tokens gathered [elements, most tokens of one, in], and multiplied at once. Adapters that
share their matrices (VeRA) are one element.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from adaptrt.adapters.fit import FLOAT_DTYPES, AttachPoint
from adaptrt.adapters.normal import Kronecker, Lowered, LowRank, Sparse, Term
from adaptrt.tensor import Tensor
from adaptrt_torch.matrices import Matrix
from adaptrt_torch.placement import NONE, Level

Upload = Callable[[Tensor], Matrix]
Members = Sequence[Lowered | None]
Item = TypeVar("Item")


class Effect:
    """What one level's adapters do to one attach point; the last of the members is None, no adapter."""

    def __init__(self, members: Members, point: AttachPoint, upload: Upload, device: torch.device) -> None:
        bias_gains = [m.g_out if m and m.scales_bias else None for m in members]
        self.g_in = _table([m.g_in if m else None for m in members], 1.0, device)
        self.g_out = _table([m.g_out if m else None for m in members], 1.0, device)
        self.bias_gain = _table(bias_gains, 1.0, device)
        self.c = _table([m.c if m else None for m in members], 0.0, device)
        self.rotations = [  # [elements, in / b, b, b], and the element of each member
            (torch.from_numpy(np.stack(elements)).to(device), element_of)
            for elements, element_of in _groups([m.rotation if m else None for m in members], _rotation_key)
        ]
        most = max(len(m.terms) if m else 0 for m in members)
        columns: list[list[Term | None]] = [
            [m.terms[j] if m and j < len(m.terms) else None for m in members] for j in range(most)
        ]
        self.terms = [
            TermGroup(elements, element_of, column, point, upload, device)
            for column in columns
            for elements, element_of in _term_groups(column)
        ]

    def map_input(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """x [tokens, in] after the gains and rotations."""
        if self.g_in is not None:
            x = x * self.g_in[level.members[:-1]]
        for blocks, element_of in self.rotations:
            rows = level.grouped(element_of)
            padded = _padded(x)
            n, b = blocks.shape[1:3]
            turned = torch.einsum("gncb,gmnb->gmnc", blocks, padded[rows].unflatten(2, (n, b)))
            padded[rows] = turned.flatten(2)
            x = padded[:-1]
        return x

    def map_output(
        self, y: torch.Tensor, constant: torch.Tensor, x: torch.Tensor, level: Level
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What has accumulated, y and the constant [tokens, out], after this level; x as the terms see it."""
        if self.terms:
            inputs, total = _padded(x), _padded(y)
            for term in self.terms:
                rows = level.grouped(term.element_of)
                changed = term(inputs[rows], level.members[rows])
                total.index_add_(0, rows.flatten(), changed.flatten(0, 1))
            y = total[:-1]
        members = level.members[:-1]
        if self.g_out is not None:
            y = y * self.g_out[members]
        if self.bias_gain is not None:
            constant = constant * self.bias_gain[members]
        if self.c is not None:
            constant = constant + self.c[members]
        return y, constant


class TermGroup:
    """Terms of one kind and shape. `elements` differ in their matrices; `column` holds every member's term."""

    def __init__(
        self,
        elements: list[Term],
        element_of: NDArray[np.int64],
        column: Sequence[Term | None],
        point: AttachPoint,
        upload: Upload,
        device: torch.device,
    ) -> None:
        self.element_of = element_of
        mine = [term if e != NONE else None for term, e in zip(column, element_of, strict=True)]
        scales = np.array([[0.0 if term is None else term.scale] for term in mine], np.float32)
        self.scale = torch.from_numpy(scales).to(device)
        low = [term if isinstance(term, LowRank) else None for term in mine]
        self.d = _table([term.d if term else None for term in low], 1.0, device)
        self.e = _table([term.e if term else None for term in low], 1.0, device)
        self.product = _product(elements, point, upload, device)

    def __call__(self, x: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """The change [elements, m, out] of inputs [elements, m, in], or of token ids [elements, m]."""
        y = self.product(x, None if self.d is None else self.d[members])
        if self.e is not None:
            y = y * self.e[members]
        return y * self.scale[members]


Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def _product(elements: list[Term], point: AttachPoint, upload: Upload, device: torch.device) -> Product:
    """x [elements, m, in], d [elements, m, rank] or None -> [elements, m, out]."""
    first = elements[0]
    if isinstance(first, LowRank):
        return _low_rank([term for term in elements if isinstance(term, LowRank)], point, upload, device)
    if isinstance(first, Kronecker):
        kronecker = [term for term in elements if isinstance(term, Kronecker)]
        w1 = _stack([upload(term.w1).dense() for term in kronecker])
        w2 = _stack([upload(term.w2).dense() for term in kronecker])
        sizes = (w1.shape[2], w2.shape[2])
        return lambda x, d: torch.einsum("gab,gmbd,gcd->gmac", w1, x.unflatten(2, sizes), w2).flatten(2)
    sparse = SparseStack([term for term in elements if isinstance(term, Sparse)], point, device)
    return lambda x, d: sparse.rows(x) if point.kind == "embedding" else sparse.times(x)


def _low_rank(elements: list[LowRank], point: AttachPoint, upload: Upload, device: torch.device) -> Product:
    stored = [upload(term.v) for term in elements]

    def stacked() -> torch.Tensor:
        return _stack([matrix.dense()[:, : point.inner] for matrix in stored])

    # without U, V is as large as the weight, and like that it is widened only while it is used
    u = v = None
    if elements[0].u is not None:
        u = _stack([_out_last(term.u, upload)[:, : point.out] for term in elements if term.u is not None])
        v = stacked()
    each = torch.arange(len(stored), device=device)[:, None]

    def product(x: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
        wide = stacked() if v is None else v
        hidden = wide[each, :, x] if point.kind == "embedding" else torch.bmm(x, wide.transpose(1, 2))
        hidden = hidden if d is None else hidden * d
        return hidden if u is None else torch.bmm(hidden, u)

    return product


def _out_last(u: Tensor, upload: Upload) -> torch.Tensor:
    """U as [rank, out]; quantized ones are stored so."""
    dense = upload(u).dense()
    return dense.T if u.dtype in FLOAT_DTYPES else dense


class SparseStack:
    """Sparse changes of one attach point, their entries one after the other."""

    def __init__(self, elements: list[Sparse], point: AttachPoint, device: torch.device) -> None:
        rows, self.cols = point.weight_shape
        counts = [len(term.values) for term in elements]
        first = np.cumsum([0, *counts])
        starts = [
            term.row_start[:-1].astype(np.int64) + at for term, at in zip(elements, first, strict=False)
        ]
        lengths = np.concatenate([np.diff(term.row_start) for term in elements])
        self.n, self.out = len(elements), rows
        columns = np.concatenate([term.columns for term in elements]).astype(np.int64)
        of = np.repeat(np.arange(self.n), counts)
        values = np.concatenate([term.values for term in elements])
        target = np.repeat(np.arange(self.n * rows), lengths)
        arrays = (np.stack(starts), lengths.reshape(self.n, rows).astype(np.int64), columns, values)
        self.start, self.length, self.columns, self.values, self.source, self.target = (
            torch.from_numpy(array).to(device) for array in (*arrays, of * self.cols + columns, target)
        )

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """S x for x [elements, m, in]."""
        columns = x.transpose(1, 2).flatten(0, 1)  # [elements · in, m]
        y = x.new_zeros((self.n * self.out, x.shape[1]))
        y.index_add_(0, self.target, columns[self.source] * self.values[:, None])
        return y.reshape(self.n, self.out, -1).transpose(1, 2)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding's change [elements, m, width] for token ids [elements, m]."""
        each = torch.arange(self.n, device=tokens.device)[:, None]
        start, length = self.start[each, tokens].flatten(), self.length[each, tokens].flatten()
        row = torch.repeat_interleave(length)
        entry = torch.arange(len(row), device=row.device) + (start - length.cumsum(0) + length)[row]
        y = self.values.new_zeros((tokens.numel(), self.cols))
        y[row, self.columns[entry]] = self.values[entry]
        return y.reshape(*tokens.shape, self.cols)


def _table(
    vectors: Sequence[NDArray[np.float32] | None], rest: float, device: torch.device
) -> torch.Tensor | None:
    """One row a member, `rest` where it has no vector; None when none has."""
    sizes = [len(vector) for vector in vectors if vector is not None]
    if not sizes:
        return None
    neutral = np.full(sizes[0], rest, np.float32)
    return torch.from_numpy(np.stack([neutral if v is None else v for v in vectors])).to(device)


def _groups(
    items: Sequence[Item | None], key: Callable[[Item], tuple[Hashable, Hashable]]
) -> list[tuple[list[Item], NDArray[np.int64]]]:
    """Items of equal shape together: the distinct ones, and which of them each member has (NONE: not in this group).

    `key` gives an item's shape and its identity.
    """
    groups: dict[Hashable, dict[Hashable, tuple[int, Item]]] = {}
    element_of: dict[Hashable, NDArray[np.int64]] = {}
    for member, item in enumerate(items):
        if item is not None:
            shape, identity = key(item)
            group = groups.setdefault(shape, {})
            number, _ = group.setdefault(identity, (len(group), item))
            element_of.setdefault(shape, np.full(len(items), NONE, np.int64))[member] = number
    return [([item for _, item in group.values()], element_of[shape]) for shape, group in groups.items()]


def _term_groups(terms: Sequence[Term | None]) -> list[tuple[list[Term], NDArray[np.int64]]]:
    return _groups(terms, _term_key)


def _rotation_key(rotation: NDArray[np.float32]) -> tuple[Hashable, Hashable]:
    return rotation.shape, id(rotation)


def _term_key(term: Term) -> tuple[Hashable, Hashable]:
    if isinstance(term, LowRank):
        return ("low-rank", term.rank, term.u is None), (id(term.u), id(term.v))
    if isinstance(term, Kronecker):
        return (term.w1.shape, term.w2.shape), (id(term.w1), id(term.w2))
    return "sparse", (id(term.row_start), id(term.columns), id(term.values))


def _padded(values: torch.Tensor) -> torch.Tensor:
    """A copy with one more row of zeros, for the empty places of padded groups."""
    return torch.cat([values, values.new_zeros((1, *values.shape[1:]))])


def _stack(matrices: list[torch.Tensor]) -> torch.Tensor:
    """[elements, …]; the only one stays where it is, maybe shared by many attach points."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)
