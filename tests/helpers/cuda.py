"""A model on the GPU and on the numpy reference, and how near each other their results must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptrt.adapters.normal import LowRank, Sparse
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cuda import CudaBackend
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.quant.plain import from_float32
from adaptrt.testing.programs import (
    VOCABULARY,
    Model,
    random,
    relative_error,
    run_tokens,
)

UNAVAILABLE = CudaBackend().unavailable()
needs_gpu = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"needs a GPU: {UNAVAILABLE}")
OPTIONS = LoadOptions(page_tokens=4)
TOLERANCE = 5e-3  # of one operation: its operands are rounded to bfloat16


def load(model: Model, **options: Any) -> Any:
    return CudaBackend().load(model.program, model.tensors, replace(OPTIONS, **options))


def reference(model: Model, **options: Any) -> Any:
    return ReferenceBackend().load(model.program, model.tensors, replace(OPTIONS, **options))


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """All values together within the tolerance, and no token far from it. Values are of size 1; one may be near 0."""
    size = max(float(np.linalg.norm(expected)), max(expected.size, 16) ** 0.5)
    assert np.linalg.norm(found - expected) < tolerance * size
    assert relative_error(found, expected, size=1.0) < 4 * tolerance


def compare(model: Model, n_tokens: int, tolerance: float = TOLERANCE, **options: Any) -> None:
    tokens = np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens).tolist()
    page_tokens = options.get("page_tokens", OPTIONS.page_tokens)
    found = run_tokens(load(model, **options), tokens, page_tokens)
    expected = run_tokens(reference(model, **options), tokens, page_tokens)
    assert_close(found, expected, tolerance)


def plain(
    rank: int, out: int, inner: int, seed: int, u: str = "bf16", v: str = "bf16", **fields: Any
) -> LowRank:
    """A low-rank term with U in dtype `u`, stored transposed when that is quantized."""
    values = random(seed, out, rank, scale=rank**-0.5)
    stored = values.T if u in ("int8", "nf4") else values
    return LowRank(
        from_float32(stored, u),
        from_float32(random(seed + 1, rank, inner, scale=inner**-0.5), v),
        0.8,
        **fields,
    )


def sparse(rows: int, cols: int, seed: int) -> Sparse:
    chosen = np.random.default_rng(seed).random((rows, cols)) < 0.2
    starts = np.concatenate([[0], np.cumsum(chosen.sum(1))]).astype(np.int32)
    columns = np.nonzero(chosen)[1].astype(np.int32)
    return Sparse(starts, columns, random(seed, len(columns)), 0.6)
