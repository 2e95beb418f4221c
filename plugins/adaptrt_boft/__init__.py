"""BOFT (Liu et al., arXiv:2311.06243): s ⊙ W R x, R a product of m butterfly factors of orthogonal blocks.

Factor i turns runs of b inputs that it gathers within runs of b 2ⁱ, by Cayley transforms as OFT does. So the product
is again made of blocks, of b 2ᵐ⁻¹, and lowers to one rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.dense import Floats
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import Rule, any_value, flag, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

DEFAULTS = {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1}


def _count(value: object) -> str | None:
    return None if type(value) is int and value >= 0 else "expected a whole number, 0 or above"


class BoftVariant(Variant):
    """BOFT on linear layers."""

    name = "boft"
    options: ClassVar[Mapping[str, Rule]] = {
        "boft_block_size": _count,
        "boft_block_num": _count,
        "boft_n_butterfly_factor": positive_int,
        "fan_in_fan_out": flag,  # says how the base stores W
        **dict.fromkeys(("boft_dropout", "init_weights"), any_value),  # of training, of the start
    }
    params: ClassVar[Mapping[str, type]] = {"block": int, "factors": int}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "R": ("factors", "blocks", "block", "block"),
        "s": ("out", 1),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "BOFT"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        size, number, factors = (config.get(name, value) for name, value in DEFAULTS.items())
        if (size == 0) == (number == 0):
            problems.add(
                f"options boft_block_size = {size} and boft_block_num = {number}: expected one of them"
            )
        if "boft_R" in module.tensors and module.tensors["boft_R"].shape[:1] == (1,):
            factors = (
                1  # PEFT trains one factor, whatever the option says, where it cannot compile its extension
            )
        block = size or module.base.shape[1] // max(number, 1)
        return {"block": block, "factors": factors}, {"R": "boft_R", "s": "boft_s"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """The rotation and the gain s.

        Raises AdapterError for blocks that do not make the input, or not so many factors.
        """
        r = to_float32(tensors["R"])
        factors, blocks, block, _ = r.shape
        span = block << (factors - 1)
        inner = base.shape[1]
        if blocks * block != inner or inner % span or (factors > 1 and block % 2):
            raise AdapterError(
                f"boft_R is {list(r.shape)}, expected such butterfly factors of {inner} inputs"
            )
        skew = (r - r.swapaxes(-1, -2)) / 2
        eye = np.eye(block, dtype=np.float32)
        turns = np.linalg.solve(eye - skew, eye + skew)  # of columns; PEFT turns rows
        return Lowered(rotation=_product(turns, span), g_out=to_float32(tensors["s"])[:, 0])


def _product(turns: Floats, span: int) -> Floats:
    """The blocks [in / span, span, span] of the product of the factors `turns` [factors, in / b, b, b], last first."""
    factors, blocks, block, _ = turns.shape
    spans = blocks * block // span
    product: Floats = np.broadcast_to(np.eye(span, dtype=np.float32), (spans, span, span)).copy()
    for i in reversed(range(factors)):
        gathered = _gathered(block, i, span)
        inputs = np.empty_like(product)
        inputs[:, gathered] = product
        turned = turns[i].reshape(spans, -1, block, block) @ inputs.reshape(spans, -1, block, span)
        product = turned.reshape(spans, span, span)[:, gathered]
    return np.asarray(product, np.float32)


def _gathered(block: int, level: int, span: int) -> NDArray[np.intp]:
    """The butterfly's order of `span` inputs: in runs of b 2ˡᵉᵛᵉˡ, the even halves of blocks before the odd ones."""
    if level == 0:
        return np.arange(span)
    halves = np.arange(span).reshape(-1, 2 << level, block // 2)
    return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


@hookimpl
def adaptrt_variants() -> list[BoftVariant]:
    """BOFT."""
    return [BoftVariant()]
