"""A tiny base model and PEFT folders for it, written without torch, transformers or PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.base import SECTION, BaseView
from adaptrt.format import Writer, open_file
from adaptrt.model.architecture import Architecture
from adaptrt.tensor import Tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
}

PEFT_DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32"}


def tiny_base(path: Path, architecture: Architecture) -> BaseView:
    """A random float32 Llama with biases, grouped queries and a head of its own, in an `.adrt` file."""
    metadata = architecture.metadata(CONFIG)
    rng = np.random.default_rng(0)
    with Writer(path, metadata) as writer, writer.section(SECTION, kind="base") as section:
        for spec in architecture.tensors(metadata):
            values = rng.standard_normal(spec.shape, np.float32) / np.float32(np.sqrt(spec.shape[-1]))
            section.add(spec.name, Tensor.from_numpy(1 + values if spec.role == "norm" else values))
    return BaseView(open_file(path), architecture)


def write_peft(path: Path | str, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Path:
    """An adapter folder as PEFT writes it: adapter_config.json and adapter_model.safetensors."""
    path = Path(path)
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        dtype, end = PEFT_DTYPES[array.dtype.name], offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    (path / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path
