"""A random-weight GGUF file of a Llama shape, as llama-quantize would make it in IQ4_NL (its head in Q6_K)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from adaptrt.model.architecture import TensorSpec
from adaptrt.tensor import align

ALIGNMENT = 32
F32, Q6_K, IQ4_NL = 0, 14, 20  # ggml's type numbers
WEIGHTS_OF_BLOCK = {IQ4_NL: 32, Q6_K: 256}
BYTES_OF_BLOCK = {IQ4_NL: 18, Q6_K: 210}
SCALE_AT = {IQ4_NL: 0, Q6_K: 208}  # where a block's float16 scale is
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # token types


def write_gguf(path: Path, metadata: Mapping[str, Any], specs: tuple[TensorSpec, ...]) -> None:
    """Write GGUF version 3; `metadata` has the shape's `llama.` keys."""
    types = [_type_of(spec) for spec in specs]
    sizes = [_nbytes(spec, kind) for spec, kind in zip(specs, types, strict=True)]
    keys = _keys(metadata)
    rng = np.random.default_rng(0)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(specs), len(keys)))
        for key, value in keys.items():
            out.write(_string(key) + value)
        offset = 0
        for spec, kind, size in zip(specs, types, sizes, strict=True):
            dims = struct.pack(f"<{len(spec.shape)}Q", *reversed(spec.shape))
            name = _string(spec.name)
            out.write(name + struct.pack("<I", len(spec.shape)) + dims + struct.pack("<IQ", kind, offset))
            offset += align(size, ALIGNMENT)
        _pad(out)
        for spec, kind, size in zip(specs, types, sizes, strict=True):
            out.write(_random(spec, kind, size, rng))
            _pad(out)
    partial.replace(path)


def _type_of(spec: TensorSpec) -> int:
    return {"norm": F32, "bias": F32, "head": Q6_K}.get(spec.role, IQ4_NL)


def _nbytes(spec: TensorSpec, kind: int) -> int:
    count = int(np.prod(spec.shape))
    return 4 * count if kind == F32 else count // WEIGHTS_OF_BLOCK[kind] * BYTES_OF_BLOCK[kind]


def _random(spec: TensorSpec, kind: int, size: int, rng: np.random.Generator) -> bytes:
    if kind == F32:
        return np.ones(spec.shape, np.float32).tobytes()
    blocks = np.frombuffer(rng.bytes(size), np.uint8).reshape(-1, BYTES_OF_BLOCK[kind]).copy()
    at = SCALE_AT[kind]
    scale = np.float16(1e-4)  # small enough that activations stay finite
    blocks[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return bytes(blocks.tobytes())


def _keys(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Typed key-value pairs: u32 = 4, f32 = 6, string = 8, array = 9."""
    counts = (
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "rope.dimension_count",
        "vocab_size",
    )
    vocab = int(metadata["llama.vocab_size"])
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocab))]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (vocab - 3)
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    return {
        "general.architecture": struct.pack("<I", 8) + _string("llama"),
        **{f"llama.{key}": struct.pack("<II", 4, int(metadata[f"llama.{key}"])) for key in counts},
        epsilon: struct.pack("<If", 6, metadata[epsilon]),
        "tokenizer.ggml.model": struct.pack("<I", 8) + _string("llama"),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, vocab) + b"".join(map(_string, tokens)),
        "tokenizer.ggml.scores": struct.pack(f"<IIQ{vocab}f", 9, 6, vocab, *([0.0] * vocab)),
        "tokenizer.ggml.token_type": struct.pack(f"<IIQ{vocab}i", 9, 5, vocab, *kinds),
    }


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))
