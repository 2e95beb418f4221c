"""The Llama family: config.json → GGUF-style metadata → tensor names and a Program.

Source of the computation: transformers' LlamaForCausalLM, which the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.model.architecture import Architecture, Metadata, TensorSpec
from adaptrt.model.llama_config import LlamaShape, read_config, write_config
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Logits, Norm, Op, Program, Rope

INV_FREQ = "rope.inv_freq"


class LlamaArchitecture(Architecture):
    """Llama 1 to 3: RMS norm, rotary positions, grouped-query attention, SiLU-gated feed-forward."""

    name = "llama"
    hf_architectures = ("LlamaForCausalLM",)

    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See Architecture.metadata."""
        values = read_config(config)
        return {"general.architecture": self.name} | {f"llama.{key}": value for key, value in values.items()}

    def tensors(self, metadata: Metadata) -> tuple[TensorSpec, ...]:
        """See Architecture.tensors."""
        return tuple(_tensors(LlamaShape.read(metadata)))

    def config(self, metadata: Metadata) -> dict[str, Any]:
        """See Architecture.config."""
        return {"architectures": list(self.hf_architectures)} | write_config(LlamaShape.read(metadata).values)

    def untied(self, metadata: Metadata) -> dict[str, Any]:
        """See Architecture.untied."""
        return {**metadata, "llama.tie_word_embeddings": False}

    def program(self, metadata: Metadata) -> Program:
        """See Architecture.program."""
        shape = LlamaShape.read(metadata)
        registers = {
            "x": shape.width,
            "normed": shape.width,
            "q": shape.heads * shape.head_dim,
            "k": shape.kv_heads * shape.head_dim,
            "v": shape.kv_heads * shape.head_dim,
            "attended": shape.heads * shape.head_dim,
            "gate": shape.feed_forward,
            "up": shape.feed_forward,
            "gated": shape.feed_forward,
            "branch": shape.width,
        }
        return Program(
            registers,
            tuple(_ops(shape)),
            {INV_FREQ: _inv_freq(shape)},
            shape.vocab_size,
            shape.context_length,
        )


def _tensors(shape: LlamaShape) -> Iterator[TensorSpec]:
    yield TensorSpec(
        "token_embd.weight", "model.embed_tokens.weight", (shape.vocab_size, shape.width), "embedding"
    )
    for layer in range(shape.layers):
        yield from _layer_tensors(shape, f"blk.{layer}", f"model.layers.{layer}")
    yield TensorSpec("output_norm.weight", "model.norm.weight", (shape.width,), "norm")
    if not shape.tied:
        yield TensorSpec("output.weight", "lm_head.weight", (shape.vocab_size, shape.width), "head")


def _layer_tensors(shape: LlamaShape, ours: str, theirs: str) -> Iterator[TensorSpec]:
    def norm(name: str, hf: str) -> TensorSpec:
        return TensorSpec(f"{ours}.{name}.weight", f"{theirs}.{hf}.weight", (shape.width,), "norm")

    def linear(name: str, hf: str, out: int, inner: int, bias: bool) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{ours}.{name}.weight", f"{theirs}.{hf}.weight", (out, inner), "linear")
        if bias:
            yield TensorSpec(f"{ours}.{name}.bias", f"{theirs}.{hf}.bias", (out,), "bias")

    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention, mlp = shape.attention_bias, shape.mlp_bias
    yield norm("attn_norm", "input_layernorm")
    yield from linear("attn_q", "self_attn.q_proj", q_width, shape.width, attention)
    yield from linear("attn_k", "self_attn.k_proj", kv_width, shape.width, attention)
    yield from linear("attn_v", "self_attn.v_proj", kv_width, shape.width, attention)
    yield from linear("attn_output", "self_attn.o_proj", shape.width, q_width, attention)
    yield norm("ffn_norm", "post_attention_layernorm")
    yield from linear("ffn_gate", "mlp.gate_proj", shape.feed_forward, shape.width, mlp)
    yield from linear("ffn_up", "mlp.up_proj", shape.feed_forward, shape.width, mlp)
    yield from linear("ffn_down", "mlp.down_proj", shape.width, shape.feed_forward, mlp)


def _ops(shape: LlamaShape) -> Iterator[Op]:
    yield Embed("x", "token_embd.weight", "token_embd")
    for layer in range(shape.layers):
        yield from _layer_ops(shape, layer)
    yield Norm("normed", "x", "output_norm.weight", shape.eps, "output_norm")
    yield Logits("normed", "token_embd.weight" if shape.tied else "output.weight", None, "output")


def _layer_ops(shape: LlamaShape, layer: int) -> Iterator[Op]:
    def linear(out: str, src: str, name: str, bias: bool) -> Linear:
        target = f"blk.{layer}.{name}"
        return Linear(out, src, f"{target}.weight", f"{target}.bias" if bias else None, target)

    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    yield Norm("normed", "x", f"blk.{layer}.attn_norm.weight", shape.eps, f"blk.{layer}.attn_norm")
    yield linear("q", "normed", "attn_q", shape.attention_bias)
    yield linear("k", "normed", "attn_k", shape.attention_bias)
    yield linear("v", "normed", "attn_v", shape.attention_bias)
    yield Rope("q", heads, head_dim, INV_FREQ)
    yield Rope("k", kv_heads, head_dim, INV_FREQ)
    yield Attention("attended", "q", "k", "v", layer, heads, kv_heads, head_dim, head_dim**-0.5)
    yield linear("branch", "attended", "attn_output", shape.attention_bias)
    yield Add("x", "x", "branch")
    yield Norm("normed", "x", f"blk.{layer}.ffn_norm.weight", shape.eps, f"blk.{layer}.ffn_norm")
    yield linear("gate", "normed", "ffn_gate", shape.mlp_bias)
    yield linear("up", "normed", "ffn_up", shape.mlp_bias)
    yield Gated("gated", "gate", "up", "silu")
    yield linear("branch", "gated", "ffn_down", shape.mlp_bias)
    yield Add("x", "x", "branch")


def _inv_freq(shape: LlamaShape) -> NDArray[np.float32]:
    """Inverse frequencies [head_dim/2], rounded to float32 at every step as transformers does.

    Angles at late positions magnify the last bit. Only the power is taken in float64, so that every machine
    rounds it the same way. Linear scaling divides all by the factor (Chen et al. 2023); Llama 3 divides long
    wavelengths, keeps short ones and blends between (Llama 3.1 reference code).
    """
    values = shape.values
    exponent = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    power = np.power(np.float64(np.float32(values["rope.freq_base"])), exponent.astype(np.float64))
    inv_freq: NDArray[np.float32] = np.float32(1) / power.astype(np.float32)
    kind, factor = values.get("rope.scaling.type"), np.float32(values.get("rope.scaling.factor", 1))
    if kind == "linear":
        inv_freq /= factor
    if kind == "llama3":
        inv_freq = _llama3(inv_freq, values, factor)
    return inv_freq


def _llama3(
    inv_freq: NDArray[np.float32], values: Mapping[str, Any], factor: np.float32
) -> NDArray[np.float32]:
    low, high = values["rope.scaling.low_freq_factor"], values["rope.scaling.high_freq_factor"]
    context = values["rope.scaling.original_context_length"]
    wavelength = np.float32(2 * math.pi) / inv_freq
    kept = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blend = (np.float32(1) - kept) * inv_freq / factor + kept * inv_freq
    long, short = wavelength > np.float32(context / low), wavelength < np.float32(context / high)
    scaled: NDArray[np.float32] = np.where(long, inv_freq / factor, np.where(short, inv_freq, blend))
    return scaled
