"""Attention over KV pages in tensors: runs of similar length are padded to one shape and attend together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adaptrt.backends.base import Batch
from adaptrt.program import Attention, Program

KV_DTYPES = {"f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Bucket:
    """Runs padded to the longest; an empty place is the token after the batch's last, at position 0."""

    rows: torch.Tensor  # [runs, tokens], of the batch
    positions: torch.Tensor  # [runs, tokens]
    pages: torch.Tensor  # [runs, pages]
    last: torch.Tensor  # [runs], the last position


class Places:
    """Where a batch's tokens live in the cache, and how its runs attend."""

    def __init__(self, batch: Batch, page_tokens: int, device: torch.device) -> None:
        lengths = np.diff(batch.run_start)
        run = np.repeat(np.arange(len(lengths)), lengths)
        pages = batch.pages[batch.page_start[run] + batch.positions // page_tokens]
        self.page = torch.from_numpy(pages.astype(np.int64)).to(device)
        self.slot = torch.from_numpy((batch.positions % page_tokens).astype(np.int64)).to(device)
        sizes = np.ceil(np.log2(lengths)).astype(int)
        self.buckets = [
            _bucket(batch, np.flatnonzero(sizes == size), page_tokens, device) for size in np.unique(sizes)
        ]


class Cache:
    """Keys and values of every layer: [pages, page tokens, KV heads, head_dim]."""

    def __init__(self, program: Program, page_tokens: int, kv_dtype: str, device: torch.device) -> None:
        self.page_tokens, self.n_pages = page_tokens, 0
        self._layers = {
            op.layer: torch.zeros(
                (2, 0, page_tokens, op.kv_heads, op.head_dim), dtype=KV_DTYPES[kv_dtype], device=device
            )
            for op in program.ops
            if isinstance(op, Attention)
        }

    def reserve(self, n_pages: int) -> None:
        """Make pages 0 … n_pages-1 exist; on failure all is as before."""
        more = n_pages - self.n_pages
        if more > 0:
            self._layers = {
                layer: torch.cat([kv, kv.new_zeros((2, more, *kv.shape[2:]))], dim=1)
                for layer, kv in self._layers.items()
            }
            self.n_pages = n_pages

    def store(self, op: Attention, places: Places, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep the keys and values [tokens, KV heads · head_dim] of a batch."""
        kv = self._layers[op.layer]
        for i, values in enumerate((k, v)):
            kv[i, places.page, places.slot] = values.unflatten(1, (op.kv_heads, op.head_dim)).to(kv.dtype)

    def load(self, op: Attention, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a bucket's pages, float32 [runs, slots, KV heads, head_dim]; zeros after the last."""
        keys, values = (part.flatten(1, 2).float() for part in self._layers[op.layer][:, bucket.pages])
        beyond = torch.arange(values.shape[1], device=values.device) > bucket.last[:, None]
        return keys, values.masked_fill(beyond[:, :, None, None], 0.0)


def _bucket(batch: Batch, runs: NDArray[np.int64], page_tokens: int, device: torch.device) -> Bucket:
    end = batch.run_start[runs + 1]
    rows = _table(batch.run_start[runs], end, len(batch.tokens))
    last = batch.positions[end - 1].astype(np.int64)
    first_page = batch.page_start[runs]
    pages = np.append(batch.pages, 0)[
        _table(first_page, first_page + last // page_tokens + 1, len(batch.pages))
    ]
    positions = np.append(batch.positions, 0)[rows].astype(np.int64)
    arrays = (rows, positions, pages.astype(np.int64), last)
    return Bucket(*(torch.from_numpy(array).to(device) for array in arrays))


def _table(start: NDArray[np.int32], end: NDArray[np.int32], empty: int) -> NDArray[np.int64]:
    """Row i counts from start[i] to end[i] - 1, then holds `empty`."""
    steps = np.arange((end - start).max())
    return np.where(steps < (end - start)[:, None], start[:, None] + steps, empty).astype(np.int64)


def attend(op: Attention, q: torch.Tensor, cache: Cache, places: Places) -> torch.Tensor:
    """Causal attention of queries [tokens, heads · head_dim]; the batch's own keys are stored already."""
    heads = (op.kv_heads, op.heads // op.kv_heads, op.head_dim)
    padded = torch.cat([q, q.new_zeros((1, q.shape[1]))])
    out = torch.empty_like(padded)
    for bucket in places.buckets:
        keys, values = cache.load(op, bucket)
        queries = padded[bucket.rows].unflatten(2, heads)
        scores = torch.einsum("rmkgd,rskd->rkgms", queries, keys) * op.scale
        if op.softcap > 0:
            scores = op.softcap * torch.tanh(scores / op.softcap)
        later = torch.arange(keys.shape[1], device=q.device) > bucket.positions[:, :, None]
        weights = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
        out[bucket.rows] = torch.einsum("rkgms,rskd->rmkgd", weights, values).flatten(2)
    return out[:-1]
