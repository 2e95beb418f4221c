"""What a Python backend checks before it computes: native ones check the same in C (native/common)."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.fit import AttachPoint, check_fit
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.adapters.problems import Problems
from adaptrt.backends.base import Batch, Int32s
from adaptrt.errors import BackendError


def check_adapter(adapter: LoweredAdapter, points: Mapping[str, AttachPoint]) -> None:
    """Raise BackendError for an attach point that the program has not, or for what does not fit it."""
    for target, lowered in adapter.items():
        if target not in points:
            raise BackendError(f"adapter target {target}: the program has no such attach point")
        problems = Problems()
        check_fit(lowered, points[target], problems)
        problems.raise_for(f"adapter target {target}", BackendError)


def check_batch(
    batch: Batch, vocabulary: int, n_pages: int, page_tokens: int, handles: Container[int]
) -> Batch:
    """The batch as int32 arrays. Raises BackendError naming the first thing in it that cannot be."""
    batch = Batch(**{field.name: int32s(getattr(batch, field.name)) for field in fields(Batch)})
    check_lengths(batch)
    n_tokens = len(batch.tokens)
    if n_tokens == 0:
        raise BackendError("the batch has 0 tokens")
    for name, starts, end in (
        ("run_start", batch.run_start, n_tokens),
        ("page_start", batch.page_start, len(batch.pages)),
        ("stack_start", batch.stack_start, len(batch.stacks)),
    ):
        if starts[0] != 0 or starts[-1] != end or (np.diff(starts) < 0).any():
            raise BackendError(f"{name} does not rise from 0 to {end}")
    _check_range("token", batch.tokens, vocabulary)
    _check_range("KV page", batch.pages, n_pages)
    _check_range("logit row", batch.logit_rows, n_tokens)
    for handle in batch.stacks.tolist():
        if handle not in handles:
            raise BackendError(f"no adapter with handle {handle}")
    _check_positions(batch, page_tokens)
    return batch


def _check_range(what: str, values: Int32s, end: int) -> None:
    bad = np.flatnonzero((values < 0) | (values >= end))
    if bad.size:
        raise BackendError(f"{what} {bad[0]} is {values[bad[0]]}, expected 0 to {end - 1}")


def _check_positions(batch: Batch, page_tokens: int) -> None:
    """A run's positions rise one by one from 0 or later, and its pages hold the last of them."""
    lengths, pages = np.diff(batch.run_start), np.diff(batch.page_start)
    if (lengths == 0).any():
        raise BackendError(f"run {np.flatnonzero(lengths == 0)[0]} has no tokens")
    first = np.repeat(batch.positions[batch.run_start[:-1]], lengths)
    expected = first + np.arange(len(batch.tokens)) - np.repeat(batch.run_start[:-1], lengths)
    bad = np.flatnonzero((batch.positions != expected) | (batch.positions < 0))
    if bad.size:
        raise BackendError(
            f"token {bad[0]} has position {batch.positions[bad[0]]}, expected {expected[bad[0]]}"
        )
    needed = batch.positions[batch.run_start[1:] - 1] // page_tokens + 1
    short = np.flatnonzero(pages < needed)
    if short.size:
        run = short[0]
        raise BackendError(f"run {run} needs {needed[run]} KV pages, has {pages[run]}")


def int32s(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """The values as a contiguous int32 array; raises BackendError when they do not fit."""
    array = np.ascontiguousarray(values)
    if array.dtype == np.int32:
        return array
    if array.dtype.kind not in "iu" or (array.size and not -(2**31) <= array.min() <= array.max() < 2**31):
        raise BackendError(f"a batch array is {array.dtype}, expected values that fit into int32")
    return array.astype(np.int32)


def check_lengths(batch: Batch) -> None:
    """Raise BackendError when an array is not as long as its indices say: C cannot see lengths."""
    runs = len(batch.run_start) - 1
    if runs < 0 or len(batch.page_start) != runs + 1 or len(batch.stack_start) != runs + 1:
        raise BackendError(
            f"run_start, page_start and stack_start have {len(batch.run_start)}, {len(batch.page_start)} and "
            f"{len(batch.stack_start)} items, expected the number of runs + 1 in each"
        )
    wanted = (
        ("positions", batch.positions, len(batch.tokens)),
        ("pages", batch.pages, int(batch.page_start[-1])),
        ("stacks", batch.stacks, int(batch.stack_start[-1])),
    )
    for name, array, length in wanted:
        if len(array) != length:
            raise BackendError(f"{name} has {len(array)} items, expected {length}")
