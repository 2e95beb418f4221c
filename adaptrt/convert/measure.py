"""How far storing an adapter in fewer bits moves a model's logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.base import BaseView
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.backends.base import Backend, Batch, LoadOptions
from adaptrt.backends.cpu import CpuBackend
from adaptrt.backends.reference import ReferenceBackend

TOKENS = 64


def logit_error(base: BaseView, exact: LoweredAdapter, stored: LoweredAdapter) -> float:
    """‖logits(stored) - logits(exact)‖ / ‖logits(exact)‖ in float32, over TOKENS random token ids (seed 0)."""
    backend: Backend = CpuBackend()
    if backend.unavailable() is not None:
        backend = ReferenceBackend()
    options = LoadOptions(precision="exact", kv_dtype="f32")
    tokens = min(TOKENS, base.program.context_length)
    ids = np.random.default_rng(0).integers(0, base.program.vocab_size, tokens).astype(np.int32)
    executable = backend.load(base.program, base.weights(), options)
    try:
        pages = -(-tokens // options.page_tokens)
        executable.reserve(pages)
        expected, found = (
            executable.step(_batch(ids, pages, executable.attach(adapter))) for adapter in (exact, stored)
        )
    finally:
        executable.close()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _batch(ids: NDArray[np.int32], pages: int, handle: int) -> Batch:
    def int32(*values: int) -> NDArray[np.int32]:
        return np.array(values, np.int32)

    every = np.arange(len(ids), dtype=np.int32)
    return Batch(
        tokens=ids,
        positions=every,
        run_start=int32(0, len(ids)),
        page_start=int32(0, pages),
        pages=np.arange(pages, dtype=np.int32),
        stack_start=int32(0, 1),
        stacks=int32(handle),
        logit_rows=every,
    )
