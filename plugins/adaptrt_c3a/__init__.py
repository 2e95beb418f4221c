"""C3A (Chen et al., arXiv:2407.19342): W x + x convolved with blocks of kernels, / in.

A block of b outputs and b inputs is a circulant matrix: row k is its kernel [b] turned by k. The change is dense and
is laid out at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from adaptrt.adapters.dense import dense_term
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import Rule, any_value, match_ending, plain_patterns, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT_BLOCK = 256


class C3aVariant(Variant):
    """C3A on linear layers."""

    name = "c3a"
    options: ClassVar[Mapping[str, Rule]] = {
        "block_size": positive_int,
        "block_size_pattern": plain_patterns(positive_int),
        "init_weights": any_value,  # of the start
    }
    params: ClassVar[Mapping[str, type]] = {"block": int}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {"kernel": ("out / block", "in / block", "block")}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "C3A"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        usual = config.get("block_size", PEFT_DEFAULT_BLOCK)
        block = match_ending(config.get("block_size_pattern"), module.path, usual)
        return {"block": block}, {"kernel": "c3a_kernel"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """Entry [k, j] of a block is w[(j - k) mod b]. Raises AdapterError for blocks that do not make the weight."""
        kernel = to_float32(tensors["kernel"])
        rows, cols, block = kernel.shape
        if (rows * block, cols * block) != base.shape:
            raise AdapterError(f"c3a_kernel is {list(kernel.shape)}, expected blocks of {list(base.shape)}")
        twice = np.concatenate([kernel[..., 1:], kernel], -1)
        turned = sliding_window_view(twice, block, -1)[:, :, ::-1]  # [rows, cols, k, j], a view
        change = np.ascontiguousarray(turned.transpose(0, 2, 1, 3)).reshape(base.shape)
        return Lowered(terms=(dense_term(change, 1 / base.shape[1]),))


@hookimpl
def adaptrt_variants() -> list[C3aVariant]:
    """C3A."""
    return [C3aVariant()]
