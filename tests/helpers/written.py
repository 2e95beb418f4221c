"""Small files to write, append to and break: random tensors, a base of two, an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adaptrt.format import Writer, append
from adaptrt.tensor import Tensor

PAGE = 4096


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def plain(count: int, seed: int = 0) -> Tensor:
    return Tensor("u8", (count,), noise(count, seed))


def bf16(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Normal numbers, whose exponents compress."""
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    return Tensor("bf16", (rows, cols), values.view(np.uint8).reshape(-1, 4)[:, 2:].reshape(-1).copy())


def write_base(path: Path) -> None:
    metadata = {"general.architecture": "llama"}
    with Writer(path, metadata=metadata) as w, w.section("base", kind="base") as s:
        s.add("w", plain(1000))
        s.add("v", plain(10, 1))


def add_adapter(path: Path, name: str, seed: int = 0) -> None:
    with append(path) as a, a.section(name, kind="adapter", codec="zstd") as s:
        s.add("A", bf16(64, 64, seed))


def leftovers(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other != path)
