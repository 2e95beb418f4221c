"""The adapter normal form (spec/adapters.md), the only thing backends know of adapters. For an attach point

    y = g_out ⊙ [ W·R(g_in ⊙ x) + Σ_k scale_k · T_k(x) ] + b + c

T_k is one of the three kinds of Term below, R an optional block-diagonal map of the input. A stack is applied in
order: each adapter's g_in and R act on the input that W sees, its terms add to what was accumulated so far, and its
g_out multiplies all of that, as PEFT does. The base's bias b and every c are added last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adaptrt.tensor import Tensor

Vector = NDArray[np.float32]
Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class LowRank:
    """scale · e ⊙ U (d ⊙ (V x)); d [rank] and e [out] are optional.

    V is [rank, ≥ in] and U [≥ out, rank]: what lies beyond `in` and `out` is ignored, so that attach points of any
    size share one projection by identity (VeRA). U None is the identity, rank = out: V is then a dense change of
    the weight. Float tensors are f32, f16 or bf16. Quantized ones (int8, nf4) have exact sizes, and U is stored
    transposed, [rank, out], so that its blocks run along `out`.
    """

    u: Tensor | None
    v: Tensor
    scale: float = 1.0
    d: Vector | None = None
    e: Vector | None = None

    @property
    def rank(self) -> int:
        """Rows of V."""
        return self.v.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that one use of the term reads."""
        vectors = sum(vector.nbytes for vector in (self.d, self.e) if vector is not None)
        return vectors + self.v.data.nbytes + (0 if self.u is None else self.u.data.nbytes)


@dataclass(frozen=True)
class Sparse:
    """scale · S x, S in compressed rows: those of the weight, [out, in], and for an embedding [vocabulary, width].

    Row r holds `values[k]` at `columns[k]` for k in row_start[r] … row_start[r + 1] - 1; columns rise in a row.
    """

    row_start: Int32s  # [rows + 1]
    columns: Int32s  # [entries]
    values: Vector  # [entries]
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that one use of the term reads."""
        return self.row_start.nbytes + self.columns.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Kronecker:
    """scale · (W1 ⊗ W2) x, W1 [a, b] and W2 [c, d] f32, f16 or bf16, out = a·c, in = b·d. Not for embeddings."""

    w1: Tensor
    w2: Tensor
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that one use of the term reads."""
        return self.w1.data.nbytes + self.w2.data.nbytes


Term = LowRank | Sparse | Kronecker


@dataclass(frozen=True)
class Lowered:
    """What an adapter does to one attach point; everything is float32 and optional.

    g_in [in], g_out and c [out]; `rotation` [in/b, b, b] maps each run of b inputs, after g_in, x'_j = R_j x_j.
    `scales_bias`: g_out multiplies the bias accumulated so far too (IA3 does, DoRA does not). The embedding takes no
    rotation; a norm, whose weight is a diagonal, takes g_out only.
    """

    terms: tuple[Term, ...] = ()
    g_in: Vector | None = None
    rotation: NDArray[np.float32] | None = None
    g_out: Vector | None = None
    scales_bias: bool = False
    c: Vector | None = None

    def scaled(self, scale: float) -> Lowered:
        """`scale` times the change: of terms and constants the multiple, of gains and rotations so far on their way.

        The terms' tensors stay the same objects, so that backends hold them once for all scales.
        """
        if scale == 1:
            return self
        factor = np.float32(scale)
        return replace(
            self,
            terms=tuple(replace(term, scale=term.scale * scale) for term in self.terms),
            g_in=None if self.g_in is None else 1 + factor * (self.g_in - 1),
            rotation=None if self.rotation is None else _turned_so_far(self.rotation, factor),
            g_out=None if self.g_out is None else 1 + factor * (self.g_out - 1),
            c=None if self.c is None else factor * self.c,
        )


def _turned_so_far(rotation: NDArray[np.float32], factor: np.float32) -> NDArray[np.float32]:
    """I + factor · (R - I)."""
    eye = np.eye(rotation.shape[-1], dtype=np.float32)
    return np.asarray(eye + factor * (rotation - eye), np.float32)


LoweredAdapter = Mapping[str, Lowered]  # by target name, e.g. "blk.0.attn_q"
