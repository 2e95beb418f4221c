"""PiSSA and its like: adapters whose initialisation changed the base, converted for the unchanged one."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import base_model, edit_tensors, edited
from helpers.oracle import LINEARS, SHAPES, llama_folder, relative_error
from helpers.tiny import convert_model
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga

import adaptrt
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdaptrtError
from adaptrt.plugins import load_registry

if importlib.util.find_spec("attr") is None:
    sys.modules["attr"] = (
        dataclasses  # PEFT's corda.py takes `dataclass` from attrs, which PEFT does not require
    )
from peft.tuners.lora.corda import preprocess_corda

IDS = [1, 5, 9, 100, 5, 2, 77, 1, 30, 12]
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa niter": {"init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj", "down_proj"]},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"q_proj": 3}},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
    "corda, patterns": {
        "init_lora_weights": "corda",
        "corda_config": CordaConfig(corda_method="kpm"),
        "rank_pattern": {"down_proj": 7},
    },
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "lora_ga, rslora": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": LoraGAConfig(direction="ArBr", scale="weight_svd"),
        "use_rslora": True,
    },
    "rslora": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "r": 3,
        "rank_pattern": {"k_proj": 6},
        "alpha_pattern": {"q_proj": 3},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("initial")
    folder = llama_folder(path / "hf", **SHAPES["biases"])
    return folder, convert_model(folder, path / "base.adrt", dtype="f32", head="f32")


def prepared(model: Any, config: LoraConfig) -> Any:
    """The model with what CorDA and LoRA-GA learn of it beforehand: covariances of inputs, gradients."""

    def run(grad: bool = False) -> None:
        for _ in range(8):
            ids = torch.randint(0, 131, (1, 64))
            loss = model(ids, labels=ids).loss
            if grad:
                loss.backward()

    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=run)
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: run(grad=True))
    return model


def trained(path: Path, folder: Path, **options: Any) -> np.ndarray:
    """Save an adapter to `path` and as it was initialised to `path`/pissa_init; PEFT's logits on its own base."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS} | options)
        model = get_peft_model(prepared(base_model(folder), config), config).eval()
        model.save_pretrained(path / "pissa_init")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += torch.randn_like(parameter) * (0.3 / parameter.shape[-1] ** 0.5)
            logits = model(torch.tensor([IDS])).logits[0].numpy()
        model.save_pretrained(path)
    return logits


@pytest.mark.parametrize("case", CASES)
def test_it_acts_on_the_unchanged_base_as_it_did_on_its_own(
    case: str, base: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, adrt = base
    expected = trained(tmp_path / "a", folder, **CASES[case])
    with adaptrt.load(adrt, "cpu", precision="exact", kv_dtype="f32") as model:
        model.load_adapter(tmp_path / "a")
        assert relative_error(model.logits(IDS, "a"), expected) <= 1e-4
        assert relative_error(model.logits(IDS), expected) > 0.05
        assert "twice the rank" in model.adapters["a"].notes[0]


def test_peft_s_own_way_of_saving_the_start_is_understood(base: tuple[Path, Path], tmp_path: Path) -> None:
    """PEFT's guide sets init_lora_weights to true before saving: then only the user can say that the base changed."""
    folder, adrt = base
    expected = trained(tmp_path / "a", folder, init_lora_weights="pissa")
    start = edited(tmp_path / "a/pissa_init", tmp_path / "start", {"init_lora_weights": True})
    plain = edited(tmp_path / "a", tmp_path / "plain", {"init_lora_weights": True})
    variants = load_registry().variants
    with adaptrt.load(adrt, "cpu", precision="exact", kv_dtype="f32") as model:
        model._adapters.add("a", import_peft(plain, variants, model._base, initial=start))
        assert relative_error(model.logits(IDS, "a"), expected) <= 1e-4


def test_eva_leaves_the_base_alone(base: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adrt = base
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LINEARS, init_lora_weights="eva", eva_config=EvaConfig())
    batches = [{"input_ids": torch.randint(0, 131, (4, 32))} for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(folder), config)
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) / 2)
        expected = model.eval()(torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "a")
    with adaptrt.load(adrt, "cpu", precision="exact", kv_dtype="f32") as ours:
        ours.load_adapter(tmp_path / "a")
        assert relative_error(ours.logits(IDS, "a"), expected) <= 1e-4


def test_without_the_initial_factors_it_is_refused(base: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adrt = base
    trained(tmp_path / "a", folder, init_lora_weights="pissa", target_modules=["q_proj"])
    shutil.move(tmp_path / "a/pissa_init", tmp_path / "start")
    zeros = edited(
        tmp_path / "start",
        tmp_path / "zeros",
        tensors=lambda ts: {k: t * ("lora_B" not in k) for k, t in ts.items()},
    )
    half = edited(tmp_path / "start", tmp_path / "half")
    edit_tensors(half, lambda ts: {k: t for k, t in ts.items() if "layers.0" in k})
    plain = edited(tmp_path / "a", tmp_path / "plain", {"init_lora_weights": "gaussian"})
    loftq = edited(tmp_path / "a", tmp_path / "loftq", {"init_lora_weights": "loftq"})
    start = tmp_path / "start"
    cases: list[tuple[Path, Path | None, str]] = [
        (tmp_path / "a", None, "init_lora_weights = 'pissa': this initialisation changed the base: give the"),
        (tmp_path / "a", zeros, "lora_B.weight is all zeros, expected one that changed the base"),
        (tmp_path / "a", half, "holds no base_model.model.model.layers.1.self_attn.q_proj.lora_"),
        (tmp_path / "a", edited(start, tmp_path / "r", {"r": 2}), "option r is 4, and 2 in the initial"),
        (tmp_path / "a", tmp_path, "not a PEFT adapter folder"),
        (plain, start, "its initialisation left the base alone, it needs no initial adapter"),
        (loftq, None, "init_lora_weights = 'loftq': this initialisation changed the base by more"),
    ]
    variants = load_registry().variants
    with adaptrt.load(adrt, "reference") as model:
        for adapter, initial, expected in cases:
            with pytest.raises(AdaptrtError, match=re.escape(expected)):
                import_peft(adapter, variants, model._base, initial=initial)
        assert import_peft(tmp_path / "a", variants, model._base, initial=start).targets
