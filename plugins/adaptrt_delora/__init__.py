"""DeLoRA (Bini et al., arXiv:2503.18225): LoRA whose every rank has a bounded strength, apart from its direction.

y = W x + B (d ⊙ (A (w ⊙ x))) + b, where d_i = λ / (r ‖A_i‖ ‖B_i‖), A_i a row and B_i a column, each norm at least 1e-4,
and w holds the lengths of the base's columns, stored with the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, match_pattern, patterns, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = 8  # of r when the config leaves it out
SMALLEST_NORM = np.float32(1e-4)


class DeloraVariant(Variant):
    """DeLoRA on linear layers and the head."""

    name = "delora"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "rank_pattern": patterns(positive_int),
        # of training or of an initialisation: λ is a tensor
        **dict.fromkeys(("delora_lambda", "lambda_pattern", "module_dropout", "init_weights"), any_value),
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "A": ("rank", "in"),
        "B": ("out", "rank"),
        "lambda": (1,),
        "lengths": ("in",),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "DELORA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        rank = match_pattern(config.get("rank_pattern"), module.path, config.get("r", PEFT_DEFAULT))
        names = {"A": "delora_A", "B": "delora_B", "lambda": "delora_lambda", "lengths": "delora_w_norm"}
        return {"rank": rank}, names

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = B, V = A with its columns times w, and d as above."""
        a, b = to_float32(tensors["A"]), to_float32(tensors["B"])
        a_norm, b_norm = (np.maximum(norm, SMALLEST_NORM) for norm in (_norm(a, 1), _norm(b, 0)))
        d = to_float32(tensors["lambda"]) / np.float32(params["rank"]) / (a_norm * b_norm)
        v = Tensor.from_numpy(a * to_float32(tensors["lengths"]))
        return Lowered(terms=(LowRank(tensors["B"], v, d=d.astype(np.float32)),))


def _norm(x: np.ndarray[Any, np.dtype[np.float32]], axis: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(np.linalg.norm(x, axis=axis), np.float32)


@hookimpl
def adaptrt_variants() -> list[DeloraVariant]:
    """DeLoRA."""
    return [DeloraVariant()]
