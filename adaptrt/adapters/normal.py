"""The adapter normal form (spec/adapters.md), the only thing backends know of adapters. For a target

    y = g_out ⊙ [ W·(g_in ⊙ x) + Σ_k scale_k · U_k (d_k ⊙ (V_k x)) ] + c

A stack is applied in order: each adapter's g_out acts on what was accumulated so far, as PEFT does; every
g_in multiplies x before W; the base's own bias and every c are added last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptrt.tensor import Tensor

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Term:
    """scale · U (d ⊙ (V x)): U [out, rank], V [rank, in] f32, f16 or bf16, shared by identity; d [rank]."""

    u: Tensor
    v: Tensor
    scale: float
    d: Vector | None = None


@dataclass(frozen=True)
class Lowered:
    """What an adapter does to one target. Vectors are float32: g_in [in], g_out and c [out]."""

    terms: tuple[Term, ...] = ()
    g_in: Vector | None = None
    g_out: Vector | None = None
    c: Vector | None = None


LoweredAdapter = Mapping[str, Lowered]  # by target name, e.g. "blk.0.attn_q"
