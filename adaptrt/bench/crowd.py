"""Many streams, each with an adapter of its own: kinds of adapters that a server would hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from adaptrt.adapters.normal import Lowered, LoweredAdapter, LowRank
from adaptrt.bench.shapes import Specs, random_adapters, random_factor, random_tensor
from adaptrt.model.architecture import TensorSpec
from adaptrt.tensor import Tensor


@dataclass(frozen=True)
class Kind:
    """Low-rank adapters of one rank and dtype on the linear layers whose names contain one of `layers`."""

    rank: int
    dtype: str
    layers: tuple[str, ...] = ("",)


KINDS: Mapping[str, Kind] = {
    "q and v, rank 8, bf16": Kind(8, "bf16", ("attn_q", "attn_v")),
    "all, rank 16, nf4": Kind(16, "nf4"),
    "all, rank 16, int8": Kind(16, "int8"),
    "all, rank 16, bf16": Kind(16, "bf16"),
}
VERA_RANK = 256


def crowds(specs: Specs, count: int) -> Iterator[tuple[str, list[LoweredAdapter]]]:
    """(name, `count` adapters): no two share memory, except VeRA's projections."""
    for name, kind in KINDS.items():
        one = list(_low_rank(specs, kind))
        yield name, [{target: _copy(term) for target, term in one} for _ in range(count)]
    yield f"VeRA, rank {VERA_RANK}", random_adapters("vera", specs, VERA_RANK, count)


def _low_rank(specs: Specs, kind: Kind) -> Iterator[tuple[str, LowRank]]:
    rng = np.random.default_rng(0)
    for spec in specs:
        if spec.role == "linear" and any(layer in spec.name for layer in kind.layers):
            out, inner = spec.shape
            quantized = kind.dtype in ("int8", "nf4")  # U is then stored transposed
            u = _factor(rng, kind.dtype, *((kind.rank, out) if quantized else (out, kind.rank)))
            yield spec.target, LowRank(u, _factor(rng, kind.dtype, kind.rank, inner), 0.1)


def _factor(rng: np.random.Generator, dtype: str, rows: int, cols: int) -> Tensor:
    if dtype == "bf16":
        return random_factor(rng, rows, cols)
    return random_tensor(TensorSpec("", "", (rows, cols), "linear" if dtype == "nf4" else "embedding"), rng)


def _copy(term: LowRank) -> Lowered:
    u, v = (Tensor(f.dtype, f.shape, f.data.copy()) for f in (term.u, term.v) if f is not None)
    return Lowered((LowRank(u, v, term.scale),))
