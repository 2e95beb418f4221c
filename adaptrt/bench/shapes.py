"""Random-weight models of well-known shapes, made once and cached, so that a benchmark needs no download."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt import __version__
from adaptrt.adapters.normal import Lowered, LoweredAdapter, LowRank, Vector
from adaptrt.format import Writer
from adaptrt.model.architecture import Architecture, TensorSpec
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import Int8Layout, Nf4Layout, Tensor, rows_cols, tensor_nbytes

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tinyllama": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}


def cached_model(shape: str, architecture: Architecture, progress: Callable[[int, int, str], None]) -> Path:
    """The file of a shape in the user's cache folder (XDG_CACHE_HOME or ~/.cache), written when absent."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptrt" / "bench"
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{shape}-{__version__}.adrt"
    if path.exists():
        return path
    metadata = architecture.metadata(SHAPES[shape])
    specs, rng = architecture.tensors(metadata), np.random.Generator(np.random.SFC64(0))
    with Writer(path, metadata) as writer, writer.section("base", kind="base") as section:
        for done, spec in enumerate(specs, start=1):
            section.add(spec.name, random_tensor(spec, rng))
            progress(done, len(specs), spec.name)
    _forget(path)
    return path


def _forget(path: Path) -> None:
    """Drop the file from the page cache: what was written lies there in small pages, what is read again in large."""
    if sys.platform == "linux":
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def random_tensor(spec: TensorSpec, rng: np.random.Generator) -> Tensor:
    """A tensor of the default conversion's dtype: nf4 layers, int8 embedding and head, float32 norms and biases."""
    if spec.role in ("norm", "bias"):
        return Tensor.from_numpy(np.ones(spec.shape, np.float32))
    dtype = "nf4" if spec.role == "linear" else "int8"
    data = _random_bytes(rng, tensor_nbytes(dtype, spec.shape))
    # scales that keep activations finite: weights of about 1/sqrt(width)
    scale = np.float32(1 / np.sqrt(spec.shape[-1]))
    if dtype == "int8":
        layout = Int8Layout(*rows_cols(spec.shape))
        scales = from_float32(np.full(layout.rows * layout.row_blocks, scale / 127, np.float32), "bf16").data
        data[layout.scale_offset :] = scales
    else:  # nested absmax values and the offset behind them
        data[Nf4Layout(prod(spec.shape)).nested_offset :].view(np.float32)[:] = scale
    return Tensor(dtype, spec.shape, data)


def random_factor(rng: np.random.Generator, rows: int, cols: int) -> Tensor:
    """A bfloat16 matrix of random signs and mantissas, its values of about 1/sqrt(cols)."""
    exponent = 127 - int(np.log2(cols) / 2 + 0.5)
    bits = _random_bytes(rng, 2 * rows * cols).view(np.uint16) & 0x807F | exponent << 7
    return Tensor("bf16", (rows, cols), bits.view(np.uint8))


def _random_bytes(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """As fast as numpy makes them."""
    words: NDArray[np.uint64] = rng.bit_generator.random_raw(-(-count // 8))
    return words.view(np.uint8)[:count]


Specs = Sequence[TensorSpec]


def random_adapters(variant: str, specs: Specs, rank: int, count: int) -> list[LoweredAdapter]:
    """Different random adapters of one of VARIANTS, bfloat16, on every linear layer."""
    linear = [spec for spec in specs if spec.role == "linear"]
    return VARIANTS[variant](linear, rank, count, np.random.default_rng(0))


def _vector(rng: np.random.Generator, size: int) -> Vector:
    return np.asarray(1 + rng.standard_normal(size, np.float32) / 8, np.float32)


def _lora(specs: Specs, rank: int, count: int, rng: np.random.Generator) -> list[LoweredAdapter]:
    def low_rank(out: int, inner: int) -> LowRank:
        return LowRank(random_factor(rng, out, rank), random_factor(rng, rank, inner), 0.1)

    return [{spec.target: Lowered((low_rank(*spec.shape),)) for spec in specs} for _ in range(count)]


def _dora(specs: Specs, rank: int, count: int, rng: np.random.Generator) -> list[LoweredAdapter]:
    """LoRA with a gain for every output."""
    outputs = {spec.target: spec.shape[0] for spec in specs}
    return [
        {target: replace(low, g_out=_vector(rng, outputs[target])) for target, low in lora.items()}
        for lora in _lora(specs, rank, count, rng)
    ]


def _vera(specs: Specs, rank: int, count: int, rng: np.random.Generator) -> list[LoweredAdapter]:
    """One U and V for all targets and adapters, two vectors for each."""
    u = random_factor(rng, max(spec.shape[0] for spec in specs), rank)
    v = random_factor(rng, rank, max(spec.shape[1] for spec in specs))

    def low_rank(out: int) -> LowRank:
        return LowRank(u, v, 0.1, d=_vector(rng, rank), e=_vector(rng, out))

    return [{spec.target: Lowered((low_rank(spec.shape[0]),)) for spec in specs} for _ in range(count)]


VARIANTS: Mapping[str, Callable[[Specs, int, int, np.random.Generator], list[LoweredAdapter]]] = {
    "lora": _lora,
    "dora": _dora,
    "vera": _vera,
}
