"""Random-weight models of well-known shapes, so that a benchmark needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from adaptrt.adapters.normal import Lowered, LoweredAdapter, Term
from adaptrt.model.architecture import TensorSpec
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


def random_tensor(spec: TensorSpec, rng: np.random.Generator) -> Tensor:
    """A tensor of the default conversion's dtype: nf4 layers, int8 embedding and head, float32 norms and biases."""
    if spec.role in ("norm", "bias"):
        return Tensor.from_numpy(np.ones(spec.shape, np.float32))
    dtype = "nf4" if spec.role == "linear" else "int8"
    data = np.frombuffer(rng.bytes(tensor_nbytes(dtype, spec.shape)), np.uint8).copy()
    # scales that keep activations finite: weights of about 1/sqrt(width)
    scale = np.float32(1 / np.sqrt(spec.shape[-1]))
    if dtype == "int8":
        layout = Int8Layout(*rows_cols(spec.shape))
        scales = from_float32(np.full(layout.rows * layout.row_blocks, scale / 127, np.float32), "bf16").data
        data[layout.scale_offset :] = scales
    else:  # nested absmax values and the offset behind them
        data[Nf4Layout(prod(spec.shape)).nested_offset :].view(np.float32)[:] = scale
    return Tensor(dtype, spec.shape, data)


def random_lora(specs: tuple[TensorSpec, ...], rank: int, rng: np.random.Generator) -> LoweredAdapter:
    """A bfloat16 LoRA of this rank on every linear layer."""

    def factor(rows: int, cols: int) -> Tensor:
        return from_float32(rng.standard_normal((rows, cols), np.float32) / np.float32(np.sqrt(cols)), "bf16")

    return {
        spec.target: Lowered((Term(factor(spec.shape[0], rank), factor(rank, spec.shape[1]), 0.1),))
        for spec in specs
        if spec.role == "linear"
    }
