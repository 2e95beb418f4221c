"""Wrong inputs: each gives its one-line ConvertError and leaves neither output nor temporary file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import llama_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.hf import HfImporter
from adaptrt.errors import AdaptrtError, ConvertError

Q = "model.layers.0.self_attn.q_proj.weight"
PANICS = json.dumps(  # inside the tokenizers library, when it is read
    {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    }
)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "hf")


def refused(folder: Path, error: type[AdaptrtError] = ConvertError, **options: Any) -> str:
    """The message, after checking that it is one line and that nothing was left behind."""
    out = folder.parent / "out"
    out.mkdir()
    with pytest.raises(error) as caught:
        HfImporter().convert(folder, out / "model.adrt", ConvertOptions(**options), lambda *_: None)
    assert list(out.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, str]:
    """Split the model into several files; returns the index's weight_map."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    assert refused(tmp_path / "hf").endswith("not a Hugging Face model folder, it has no config.json")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder).endswith("model.safetensors: No such file or directory")


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")
    assert "has pytorch_model-00001-of-00002.bin, a pickle, which may run code" in refused(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[1]", "config.json: found a JSON list, expected an object"),
        ('{"a": 1, "a": 2}', "config.json: key 'a' appears twice, expected once"),
        ("[" * 100_000, "config.json: not valid JSON"),
        ('{"architectures": ["GPT2LMHeadModel"]}', "expected one of LlamaForCausalLM"),
        ('{"architectures": 7}', "config.json has architectures 7, expected one of LlamaForCausalLM"),
        (
            '{"model_type": ["llama"]}',
            "config.json has architectures None, expected one of LlamaForCausalLM",
        ),
    ],
)
def test_bad_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    assert message in refused(folder)


def test_unsupported_option_is_named(folder: Path) -> None:
    edit_config(folder, sliding_window=128)
    assert "option 'sliding_window' is 128" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: truncated" in refused(folder)


def test_missing_unexpected_and_wrong_tensors_are_told_together(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            for name in ("gate_proj", "up_proj"):
                del tensors[f"model.layers.{layer}.mlp.{name}.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        tensors[Q] = torch.ones(64, 63)
        tensors[DOWN] = torch.ones(64, 160, dtype=torch.int64)

    edit_tensors(folder, change)
    assert refused(folder).split(": ", 1)[1] == (
        "missing tensors: 'model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight', "
        "'model.layers.1.mlp.gate_proj.weight' and 1 more; "
        "unexpected tensors: 'model.layers.0.self_attn.q_norm.weight'; "
        f"wrong tensors: '{Q}' is [64, 63], config.json makes it [64, 64], "
        f"'{DOWN}' is i64, expected f32, f16 or bf16"
    )


def test_doubles_are_refused_by_name(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q: tensors[Q].double()}))
    assert f"'{Q}' is f64, expected f32, f16 or bf16" in refused(folder)


