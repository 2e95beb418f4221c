"""Operations as plain data. Registers are named float32 arrays [tokens, width]; weights are named tensors.

A backend may fuse operations as it likes; the numpy reference (backends/reference.py) runs them one by one and is
the definition of what each means. T = tokens in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Embed:
    """out [T, width] = rows of `weight` [vocabulary, width] picked by token id. An attach point."""

    out: str
    weight: str
    target: str


@dataclass(frozen=True)
class Norm:
    """out = src / sqrt(mean(src²) + eps) · weight (RMS norm). An attach point when it has a target."""

    out: str
    src: str
    weight: str
    eps: float
    target: str | None = None


@dataclass(frozen=True)
class Linear:
    """out [T, rows] = weight [rows, cols] · src [T, cols] + bias. An attach point."""

    out: str
    src: str
    weight: str
    bias: str | None
    target: str


@dataclass(frozen=True)
class Rope:
    """Rotate `reg` [T, heads · head_dim] in place, dimension i paired with i + head_dim/2.

    Angles are float32(position) · inv_freq, `inv_freq` naming a constant of the Program [head_dim/2]; cos and sin
    are multiplied by `factor`.
    """

    reg: str
    heads: int
    head_dim: int
    inv_freq: str
    factor: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Append k and v to the KV pages of `layer`, then out = causal softmax(scale · q kᵀ) v with grouped queries.

    Query head h reads KV head h // (heads // kv_heads). `softcap` > 0 caps scores to softcap · tanh(s / softcap).
    """

    out: str
    q: str
    k: str
    v: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0


@dataclass(frozen=True)
class Gated:
    """out = activation(gate) · up."""

    out: str
    gate: str
    up: str
    activation: Activation


@dataclass(frozen=True)
class Add:
    """out = a + b."""

    out: str
    a: str
    b: str


@dataclass(frozen=True)
class Scale:
    """out = src · factor; `softcap` > 0 then caps it to softcap · tanh(x / softcap)."""

    out: str
    src: str
    factor: float
    softcap: float = 0.0


@dataclass(frozen=True)
class Logits:
    """logits [n_logits, vocabulary] = weight · src[logit_rows] + bias: the last operation. An attach point."""

    src: str
    weight: str
    bias: str | None
    target: str


Op = Embed | Norm | Linear | Rope | Attention | Gated | Add | Scale | Logits


@dataclass(frozen=True)
class Program:
    """A model's computation for one step over a ragged batch.

    `registers` maps a name to its width; `constants` are float32 arrays the ops name beside the file's tensors.
    """

    registers: Mapping[str, int]
    ops: tuple[Op, ...]
    constants: Mapping[str, NDArray[np.float32]]
    vocab_size: int
    context_length: int

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the attach points, in program order."""
        attach_points = (op.target for op in self.ops if isinstance(op, Embed | Norm | Linear | Logits))
        return tuple(target for target in attach_points if target is not None)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the file's tensors that the ops read, each once, in program order."""
        names: dict[str, None] = {}
        for op in self.ops:
            for name in (getattr(op, "weight", None), getattr(op, "bias", None)):
                if name is not None:
                    names[name] = None
        return tuple(names)
