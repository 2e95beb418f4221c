"""Other runtimes doing the same work, when they are installed; each one is a file with `works(setup)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrt.model.architecture import TensorSpec


@dataclass(frozen=True)
class Setup:
    """What a peer is to time: a shape, by its metadata and tensors, and how. `cache` is our file of that shape."""

    metadata: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    cache: Path
    threads: int
    steps: int
    prefills: Sequence[int]
