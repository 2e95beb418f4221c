"""VB-LoRA (Li et al., arXiv:2405.15179): W x + B (A x), A and B put together from vectors of one bank.

Each run of `length` entries of a row of A, and of a column of B, is a mixture of the k vectors of the bank with the
largest logits, with the softmax of these as weights. PEFT stores the logits, or the k indices and the first k - 1
weights (save_only_topk_weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.dense import Floats
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, boolean, flag, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32, to_int64
from adaptrt.tensor import Tensor

PEFT_DEFAULTS = {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2}
BANK = "base_model.vblora_vector_bank"


class VbLoraVariant(Variant):
    """VB-LoRA on linear layers."""

    name = "vblora"
    options: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys(PEFT_DEFAULTS, positive_int),
        "save_only_topk_weights": boolean,
        "fan_in_fan_out": flag,  # says how the base stores W; A and B are the same
        # of training, of the start
        **dict.fromkeys(("vblora_dropout", "init_vector_bank_bound", "init_logits_std"), any_value),
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int, "vectors": int, "length": int, "topk": int}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "bank": ("vectors", "length"),
        "logits_A": ("rank", "runs of in", "vectors"),
        "logits_B": ("runs of out", "rank", "vectors"),
        "logits_A_topk_indices": ("rank", "runs of in", "topk"),
        "logits_B_topk_indices": ("runs of out", "rank", "topk"),
        "logits_A_topk_weights": ("rank", "runs of in", "topk - 1"),
        "logits_B_topk_weights": ("runs of out", "rank", "topk - 1"),
    }
    optional = frozenset(roles.keys() - {"bank"})
    integers = frozenset({"logits_A_topk_indices", "logits_B_topk_indices"})

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "VBLORA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        values = [config.get(name, default) for name, default in PEFT_DEFAULTS.items()]
        params = dict(zip(self.params, values, strict=True))
        endings = ("_topk_indices", "_topk_weights") if config.get("save_only_topk_weights") else ("",)
        roles = {
            f"logits_{side}{ending}": f"vblora_logits_{side}{ending}" for side in "AB" for ending in endings
        }
        return params, {"bank": BANK, **roles}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = B, V = A. Raises AdapterError for logits of other sizes and for vectors that the bank has not."""
        bank = to_float32(tensors["bank"])
        topk = int(params["topk"])
        a = _mixtures("logits_A", tensors, bank, topk)  # [rank, runs of in, length]
        b = _mixtures("logits_B", tensors, bank, topk)  # [runs of out, rank, length]
        v = a.reshape(len(a), -1)
        u = b.transpose(0, 2, 1).reshape(-1, b.shape[1])
        if (len(u), v.shape[1]) != base.shape:
            raise AdapterError(f"vectors make [{len(u)}, {v.shape[1]}], expected {list(base.shape)}")
        return Lowered(terms=(LowRank(Tensor.from_numpy(u), Tensor.from_numpy(v)),))


def _mixtures(name: str, tensors: Mapping[str, Tensor], bank: Floats, topk: int) -> Floats:
    """The vectors [..., length] that logits [..., vectors] or their k best choose. Of equal logits the first count."""
    indices, weights = f"{name}_topk_indices", f"{name}_topk_weights"
    if name in tensors and not {indices, weights} & tensors.keys():
        logits = to_float32(tensors[name])
        chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :topk]
        best = np.take_along_axis(logits, chosen, -1)
        share = np.exp(best - best.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
    elif {indices, weights} <= tensors.keys() and name not in tensors:
        chosen, share = to_int64(tensors[indices]), to_float32(tensors[weights])
        if share.shape[-1] != topk - 1 or not ((chosen >= 0) & (chosen < len(bank))).all():
            raise AdapterError(f"{name}: expected {topk} of {len(bank)} vectors and {topk - 1} weights a run")
        share = np.concatenate([share, 1 - share.sum(-1, keepdims=True)], -1)
    else:
        raise AdapterError(f"{name}: expected either logits or indices and weights")
    mixed = np.zeros((*chosen.shape[:-1], bank.shape[1]), np.float32)
    for k in range(chosen.shape[-1]):
        mixed += share[..., k, None] * bank[chosen[..., k]]
    return mixed


@hookimpl
def adaptrt_variants() -> list[VbLoraVariant]:
    """VB-LoRA."""
    return [VbLoraVariant()]
