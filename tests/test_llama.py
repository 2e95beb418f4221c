"""The Llama architecture: config.json in, metadata, tensor names and Program out; hostile values refused."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrt.errors import ConvertError, ModelError
from adaptrt.model.llama import INV_FREQ, LlamaArchitecture
from adaptrt.program import Attention, Embed, Linear, Logits, Rope

LLAMA = LlamaArchitecture()
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "no groups": {"num_key_value_heads": 8},
}


def transformers_config(changes: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**(SMALL | {"tie_word_embeddings": False} | changes))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_tensors_are_those_of_transformers(changes: dict[str, Any]) -> None:
    config = transformers_config(changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    metadata = LLAMA.metadata(json.loads(config.to_json_string()))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = LLAMA.tensors(metadata)
    assert {spec.hf_name: spec.shape for spec in specs} == expected
    assert len({spec.name for spec in specs}) == len(specs)
    assert set(LLAMA.program(metadata).weights) == {spec.name for spec in specs}


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 3.0}, LLAMA3, LLAMA3 | {"factor": 32.0}]
)
def test_inv_freq_equals_transformers(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
    changes = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling, "num_hidden_layers": 1}
    config = transformers_config(deepcopy(changes))  # transformers writes into what it is given
    expected = LlamaForCausalLM(config).model.rotary_emb.inv_freq.numpy()
    new_style = json.loads(config.to_json_string())
    assert "rope_parameters" in new_style
    old_style = SMALL | changes
    for style in (new_style, old_style):
        found = LLAMA.program(LLAMA.metadata(style)).constants[INV_FREQ]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1.5e-6, atol=0)
        assert np.mean(found == expected) > 0.85  # bit for bit but for the last place of torch's vector pow


def test_old_spelling_and_missing_original_length() -> None:
    """`type` for `rope_type`; max_position_embeddings when the original length is absent; as transformers."""
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    metadata = LLAMA.metadata(SMALL | {"rope_scaling": old})
    assert metadata["llama.rope.scaling.type"] == "llama3"
    assert metadata["llama.rope.scaling.original_context_length"] == 512


def test_metadata_uses_gguf_keys_and_transformers_defaults() -> None:
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    metadata = LLAMA.metadata({key: SMALL[key] for key in required})
    default = LlamaConfig(**{key: SMALL[key] for key in required})
    assert metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": default.max_position_embeddings,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 172,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": default.num_key_value_heads,
        "llama.attention.key_length": default.head_dim,
        "llama.attention.layer_norm_rms_epsilon": default.rms_norm_eps,
        "llama.rope.freq_base": default.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": default.head_dim,
        "llama.vocab_size": 131,
        "llama.attention.bias": default.attention_bias,
        "llama.feed_forward.bias": default.mlp_bias,
        "llama.tie_word_embeddings": default.tie_word_embeddings,
    }


def test_program_of_a_layer() -> None:
    program = LLAMA.program(LLAMA.metadata(SMALL | {"attention_bias": True, "tie_word_embeddings": True}))
    kinds = [type(op).__name__ for op in program.ops]
    attend = ["Norm", "Linear", "Linear", "Linear", "Rope", "Rope", "Attention", "Linear", "Add"]
    layer = [*attend, "Norm", "Linear", "Linear", "Gated", "Linear", "Add"]
    assert kinds == ["Embed", *layer, *layer, "Norm", "Logits"]
    embed, logits = program.ops[0], program.ops[-1]
    assert isinstance(embed, Embed)
    assert isinstance(logits, Logits)
    assert (logits.weight, logits.target) == (embed.weight, "output")
    biases = {op.target: op.bias for op in program.ops if isinstance(op, Linear)}
    assert (biases["blk.0.attn_q"], biases["blk.0.ffn_gate"]) == ("blk.0.attn_q.bias", None)
    attention = [op for op in program.ops if isinstance(op, Attention)]
    assert [op.layer for op in attention] == [0, 1]
    assert (attention[0].heads, attention[0].kv_heads, attention[0].scale) == (8, 4, 8**-0.5)
    assert [(op.reg, op.heads) for op in program.ops if isinstance(op, Rope)][:2] == [("q", 8), ("k", 4)]
    assert program.targets[:3] == ("token_embd", "blk.0.attn_norm", "blk.0.attn_q")
    for op in program.ops:  # every register that an op names is declared
        for field in ("out", "src", "reg", "a", "b", "q", "k", "v", "gate", "up"):
            assert getattr(op, field, "x") in program.registers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2, expected 1"),
        (
            {"sliding_window": 4096},
            "option 'sliding_window' is 4096, which the llama architecture does not know",
        ),
        ({"logit_scale": 0.5, "qk_norm": True}, "option 'logit_scale' is 0.5 (and 1 more)"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is ['linear']"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5, expected a number from 1"),
        ({"rope_scaling": LLAMA3 | {"mystery": 1}}, "RoPE option 'mystery' is not supported"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor is 4.0, expected more than"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4},
            "rope_theta is both 1000000.0 and 10000.0",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, expected 1"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, expected 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, expected a number from 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 8, expected a multiple of"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1 to 1024"),
        ({"hidden_size": 66}, "hidden_size is 66, expected a multiple of num_attention_heads, which is 8"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776, expected a whole number from 1 to 131072"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": 172.0}, "intermediate_size is 172.0, expected a whole number"),
        ({"vocab_size": True}, "vocab_size is True, expected a whole number"),
        ({"vocab_size": -1}, "vocab_size is -1, expected a whole number"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number"),
        ({"max_position_embeddings": 1 << 60}, "max_position_embeddings is 1152921504606846976, expected"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
    ],
)
def test_config_is_honoured_or_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError) as caught:
        LLAMA.metadata(SMALL | changes)
    assert str(caught.value).startswith("config.json: " + message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "layer_types": [], "logit_scale": 0.0},
        {"torch_dtype": "bfloat16", "attention_dropout": 0.1, "use_cache": True, "_name_or_path": "x"},
        {"rope_scaling": {"type": "default"}, "hidden_act": "swish", "partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "rope_theta": 10000.0},
        {"pretraining_tp": 1, "model_type": None},
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": "q4"},
        },  # SmolLM2
    ],
)
def test_options_at_rest_change_nothing(changes: dict[str, Any]) -> None:
    assert LLAMA.metadata(SMALL | changes) == LLAMA.metadata(SMALL)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "qwen2", "general.architecture is 'qwen2', expected 'llama'"),
        ("llama.block_count", 0, "llama.block_count is 0, expected a whole number from 1 to 1024"),
        ("llama.block_count", 1 << 40, "llama.block_count is 1099511627776"),
        ("llama.block_count", "2", "llama.block_count is '2', expected a whole number"),
        ("llama.block_count", True, "llama.block_count is True, expected a whole number"),
        ("llama.vocab_size", [131], "llama.vocab_size is [131], expected a whole number"),
        ("llama.attention.head_count_kv", 3, "llama.attention.head_count is 8, expected a multiple of"),
        ("llama.attention.key_length", 9, "llama.attention.key_length is 9, expected an even number"),
        ("llama.rope.dimension_count", 4, "llama.rope.dimension_count is 4, expected 8, the whole head"),
        ("llama.attention.layer_norm_rms_epsilon", -1e-5, "llama.attention.layer_norm_rms_epsilon is -1e-05"),
        ("llama.rope.freq_base", float("inf"), "llama.rope.freq_base is inf"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type is 'yarn'"),
        ("llama.rope.scaling.type", {}, "llama.rope.scaling.type is {}"),
        ("llama.rope.scaling.type", "linear", "llama.rope.scaling.factor is missing"),
        ("llama.rope.scaling.factor", 2.0, "llama.rope.scaling.factor is not a key that"),
        ("llama.attention.sliding_window", 64, "llama.attention.sliding_window is not a key that"),
        ("llama.attention.bias", 0, "llama.attention.bias is 0, expected true or false"),
        ("llama.embedding_length", None, "llama.embedding_length is None, expected a whole number"),
    ],
)
def test_hostile_file_metadata_is_refused(key: str, value: object, message: str) -> None:
    metadata = LLAMA.metadata(SMALL)
    for read in (LLAMA.program, LLAMA.tensors):
        with pytest.raises(ModelError) as caught:
            read(metadata | {key: value})
        assert str(caught.value).startswith("metadata " + message)
        assert "\n" not in str(caught.value)


def test_every_missing_key_is_named() -> None:
    metadata = LLAMA.metadata(SMALL)
    for key in metadata:
        with pytest.raises(ModelError, match=f"metadata {key} is "):
            LLAMA.program({name: value for name, value in metadata.items() if name != key})
