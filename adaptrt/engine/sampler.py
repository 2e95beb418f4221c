"""From a row of logits to a token id."""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from adaptrt.engine.request import Sampling
from adaptrt.errors import ModelError

COLDEST = 1e-6  # a temperature below it is greedy: dividing by it would overflow


class Sampler:
    """Draws tokens for one sequence from its own seeded stream, so that a batch never changes the draw."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def pick(self, logits: NDArray[np.float32], context: list[int]) -> int:
        """The next token id. logits [vocabulary]; `context` holds the ids so far, for the repeat penalty.

        Raises ModelError for logits that are not finite.
        """
        require_finite(logits.max())
        if self.sampling.repeat_penalty != 1.0:
            logits = penalize(logits, context, self.sampling.repeat_penalty)
        if self.sampling.temperature < COLDEST:
            return int(np.argmax(logits))
        ids, kept = self._filter(logits)
        probabilities = softmax(kept / self.sampling.temperature)
        edges = np.cumsum(probabilities)
        return int(
            ids[np.searchsorted(edges, self._rng.random() * edges[-1], side="right").clip(max=len(ids) - 1)]
        )

    def _filter(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Ids and logits that survive top_k, top_p and min_p, best first."""
        k = self.sampling.top_k
        candidates = np.argpartition(-logits, k - 1)[:k] if 0 < k < len(logits) else np.arange(len(logits))
        # ties go to the lower id, so that the same logits always give the same order
        ids = candidates[np.lexsort((candidates, -logits[candidates]))]
        kept = logits[ids].astype(np.float64)
        probabilities = softmax(kept)
        before = np.cumsum(probabilities) - probabilities
        keep = (before < self.sampling.top_p) & (probabilities >= self.sampling.min_p * probabilities[0])
        keep[0] = True
        return ids[keep], kept[keep]


def require_finite(largest: np.floating) -> None:
    """Raise ModelError unless the largest logit of a token is finite; NaN among them makes it NaN."""
    if not np.isfinite(largest):
        raise ModelError(
            f"logits: the largest is {largest}, expected a finite number: "
            "the model's weights or an adapter's scale are too large"
        )


def penalize(logits: NDArray[np.float32], context: list[int], penalty: float) -> NDArray[np.float32]:
    """Divide positive and multiply negative logits of tokens already seen (CTRL, arXiv:1909.05858)."""
    logits = logits.copy()
    seen = np.unique(np.asarray(context, np.int64))
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return logits


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over one axis."""
    exp = np.exp(x - x.max())
    return np.asarray(exp / exp.sum(), np.float64)
