"""HRA (Yuan et al., arXiv:2405.17484): W's input is reflected r times, y = W (I - 2 u₁u₁ᵀ) … (I - 2 u_r u_rᵀ) x + b.

The chain is I - Z Yᵀ with Y the unit vectors u_i and z_i = 2 (I - Z_{<i} Y_{<i}ᵀ) u_i, so that the change of W is the
low-rank product -(W Z) Yᵀ. W Z takes all of the base's weight, so it is derived once, at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, boolean, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant, over_rows
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = 8  # of r when the config leaves it out
Float64s = NDArray[np.float64]


class HraVariant(Variant):
    """HRA on linear layers and the head."""

    name = "hra"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "apply_GS": boolean,
        "init_weights": any_value,
    }
    params: ClassVar[Mapping[str, type]] = {"rank": int, "orthogonalize": bool}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "u": ("in", "rank"),
        "product": ("out", "rank"),  # W Z
    }
    derived: ClassVar[frozenset[str]] = frozenset({"product"})

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "HRA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        rank, orthogonalize = config.get("r", PEFT_DEFAULT), config.get("apply_GS", False)
        return {"rank": rank, "orthogonalize": orthogonalize}, {"u": "hra_u"}

    def derive(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Mapping[str, Tensor]:
        """W Z, a few rows of the dequantized W at a time."""
        _, z = _chain(params, tensors)
        narrow = z.astype(np.float32)
        product = np.concatenate([*over_rows(base, lambda _, rows: rows @ narrow)])
        return {"product": Tensor.from_numpy(product)}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = W Z and V = Yᵀ, times -1. Raises AdapterError for a vector without direction."""
        y, _ = _chain(params, tensors)
        v = Tensor.from_numpy(np.ascontiguousarray(y.T, np.float32))
        product = tensors.get("product") or self.derive(params, tensors, base)["product"]
        return Lowered(terms=(LowRank(product, v, -1.0),))


def _chain(params: Params, tensors: Mapping[str, Tensor]) -> tuple[Float64s, Float64s]:
    """Y and Z of the stored vectors."""
    vectors = to_float32(tensors["u"]).astype(np.float64)
    return orthogonal(vectors) if params["orthogonalize"] else reflections(vectors)


def reflections(vectors: Float64s) -> tuple[Float64s, Float64s]:
    """Y and Z [in, rank] of the chain of reflections along the columns of `vectors`."""
    y, z = np.zeros_like(vectors), np.zeros_like(vectors)
    for i in range(vectors.shape[1]):
        y[:, i] = unit(vectors[:, i])
        z[:, i] = 2 * (y[:, i] - z[:, :i] @ (y[:, :i].T @ y[:, i]))
    return y, z


def orthogonal(vectors: Float64s) -> tuple[Float64s, Float64s]:
    """Y and Z [in, rank] after Gram and Schmidt: Y is orthonormal, so that the chain is I - 2 Y Yᵀ."""
    y = np.zeros_like(vectors)
    for i in range(vectors.shape[1]):
        rest = vectors[:, i]
        for j in range(i):
            rest = rest - (y[:, j] @ rest) * y[:, j]
        y[:, i] = unit(rest)
    return y, 2 * y


def unit(vector: Float64s) -> Float64s:
    """The vector at length 1."""
    length = np.linalg.norm(vector)
    if length == 0:
        raise AdapterError("HRA: a reflection's vector is zero, it has no direction")
    return np.asarray(vector / length)


@hookimpl
def adaptrt_variants() -> list[HraVariant]:
    """HRA."""
    return [HraVariant()]
