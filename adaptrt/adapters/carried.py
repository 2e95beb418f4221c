"""What any target may carry, whatever its variant: biases, weights and rows of the base, replaced whole.

PEFT stores what takes the place of something in the base (`bias`, `modules_to_save`, `trainable_token_indices`). At
the user's scale s the value in use is old + s · (new - old): at 1 the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.dense import row_parts
from adaptrt.adapters.normal import Lowered, LowRank, Sparse
from adaptrt.adapters.numbers import read_whole_numbers
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.variant import BaseWeight, Params
from adaptrt.quant.plain import rows_to_float32, to_float32
from adaptrt.tensor import Tensor

BIAS, WEIGHT, ROWS = "replaced_bias", "replaced_weight", "replaced_rows"
ROW_IDS = "row_ids"  # param beside ROWS: which rows, as `whole_numbers` writes them, in the tensor's order
RESIZED_HINT = ": another vocabulary; resize the base's as training did, and convert that base"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Carried:
    """A role: the params it brings, what is wrong with it beside its shape, and how it adds to a lowered target."""

    params: tuple[str, ...]
    alone: bool  # it goes with no role of a variant on the same target
    shape: Callable[[Params, BaseWeight], list[int]]
    problem: Callable[[Tensor, Params, BaseWeight], str | None]  # called when the shape fits
    add: Callable[[Lowered, Tensor, Params, BaseWeight], Lowered]


def check_carried(
    role: str, label: str, tensor: Tensor, params: Params, base: BaseWeight, problems: Problems
) -> None:
    """Report what is wrong with a carried tensor; `label` names it."""
    carried = CARRIED[role]
    expected = carried.shape(params, base)
    if list(tensor.shape) != expected:
        resized = role == WEIGHT and base.kind in ("embedding", "head") and len(tensor.shape) == 2
        hint = RESIZED_HINT if resized else ""
        problems.add(f"{label} is {list(tensor.shape)}, expected {expected}{hint}")
    elif problem := carried.problem(tensor, params, base):
        problems.add(f"{label} {problem}")


# Biases


def _bias_shape(params: Params, base: BaseWeight) -> list[int]:
    return [base.shape[1] if base.kind == "embedding" else base.shape[0]]


def _bias_problem(tensor: Tensor, params: Params, base: BaseWeight) -> str | None:
    return "replaces a bias that the base does not have" if base.bias() is None else None


def _add_bias(lowered: Lowered, tensor: Tensor, params: Params, base: BaseWeight) -> Lowered:
    old = base.bias()
    change = to_float32(tensor) - (0 if old is None else old)
    return replace(lowered, c=change if lowered.c is None else lowered.c + change)


# Whole weights


def _weight_shape(params: Params, base: BaseWeight) -> list[int]:
    return [base.shape[0]] if base.kind == "norm" else list(base.shape)


def _weight_problem(tensor: Tensor, params: Params, base: BaseWeight) -> str | None:
    if base.kind != "norm":
        return None
    lost = np.flatnonzero((base.weight() == 0) & (to_float32(tensor) != 0))
    return f"is not 0 at {lost[0]}, where the base's norm is: no gain leads there" if lost.size else None


def _add_weight(lowered: Lowered, tensor: Tensor, params: Params, base: BaseWeight) -> Lowered:
    if base.kind == "norm":
        old, new = base.weight(), to_float32(tensor)
        ratio = np.divide(new, old, out=np.ones_like(old), where=old != 0)
        return replace(lowered, g_out=ratio)
    if base.kind == "embedding":
        return replace(lowered, terms=(LowRank(None, _table_change(tensor, base)),))
    # the new weight, and the base's own taken away: both as they are stored, so that neither is widened nor copied
    return replace(lowered, terms=(LowRank(None, tensor), LowRank(None, base.stored(), -1.0)))


def _table_change(tensor: Tensor, base: BaseWeight) -> Tensor:
    """new - old of an embedding as V wants it, [width, vocabulary], in float32."""
    vocabulary, width = base.shape
    change = np.empty((width, vocabulary), np.float32)
    for part in row_parts(vocabulary, width):
        rows = part.start, part.stop
        change[:, part] = (rows_to_float32(tensor, *rows) - base.rows(*rows)).T
    return Tensor.from_numpy(change)


# Rows of the embedding or the head


def _rows_shape(params: Params, base: BaseWeight) -> list[int]:
    ids = read_whole_numbers(params.get(ROW_IDS))
    return [0 if ids is None else len(ids), base.shape[1]]


def _rows_problem(tensor: Tensor, params: Params, base: BaseWeight) -> str | None:
    ids = read_whole_numbers(params.get(ROW_IDS)) or []
    if base.kind not in ("embedding", "head"):
        return f"replaces rows of a {base.kind}, expected the embedding or the head"
    if not ids or max(ids) >= base.shape[0] or len(set(ids)) < len(ids):
        found = brief(params.get(ROW_IDS), 60)
        return f"replaces rows {found}, expected different ones from 0 to {base.shape[0] - 1}"
    return None


def _add_rows(lowered: Lowered, tensor: Tensor, params: Params, base: BaseWeight) -> Lowered:
    ids = read_whole_numbers(params[ROW_IDS]) or []
    order = np.argsort(ids)
    ids = [ids[k] for k in order]
    old = np.concatenate([base.rows(row, row + 1) for row in ids])
    counts = np.zeros(base.shape[0] + 1, np.int64)
    counts[np.asarray(ids) + 1] = base.shape[1]
    change = Sparse(
        row_start=np.cumsum(counts).astype(np.int32),
        columns=np.tile(np.arange(base.shape[1], dtype=np.int32), len(ids)),
        values=(to_float32(tensor)[order] - old).reshape(-1),
    )
    return replace(lowered, terms=(*lowered.terms, change))


CARRIED: Mapping[str, Carried] = {
    BIAS: Carried((), False, _bias_shape, _bias_problem, _add_bias),
    WEIGHT: Carried((), True, _weight_shape, _weight_problem, _add_weight),
    ROWS: Carried((ROW_IDS,), True, _rows_shape, _rows_problem, _add_rows),
}
