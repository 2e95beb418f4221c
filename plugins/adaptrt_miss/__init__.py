"""MiSS (Kang and Yin, arXiv:2409.15371) and its predecessor Bone: one block of rank r for every shard of r inputs.

    balance, mini   W x + Dᵀ (Σ of the shards of x)    D [r, out], or [r, mini_r] repeated along the outputs
    bat             every block W_ij [r, r] of the weight changes by W_ij D_i + D_i, D [out / r, r, r]

The sum over shards is a matrix of zeros and ones, one for all modules that read r and `in` inputs alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np

from adaptrt.adapters.dense import Floats, dense_term, transposed
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT_RANK, PEFT_DEFAULT_MINI_RANK = 64, 1


def _form(value: object) -> str | None:
    return (
        None if isinstance(value, bool) or value in ("bat", "mini") else "expected true, false, bat or mini"
    )


class MissVariant(Variant):
    """MiSS and Bone on linear layers."""

    name = "miss"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "mini_r": positive_int,
        "init_weights": _form,
        "miss_dropout": any_value,  # of training
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "block": ("rank", "width"),
        "bat": ("shards", "rank", "rank"),
    }
    optional = frozenset(roles)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") in ("MISS", "BONE")

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        form = config.get("init_weights", True)
        suffix = f"{config['peft_type'].lower()}_block"
        out = module.base.shape[0]
        width = config.get("mini_r", PEFT_DEFAULT_MINI_RANK) if form == "mini" else out
        if form != "bat" and suffix in module.tensors and module.tensors[suffix].shape[-1:] != (width,):
            problems.add(f"{suffix} is {list(module.tensors[suffix].shape)}, expected [rank, {width}]")
        rank = config.get("r", PEFT_DEFAULT_RANK)
        return {"rank": rank}, {"bat" if form == "bat" else "block": suffix}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = Dᵀ and the shared V, or the dense change of bat. Raises AdapterError for sizes that do not divide."""
        out, inner = base.shape
        if tensors.keys() == {"bat"}:
            return Lowered(terms=(dense_term(_bat_change(to_float32(tensors["bat"]), base)),))
        if tensors.keys() != {"block"}:
            raise AdapterError(f"found {', '.join(tensors) or 'no tensors'}, expected block or bat")
        rank, width = tensors["block"].shape
        u = transposed(tensors["block"])
        if width != out:
            if width == 0 or out % width:
                raise AdapterError(
                    f"block is [{rank}, {width}], expected a width that divides the {out} outputs"
                )
            u = Tensor(u.dtype, (out, rank), np.tile(u.data, out // width))
        return Lowered(terms=(LowRank(u, shard_sum(rank, inner)),))


_shard_sums: WeakValueDictionary[tuple[int, int], Tensor] = WeakValueDictionary()


def shard_sum(rank: int, inner: int) -> Tensor:
    """[rank, inner] with ones where column i is the i-th input of its shard; one object while any adapter uses it."""
    found = _shard_sums.get((rank, inner))
    if found is None:
        ones = np.arange(inner) % rank == np.arange(rank)[:, None]
        _shard_sums[rank, inner] = found = Tensor.from_numpy(ones.astype(np.float16))
    return found


def _bat_change(blocks: Floats, base: BaseWeight) -> Floats:
    """Row i r + a and column j r + c change by Σ_k W[i r + a, j r + k] D[i, k, c] + D[i, a, c]."""
    (out, inner), (shards, rank, _) = base.shape, blocks.shape
    if base.kind == "embedding" or shards * rank != out or inner % rank:
        raise AdapterError(f"bat blocks {list(blocks.shape)} do not divide the weight [{out}, {inner}]")
    weight = base.weight().reshape(shards, rank, inner // rank, rank)
    change = weight @ blocks[:, None]
    change += blocks[:, :, None]
    return np.asarray(change.reshape(out, inner), np.float32)


@hookimpl
def adaptrt_variants() -> list[MissVariant]:
    """MiSS."""
    return [MissVariant()]
