"""Other runtimes doing the same work, when they are installed.

Each one is a file with `works(setup)`; bnb, which does single products, has `works(product, device)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrt.model.architecture import TensorSpec


@dataclass(frozen=True)
class Setup:
    """What a peer is to time: a shape, by its metadata and tensors, and how. `cache` is our file of that shape.

    `device` is what torch calls the device of ours.
    """

    metadata: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    cache: Path
    threads: int
    device: str
    steps: int
    prefills: Sequence[int]