def test_untied_config_without_head(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing tensors: 'lm_head.weight'" in refused(folder)


def test_tied_config_with_another_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    assert "unexpected tensors: 'lm_head.weight'" in refused(folder)


@pytest.mark.parametrize("dtype", ["nf4", "int8", "bf16", "f16", "f32"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, dtype: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN].view(-1)[777] = value

    edit_tensors(folder, spoil)
    assert refused(folder, dtype=dtype).endswith(
        f"tensor '{DOWN}': value at flat index 777 is {value}, expected a finite number"
    )


def test_a_norm_that_is_not_finite(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    assert "tensor 'model.norm.weight': value at flat index 0 is inf" in refused(folder)


def test_weights_beyond_f16(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[Q].fill_(70000.0))
    message = refused(folder, dtype="f16")
    assert f"tensor '{Q}'" in message
    assert "beyond the range of f16" in message


def test_missing_shard(folder: Path) -> None:
    weight_map = shard(folder)
    gone = sorted(set(weight_map.values()))[1]
    (folder / gone).unlink()
    assert refused(folder).endswith(f"shard {gone} is missing, model.safetensors.index.json lists it")


def test_tensor_in_two_shards(folder: Path) -> None:
    weight_map = shard(folder)
    first, second = sorted(set(weight_map.values()))[:2]
    name = next(name for name, file in weight_map.items() if file == first)
    tensors = load_file(folder / second)
    save_file(tensors | {name: torch.zeros(2)}, folder / second)
    assert refused(folder).endswith(f"tensor '{name}' is in both {first} and {second}, expected one")


def test_index_and_shards_disagree(folder: Path) -> None:
    weight_map = shard(folder)
    other = sorted(set(weight_map.values()))[-1]
    name = next(name for name, file in weight_map.items() if file != other)
    write_index(folder, weight_map | {name: other})
    assert f"tensor '{name}' is not in {other}, where the index has it" in refused(folder)


def test_shard_tensor_absent_from_the_index(folder: Path) -> None:
    weight_map = shard(folder)
    file = weight_map.pop(Q)
    assert file in weight_map.values()
    write_index(folder, weight_map)
    assert f"tensor '{Q}' of {file} is not in the index" in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["../hf/model.safetensors", "/etc/passwd", "a\\b.safetensors", "c:x.safetensors", "x.bin", "", 7, None],
)
def test_shard_names_stay_in_the_folder(folder: Path, name: object) -> None:
    weight_map = shard(folder)
    write_index(folder, weight_map | {Q: name})
    assert "expected a .safetensors file of this folder" in refused(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_map(folder: Path, weight_map: object) -> None:
    shard(folder)
    write_index(folder, weight_map)
    assert "weight_map must map tensor names to shard files" in refused(folder)


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert refused(folder).endswith("model.safetensors: not a regular file")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quant_method 'gptq', expected bitsandbytes; convert the model as",
        ),
        ({"bits": 8}, "quant_method None, expected bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit True, expected False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4', expected 'nf4'"),
        (
            {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
            "bnb_4bit_use_double_quant False, expected",
        ),
        ("int4", "quantization_config that is no object"),
    ],
)
def test_other_quantizations_are_refused_by_name(folder: Path, quantization: object, message: str) -> None:
    edit_config(folder, quantization_config=quantization)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer that can be read"),
        ("tokenizer.json", PANICS, "tokenizer.json: not a tokenizer that can be read"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json: not valid JSON"),
        (
            "tokenizer_config.json",
            r'{"eos_token": "\ud800"}',
            "tokenizer_config.json: not valid JSON ('utf-8' codec",
        ),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token is 3, expected a string"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is a int, expected a string"),
        ("generation_config.json", '{"eos_token_id": [2, "x"]}', "eos_token_id is 'x', expected a token id"),
        (
            "generation_config.json",
            '{"eos_token_id": 131}',
            "eos_token_id is 131, expected a token id from 0 to 130",
        ),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja: not UTF-8 at byte 0"),
    ],
)
def test_damaged_text_files(folder: Path, name: str, content: str | bytes, message: str) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(folder)


def test_unknown_dtype_option() -> None:
    with pytest.raises(
        ConvertError, match="option dtype is 'q4_k', expected one of nf4, int8, bf16, f16, f32"
    ):
        ConvertOptions(dtype="q4_k")  # type: ignore[arg-type]
    with pytest.raises(ConvertError, match="option head is 'fp8'"):
        ConvertOptions(head="fp8")  # type: ignore[arg-type]


def test_output_that_cannot_be_written(folder: Path) -> None:
    with pytest.raises(AdaptrtError) as caught:
        HfImporter().convert(folder, folder / "no" / "x.adrt", ConvertOptions(), lambda *_: None)
    assert "\n" not in str(caught.value)
    assert not (folder / "no").exists()


def test_failure_keeps_the_old_output(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.adrt"
    HfImporter().convert(folder, out, ConvertOptions(), lambda *_: None)
    before = out.read_bytes()
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ConvertError):
        HfImporter().convert(folder, out, ConvertOptions(), lambda *_: None)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.adrt"]


def test_weights_that_shrink_while_being_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size

    def shrink(*_: object) -> None:
        with path.open("r+b") as file:
            file.truncate(size // 2)

    with pytest.raises(ConvertError, match="truncated"):
        HfImporter().convert(folder, folder / "out.adrt", ConvertOptions(), shrink)
    assert not list(folder.glob("*out.adrt*"))


def test_headers_are_checked_before_memory_is_taken(folder: Path) -> None:
    header = json.dumps({Q: {"dtype": "F32", "shape": [1 << 39], "data_offsets": [0, 1 << 41]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert f"tensor '{Q}' has bad data_offsets" in refused(folder)
