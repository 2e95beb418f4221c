"""Adapters stored in other dtypes, and exported back to PEFT folders, which PEFT itself loads."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import CONFIG, WEIGHTS, base_model, edited, open_view, perturbed_peft
from helpers.cli import adaptrt_cli
from helpers.oracle import SHAPES, llama_folder, relative_error
from helpers.tiny import convert_model
from peft import PeftModel
from safetensors.torch import load_file

import adaptrt
from adaptrt.adapters.normal import LowRank
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import read_adapter
from adaptrt.adapters.stored import convert_tensors, declared_form
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdaptrtError
from adaptrt.format import open_file
from adaptrt.plugins import load_registry
from adaptrt.quant.plain import from_float32

VARIANTS = load_registry().variants
IDS = [1, 5, 9, 100, 5, 2, 77, 1, 30, 12]
TARGETS = ["q_proj", "down_proj", "lm_head", "embed_tokens"]


@dataclass
class World:
    folder: Path
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("stored")
    folder = llama_folder(path / "hf", **SHAPES["biases"], hidden_size=128)
    base = convert_model(folder, path / "base.adrt", dtype="f32", head="f32")
    adapter = perturbed_peft(
        path / "a", folder, r=6, target_modules=TARGETS, bias="all", modules_to_save=["norm"]
    )
    return World(folder, base, adapter)


def converted(world: World, out: Path, *options: object) -> str:
    outcome = adaptrt_cli("convert", world.adapter, "-o", out, "--base", world.base, *options)
    assert outcome.code == 0, outcome.err
    return outcome.err


def peft_logits(folder: Path, adapter: Path) -> np.ndarray:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base_model(folder), adapter).eval()
        return model(torch.tensor([IDS])).logits[0].numpy()


def dequantized(adapter: Path, out: Path, dtype: str) -> Path:
    """The folder with its factors rounded here, by the codecs and by hand: what the stored adapter must equal."""

    def rounded(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2:
            return tensor
        flip = "lora_B" in key or "embedding_B" in key  # blocks run along the base's dimension
        values = np.ascontiguousarray(tensor.numpy().T if flip else tensor.numpy())
        kept = adaptrt_values(values, dtype)
        return torch.from_numpy(np.ascontiguousarray(kept.T if flip else kept))

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key: rounded(key, tensor) for key, tensor in tensors.items() if "base_layer.weight" not in key
        }

    return edited(adapter, out, tensors=edit)


def adaptrt_values(values: np.ndarray, dtype: str) -> np.ndarray:
    from adaptrt.quant.plain import to_float32

    return to_float32(from_float32(values, dtype))


@pytest.mark.parametrize(("dtype", "smallest", "largest"), [
    ("bf16", 1e-5, 1e-2), ("f16", 1e-6, 1e-3), ("int8", 1e-4, 3e-2), ("nf4", 1e-3, 0.3),
])  # fmt: skip
def test_a_dtype_costs_what_is_printed(
    dtype: str, smallest: float, largest: float, world: World, tmp_path: Path
) -> None:
    said = converted(world, tmp_path / "a.adrt", "--adapter-dtype", dtype)
    (printed,) = re.findall(rf"stored as {dtype}, it moves the logits by (\S+) of their norm", said)
    assert smallest < float(printed) < largest
    with open_file(tmp_path / "a.adrt") as file:
        adapter = read_adapter(file, "adapter/a")
    assert {t.dtype for t in adapter.tensors.values() if len(t.shape) == 2} == {dtype}
    assert {t.dtype for t in adapter.tensors.values() if len(t.shape) == 1} == {"f32"}
    expected = peft_logits(world.folder, dequantized(world.adapter, tmp_path / "rounded", dtype))
    for backend in ("reference", "cpu"):
        with adaptrt.load(world.base, backend, precision="exact", kv_dtype="f32") as model:
            model.load_adapter(tmp_path / "a.adrt")
            assert relative_error(model.logits(IDS, "a"), expected) <= 1e-4


def test_quantized_factors_reach_the_backend_unexpanded(world: World) -> None:
    view = open_view(world.base)
    adapter = convert_tensors(import_peft(world.adapter, VARIANTS, view), VARIANTS["lora"], "int8")
    for target, lowered in lower(adapter, VARIANTS, view, 0.5).items():
        for term in lowered.terms:
            assert isinstance(term, LowRank) and term.u is not None
            assert term.u.dtype == term.v.dtype == "int8" and term.u.shape[0] == term.v.shape[0] == 6
            assert term.u in adapter.tensors.values() and term.v in adapter.tensors.values(), target


def test_a_dtype_that_changes_nothing_or_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    view = open_view(world.base)
    adapter = import_peft(world.adapter, VARIANTS, view)
    norms = replace(adapter, targets=tuple(t for t in adapter.targets if t.target == "output_norm"))
    with pytest.raises(AdaptrtError, match="a lora adapter has no tensors to store as int8"):
        convert_tensors(norms, VARIANTS["lora"], "int8")
    big = edited(world.adapter, tmp_path / "big", tensors=lambda ts: {k: t * 1e9 for k, t in ts.items()
                                                                      if "base_layer.weight" not in k})  # fmt: skip
    outcome = adaptrt_cli(
        "convert", big, "-o", tmp_path / "b.adrt", "--base", world.base, "--adapter-dtype", "f16"
    )
    assert outcome.code == 1 and "is beyond the range of f16" in outcome.error
    outcome = adaptrt_cli("convert", world.folder, "-o", tmp_path / "b.adrt", "--adapter-dtype", "f16")
    assert outcome.code == 1 and "option adapter_dtype goes with an adapter folder" in outcome.error
    assert not (tmp_path / "b.adrt").exists()


def test_an_export_has_the_same_bytes_and_peft_the_same_logits(world: World, tmp_path: Path) -> None:
    converted(world, tmp_path / "a.adrt")
    outcome = adaptrt_cli("convert", tmp_path / "a.adrt", "-o", tmp_path / "out", "--to", "peft")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / CONFIG).read_bytes() == (world.adapter / CONFIG).read_bytes()
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(world.adapter / WEIGHTS)
    assert ours.keys() == {key for key in theirs if "base_layer.weight" not in key}
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    found, expected = (peft_logits(world.folder, path) for path in (tmp_path / "out", world.adapter))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_an_export_of_other_dtypes_says_so(dtype: str, world: World, tmp_path: Path) -> None:
    converted(world, tmp_path / "a.adrt", "--adapter-dtype", dtype)
    outcome = adaptrt_cli("convert", tmp_path / "a.adrt", "-o", tmp_path / "out", "--to", "peft")
    assert ("PEFT has no nf4: these tensors became f32" in outcome.err) == (dtype == "nf4")
    expected = peft_logits(world.folder, dequantized(world.adapter, tmp_path / "rounded", dtype))
    assert relative_error(peft_logits(world.folder, tmp_path / "out"), expected) <= 1e-5


def test_an_export_that_cannot_be_is_refused_whole(world: World, tmp_path: Path) -> None:
    converted(world, tmp_path / "a.adrt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "a.adrt", "-o", tmp_path / "full"], "full: exists, expected a new folder"),
        ([tmp_path / "a.adrt", "-o", tmp_path / "o", "--dtype", "f32"], "option dtype does not go with --to"),
        ([world.base, "-o", tmp_path / "o"], "base.adrt: found 0 adapters, expected one"),
        ([world.adapter, "-o", tmp_path / "o"], "a: "),
    ]
    for args, expected in cases:
        outcome = adaptrt_cli("convert", *args, "--to", "peft")
        assert outcome.code == 1 and expected in outcome.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.adrt", "full"]


def test_a_config_of_no_method_is_refused(world: World, tmp_path: Path) -> None:
    from adaptrt.convert.to_peft import export_peft

    adapter = import_peft(world.adapter, VARIANTS, open_view(world.base))
    text: dict[str, Any] = {"made": "by hand"}
    with pytest.raises(AdaptrtError, match="its config has no peft_type"):
        export_peft(replace(adapter, config_text=json.dumps(text)), VARIANTS, tmp_path / "o")


def test_a_quantized_tensor_that_is_no_factor_keeps_its_shape() -> None:
    """Nothing of the sort runs, but an export must not fall over it."""
    for dims in ((), ("out",), ("out", "in")):
        tensor = from_float32(np.ones((3,) * len(dims), np.float32), "int8")
        assert declared_form(tensor, dims).shape == (3,) * len(dims)
