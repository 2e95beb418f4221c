"""SHiRA (Bhardwaj et al., arXiv:2406.13175): W x + S x, S having a few trained entries anywhere in the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.normal import Lowered, Sparse
from adaptrt.adapters.options import Rule, any_value, flag, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32, to_int64
from adaptrt.tensor import Tensor


class ShiraVariant(Variant):
    """SHiRA on linear layers, with any mask: PEFT stores where its entries are."""

    name = "shira"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,  # entries / (in + out), as the tensors show
        "fan_in_fan_out": flag,  # says how the base stores W
        # how the mask was made, of the start
        **dict.fromkeys(("mask_type", "random_seed", "init_weights"), any_value),
    }
    params: ClassVar[Mapping[str, type]] = {}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {"values": ("entries",), "places": (2, "entries")}
    integers = frozenset({"places"})

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "SHIRA"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        return {}, {"values": "shira_weight", "places": "shira_indices"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """Places in any order become compressed rows; entries in one place add up, as in PEFT.

        Raises AdapterError for a place outside the weight.
        """
        out, inner = base.shape
        rows, columns = to_int64(tensors["places"])
        inside = (rows >= 0) & (rows < out) & (columns >= 0) & (columns < inner)
        if not inside.all():
            place = int(np.argmin(inside))
            raise AdapterError(
                f"entry {place} is at ({rows[place]}, {columns[place]}) of a weight [{out}, {inner}]"
            )
        places, entry = np.unique(rows * inner + columns, return_inverse=True)
        values = np.bincount(entry, to_float32(tensors["values"]), len(places)).astype(np.float32)
        row_start = np.searchsorted(places, np.arange(out + 1) * inner).astype(np.int32)
        return Lowered(terms=(Sparse(row_start, (places % inner).astype(np.int32), values),))


@hookimpl
def adaptrt_variants() -> list[ShiraVariant]:
    """SHiRA."""
    return [ShiraVariant()]
