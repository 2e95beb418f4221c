"""VeRA (Kopiczko et al., arXiv:2310.11454): one random A and B for all modules, and two trained vectors for each.

y = W x + λ_b ⊙ B (λ_d ⊙ (A x)) + b; a module uses the first `in` columns of A and the first `out` rows of B. Both are
attached once, whatever the number of modules and adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, boolean, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = 256  # of r when the config leaves it out
A, B, D = "base_model.vera_A", "base_model.vera_B", "vera_lambda_d"


def _whole(value: object) -> str | None:
    return None if type(value) is int else "expected a whole number"


class VeraVariant(Variant):
    """VeRA on linear layers and the head."""

    name = "vera"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "projection_prng_key": _whole,
        "save_projection": boolean,
        **dict.fromkeys(("vera_dropout", "d_initial", "fan_in_fan_out", "init_weights"), any_value),
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "A": ("rank", "largest in"),
        "B": ("largest out", "rank"),
        "lambda_d": ("rank",),
        "lambda_b": ("out",),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "VERA"

    def complete(
        self, config: Mapping[str, Any], modules: Sequence[Module], problems: Problems
    ) -> Mapping[str, Tensor]:
        """A and B of a folder saved with save_projection=false, as PEFT draws them anew from the key."""
        if config.get("save_projection", True) or any(module.shared for module in modules):
            return {}
        rank, key = config.get("r", PEFT_DEFAULT), config.get("projection_prng_key", 0)
        fits = [D in module.tensors and module.tensors[D].shape == (rank,) for module in modules]
        if not fits or not all(fits):
            return {}  # a rank that is not the vectors' own is refused, whatever size it asks for
        out, inner = (max(sizes) for sizes in zip(*(module.base.shape for module in modules), strict=True))
        draw = np.random.RandomState(key & 0xFFFFFFFF)  # seeds MT19937 as torch's generator does
        return {A: kaiming_uniform(draw, rank, inner), B: kaiming_uniform(draw, out, rank)}

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        roles = {"A": A, "B": B, "lambda_d": D, "lambda_b": "vera_lambda_b"}
        return {"rank": config.get("r", PEFT_DEFAULT)}, roles

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = B and V = A as they are, d = λ_d, e = λ_b."""
        d, e = to_float32(tensors["lambda_d"]), to_float32(tensors["lambda_b"])
        return Lowered(terms=(LowRank(tensors["B"], tensors["A"], d=d, e=e),))


def kaiming_uniform(draw: np.random.RandomState, rows: int, cols: int) -> Tensor:
    """What torch's uniform_(-bound, bound) gives for bound = √(6 / cols): the low 24 bits of each draw, float32.

    torch computes x · 2 bound - bound with one rounding (FMA); in float64 all of it but the last rounding is exact.
    """
    bound = np.float64(np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(cols))))
    bits = draw.randint(0, 1 << 32, rows * cols, np.uint32) & np.uint32(0xFFFFFF)
    values = (bits * 2.0**-24) * (2 * bound) - bound
    return Tensor.from_numpy(values.astype(np.float32).reshape(rows, cols))


@hookimpl
def adaptrt_variants() -> list[VeraVariant]:
    """VeRA."""
    return [VeraVariant()]
