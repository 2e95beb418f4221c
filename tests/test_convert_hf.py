"""Hugging Face folders to `.adrt`, against the safetensors package, torch and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracle import SHAPES, llama_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.hf import HfImporter
from adaptrt.format import File, open_file, verify
from adaptrt.model.llama import LlamaArchitecture
from adaptrt.quant.plain import from_float32, to_float32

CASES = {**SHAPES, "odd widths": {"intermediate_size": 172, "hidden_size": 60, "num_attention_heads": 6}}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def convert(folder: Path, out: Path, **options: Any) -> File:
    HfImporter().convert(folder, out, ConvertOptions(**options), lambda *_: None)
    return open_file(out)


def resave(folder: Path, stored: str, shard_size: str) -> None:
    """Save the folder's model again in another dtype, perhaps in shards."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=TORCH[stored])
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=shard_size)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors as float32, read by the safetensors package."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("case", "stored", "shard_size"),
    [
        ("gqa", "f32", "1GB"),
        ("gqa", "bf16", "60KB"),
        ("biases", "f16", "100KB"),
        ("tied", "bf16", "1GB"),
        ("llama3-rope", "f16", "1GB"),
        ("odd widths", "f32", "50KB"),
    ],
)
@pytest.mark.parametrize("dtype", ["nf4", "int8", "f32"])
def test_every_tensor_is_quantized_by_its_role(
    tmp_path: Path, case: str, stored: str, shard_size: str, dtype: str
) -> None:
    folder = llama_folder(tmp_path / "hf", **CASES[case])
    resave(folder, stored, shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size != "1GB")
    expected = weights(folder)
    file = convert(folder, tmp_path / "out.adrt", dtype=dtype)
    specs = LlamaArchitecture().tensors(file.metadata)
    assert [spec.name for spec in specs] == list(file.sections["base"].tensors)
    assert {spec.hf_name for spec in specs} == set(expected)
    head = "f32" if dtype == "f32" else "int8"
    dtypes = {"linear": dtype, "embedding": head, "head": head, "norm": "f32", "bias": "f32"}
    for spec in specs:
        found, values = file.tensor("base", spec.name), expected[spec.hf_name]
        assert (found.dtype, found.shape) == (dtypes[spec.role], values.shape)
        assert np.array_equal(found.data, from_float32(values, found.dtype).data), spec.name
        if found.dtype == "f32":
            assert np.array_equal(to_float32(found), values)


def test_tensors_longer_than_a_read_are_pieced_together(tmp_path: Path) -> None:
    # 2100 · 600 weights exceed the 2^20 of one read, whose end falls inside a row and inside a block
    folder = llama_folder(
        tmp_path / "hf", hidden_size=600, vocab_size=2100, intermediate_size=20, num_hidden_layers=1
    )
    values = weights(folder)["model.embed_tokens.weight"]
    for head in ("int8", "nf4", "bf16", "f16"):
        file = convert(folder, tmp_path / f"{head}.adrt", head=head)
        found = file.tensor("base", "token_embd.weight")
        assert np.array_equal(found.data, from_float32(values, head).data), head


@pytest.mark.parametrize(
    ("options", "linear", "head"),
    [
        ({}, "nf4", "int8"),
        ({"dtype": "int8"}, "int8", "int8"),
        ({"dtype": "bf16"}, "bf16", "bf16"),
        ({"dtype": "f16", "head": "f32"}, "f16", "f32"),
        ({"head": "nf4"}, "nf4", "nf4"),
    ],
)
def test_dtype_options(tmp_path: Path, options: dict[str, Any], linear: str, head: str) -> None:
    file = convert(llama_folder(tmp_path / "hf"), tmp_path / "out.adrt", **options)
    found = {name: entry.dtype for name, entry in file.sections["base"].tensors.items()}
    assert found["blk.0.attn_q.weight"] == found["blk.1.ffn_down.weight"] == linear
    assert found["token_embd.weight"] == found["output.weight"] == head
    assert found["blk.0.attn_norm.weight"] == found["output_norm.weight"] == "f32"


def test_output_is_byte_identical_wherever_the_folder_lies(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    convert(folder, tmp_path / "one.adrt")
    folder.rename(tmp_path / "elsewhere")
    convert(tmp_path / "elsewhere", tmp_path / "two.adrt")
    assert (tmp_path / "one.adrt").read_bytes() == (tmp_path / "two.adrt").read_bytes()
    verify(tmp_path / "one.adrt")


def test_sharding_does_not_change_the_output(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    convert(folder, tmp_path / "one.adrt")
    resave(folder, "f32", "40KB")
    assert not (folder / "model.safetensors").exists()
    convert(folder, tmp_path / "two.adrt")
    assert (tmp_path / "one.adrt").read_bytes() == (tmp_path / "two.adrt").read_bytes()


def test_progress_counts_the_bytes_of_the_weights(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    total = sum(value.nbytes for value in weights(folder).values())
    calls: list[tuple[int, int, str]] = []
    HfImporter().convert(folder, tmp_path / "out.adrt", ConvertOptions(), lambda *call: calls.append(call))
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert {call[1] for call in calls} == {total}
    assert calls[-1][0] == total
    assert calls[0][2] == "token_embd.weight"


def test_inert_tensors_are_skipped(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf", tie_word_embeddings=True)
    convert(folder, tmp_path / "one.adrt")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "two.adrt")
    assert (tmp_path / "one.adrt").read_bytes() == (tmp_path / "two.adrt").read_bytes()


def test_name_comes_from_the_option_or_the_config(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    assert "general.name" not in convert(folder, tmp_path / "a.adrt").metadata
    assert convert(folder, tmp_path / "b.adrt", name="mine").metadata["general.name"] == "mine"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/someone/tiny-llama/"}))
    assert convert(folder, tmp_path / "c.adrt").metadata["general.name"] == "tiny-llama"


def test_claims_model_folders_only(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    assert HfImporter().claims(folder)
    assert not HfImporter().claims(folder / "config.json")
    assert not HfImporter().claims(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    assert not HfImporter().claims(folder)


def test_conversion_imports_neither_torch_nor_its_friends(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    script = (
        "import sys; from pathlib import Path; from adaptrt.convert.hf import HfImporter\n"
        "from adaptrt.convert.base import ConvertOptions\n"
        "HfImporter().convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(), lambda *_: None)\n"
        "names = ('torch', 'transformers', 'peft', 'safetensors', 'bitsandbytes')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "out.adrt"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak resident memory of converting 150 MB in two large tensors, measured in a process of its own.

    VmHWM starts afresh at exec; ru_maxrss would begin with the peak of the process that started this one.
    """
    folder = llama_folder(
        tmp_path / "hf", hidden_size=64, vocab_size=300_000, intermediate_size=20, num_hidden_layers=1
    )
    size = (folder / "model.safetensors").stat().st_size
    script = (
        "import re, sys; from pathlib import Path; from adaptrt.convert.hf import HfImporter\n"
        "from adaptrt.convert.base import ConvertOptions\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) * 1024\n"
        "before = peak()\n"
        "HfImporter().convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(), lambda *_: None)\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "out.adrt"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert size > 150e6
    assert 1e6 < int(done.stdout) < size / 3
