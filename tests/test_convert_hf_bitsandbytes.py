"""bitsandbytes 4-bit checkpoints keep every bit, against bitsandbytes' own dequantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from helpers.oracle import llama_folder
from safetensors.torch import load_file, save_file

from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.hf import HfImporter
from adaptrt.errors import ConvertError
from adaptrt.format import open_file
from adaptrt.model.llama import LlamaArchitecture
from adaptrt.quant import nf4
from adaptrt.quant.plain import from_float32

Tensors = dict[str, torch.Tensor]
CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "bfloat16",
}
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def pack(tensors: Tensors, name: str, **options: Any) -> QuantState:
    """Replace a weight by what bitsandbytes stores for it."""
    options = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"} | options
    packed, state = quantize_4bit(tensors[name].contiguous(), **options)
    tensors[name] = packed
    tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return state


def folder_with(path: Path, change: Callable[[Tensors], object]) -> Path:
    """A model folder (MLP width 172, so that blocks cross rows) with its tensors changed."""
    folder = llama_folder(path / "hf", intermediate_size=172)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return folder


def convert(folder: Path, **options: Any) -> Any:
    HfImporter().convert(folder, folder.parent / "out.adrt", ConvertOptions(**options), lambda *_: None)
    return open_file(folder.parent / "out.adrt")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_keep_every_bit(tmp_path: Path, stored: torch.dtype) -> None:
    expected: dict[str, np.ndarray] = {}
    states: dict[str, tuple[torch.Tensor, QuantState]] = {}

    def quantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name] = tensors[name].to(stored)
            state = pack(tensors, name)
            state.dtype = torch.float32  # dequantize without the last rounding
            states[name] = tensors[name], state
            expected[name] = dequantize_4bit(tensors[name], state).numpy()

    file = convert(folder_with(tmp_path, quantize))
    specs = {spec.hf_name: spec.name for spec in LlamaArchitecture().tensors(file.metadata)}
    assert len(expected) == 14
    for name, values in expected.items():
        tensor = file.tensor("base", specs[name])
        parts, (packed, state) = nf4.parts(tensor), states[name]
        assert tensor.shape == values.shape
        assert np.array_equal(parts.codes, packed.numpy().reshape(-1))
        assert np.array_equal(parts.absmax, state.absmax.numpy())
        assert np.array_equal(parts.nested, state.state2.absmax.numpy())
        assert parts.offset == state.offset.numpy()
        if values.shape[1] % 64 == 0:  # bitsandbytes' CPU path is wrong where blocks cross row ends
            assert np.array_equal(nf4.dequantize(tensor), values)


def test_the_rest_of_a_packed_checkpoint_is_encoded_as_ever(tmp_path: Path) -> None:
    kept: Tensors = {}

    def quantize(tensors: Tensors) -> None:
        pack(tensors, Q)
        kept.update(tensors)

    file = convert(folder_with(tmp_path, quantize))
    for name, hf_name, dtype in (
        ("token_embd.weight", "model.embed_tokens.weight", "int8"),
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight", "nf4"),
    ):
        expected = from_float32(kept[hf_name].numpy(), dtype)
        assert np.array_equal(file.tensor("base", name).data, expected.data)


def test_a_packed_head_stays_as_it_is(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: pack(tensors, "lm_head.weight"))
    assert convert(folder).sections["base"].tensors["output.weight"].dtype == "nf4"
    with pytest.raises(ConvertError, match=r"'lm_head.weight' is nf4 already, it cannot become int8"):
        convert(folder, head="int8")


def test_packed_weights_are_not_requantized(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: pack(tensors, Q))
    with pytest.raises(ConvertError, match="is nf4 already, it cannot become f32"):
        convert(folder, dtype="f32")


def test_packed_weights_need_the_quantization_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: pack(tensors, Q))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=r"unexpected tensors: .*and 2 more; wrong tensors"):
        convert(folder)


def edit_state(tensors: Tensors, **changes: Any) -> None:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{Q}.nested_absmax"), f"missing tensors: '{Q}.nested_absmax'"),
        (lambda tensors: tensors[f"{Q}.quant_map"].add_(1e-3), "is not the standard table of 16 values"),
        (
            lambda tensors: tensors[f"{Q}.nested_quant_map"].mul_(-1),
            "is not the standard table of 256 values",
        ),
        (lambda tensors: tensors[f"{Q}.nested_absmax"].fill_(float("nan")), "has a value that is not finite"),
        (
            lambda tensors: tensors.update({Q: tensors[Q][:-1].clone()}),
            f"'{Q}' is u8 [2047, 1], expected u8 [2048, 1]",
        ),
        (
            lambda tensors: tensors.update({f"{Q}.absmax": torch.ones(64)}),
            f"'{Q}.absmax' is f32 [64], expected u8 [64]",
        ),
        (lambda tensors: edit_state(tensors, shape=[64, 63]), "shape is [64, 63], expected [64, 64]"),
        (lambda tensors: edit_state(tensors, blocksize=128), "blocksize is 128, expected 64"),
        (lambda tensors: edit_state(tensors, quant_type="fp4"), "quant_type is 'fp4', expected 'nf4'"),
        (
            lambda tensors: edit_state(tensors, nested_blocksize=None),
            "nested_blocksize is None, expected 256",
        ),
        (lambda tensors: edit_state(tensors, nested_offset=0.1), "nested_offset is 0.1, expected a float32"),
        (
            lambda tensors: edit_state(tensors, nested_offset=1e300),
            "nested_offset is 1e+300, expected a float32",
        ),
        (lambda tensors: edit_state(tensors, nested_offset="0"), "nested_offset is '0', expected a float32"),
        (lambda tensors: edit_state(tensors, dtype="float8"), "dtype is 'float8'"),
        (lambda tensors: edit_state(tensors, rotation=1), "has a key 'rotation', which NF4 does not have"),
        (
            lambda tensors: tensors.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}),
            "found a JSON list, expected an object",
        ),
    ],
)
def test_what_is_not_standard_is_refused(
    tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        pack(tensors, Q)
        change(tensors)

    folder = folder_with(tmp_path, spoil)
    with pytest.raises(ConvertError) as caught:
        convert(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{folder}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_single_quantization_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, lambda tensors: pack(tensors, Q, compress_statistics=False))
    with pytest.raises(ConvertError, match=r"missing tensors: .*nested_absmax"):
        convert(folder)
