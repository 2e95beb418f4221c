"""Adapters made of adapters, against PEFT's add_weighted_adapter: the same logits for every combination type."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.adapters import base_model, perturbed_peft
from helpers.cli import adaptrt_cli
from helpers.oracle import SHAPES, llama_folder, relative_error
from helpers.tiny import convert_model
from peft import PeftModel

import adaptrt
from adaptrt.adapters.storage import PREFIX, only_adapter, read_adapter
from adaptrt.convert.peft import write_adapter_file
from adaptrt.errors import AdaptrtError
from adaptrt.format import open_file
from adaptrt.tensor import Tensor

IDS = [1, 5, 9, 100, 5, 2, 77, 1, 30, 12]
OPTIONS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj", "lm_head"]},
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
]
WEIGHTS = [0.7, -0.4, 1.1]
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd of rank 2": {"combination_type": "svd", "svd_rank": 2},
    "ties": {"density": 0.4},
    "ties by count": {"combination_type": "ties", "density": 0.6, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.4},
    "magnitude_prune": {"density": 0.3},
    "magnitude_prune_svd": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "dare_linear_svd": {"density": 0.5},
    "dare_ties_svd": {"density": 0.5},
}

UNUSED: list[tuple[str, str, Any]] = [
    ("cat", "svd_rank", 4),
    ("svd", "density", 0.5),
    ("linear", "density", 0.5),
    ("linear", "seed", 3),
    ("svd", "majority_sign_method", "frequency"),
]


@dataclass
class World:
    folder: Path
    base: Path
    adapters: list[Path]
    peft: Any


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("algebra")
    folder = llama_folder(path / "hf", **SHAPES["gqa"])
    base = convert_model(folder, path / "base.adrt", dtype="f32", head="f32")
    adapters = [perturbed_peft(path / f"a{i}", folder, i, **options) for i, options in enumerate(OPTIONS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = PeftModel.from_pretrained(base_model(folder), adapters[0], adapter_name="a0")
        for name in ("a1", "a2"):
            peft.load_adapter(adapters[int(name[1])], adapter_name=name)
    return World(folder, base, adapters, peft)


def peft_logits(world: World, names: list[str], weights: list[float], **options: Any) -> np.ndarray:
    """PEFT's logits under its own combined adapter; what DARE drops is drawn as we draw it."""
    masks = np.random.default_rng(7)

    def pruned(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        mask = torch.from_numpy(masks.random(tuple(tensor.shape)) < density)
        return tensor * mask / density

    model = copy.deepcopy(world.peft)
    with warnings.catch_warnings(), torch.no_grad(), patch("peft.utils.merge_utils.random_pruning", pruned):
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "new", **options)
        model.set_adapter("new")
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


@pytest.fixture
def model(world: World) -> Any:
    with adaptrt.load(world.base, "cpu", precision="exact", kv_dtype="f32") as model:
        for index, folder in enumerate(world.adapters):
            model.load_adapter(folder, f"a{index}")
        yield model


@pytest.mark.parametrize("case", [case for case in CASES if "dare" not in case])
def test_combinations_are_pefts(case: str, world: World, model: adaptrt.Model) -> None:
    options = {"combination_type": case, **CASES[case]}
    model.add_weighted_adapter(["a0", "a1", "a2"], WEIGHTS, "new", **options)
    expected = peft_logits(world, ["a0", "a1", "a2"], WEIGHTS, **options)
    assert relative_error(model.logits(IDS, "new"), expected) <= 1e-4
    assert relative_error(model.logits(IDS), expected) > 0.02


@pytest.mark.parametrize("case", [case for case in CASES if "dare" in case])
def test_dare_is_pefts_but_for_what_chance_drops(case: str, world: World, model: adaptrt.Model) -> None:
    """On one module, where both draw in the same order: A before B, adapter by adapter."""
    options = {"combination_type": case, **CASES[case]}
    names, weights = ["a0", "a1"], WEIGHTS[:2]
    modules = {"model.layers.0.self_attn.q_proj"}
    for index in (0, 1):
        adapter = model.adapters[f"a{index}"]
        only = tuple(target for target in adapter.targets if target.target == "blk.0.attn_q")
        model._adapters.remove(f"a{index}")
        model._adapters.add(f"a{index}", adapter.__class__(**{**vars(adapter), "targets": only}))
    model.add_weighted_adapter(names, weights, "new", **options, seed=7)
    reduced = copy.copy(world)
    reduced.peft = copy.deepcopy(world.peft)
    for name, module in reduced.peft.base_model.model.named_modules():
        for held in ("lora_A", "lora_embedding_A"):
            if hasattr(module, held) and name not in modules:
                for adapter_name in ("a0", "a1"):
                    for key in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                        if adapter_name in getattr(module, key):
                            getattr(module, key).pop(adapter_name)
    for config in reduced.peft.peft_config.values():
        config.target_modules = modules
    expected = peft_logits(reduced, names, weights, **options)
    assert relative_error(model.logits(IDS, "new"), expected) <= 1e-4
    assert relative_error(model.logits(IDS), expected) > 1e-3


def test_a_seed_repeats_and_changes_what_is_dropped(model: adaptrt.Model) -> None:
    found = []
    for index, seed in enumerate((1, 1, 2)):
        options: Any = {"combination_type": "dare_linear", "density": 0.5, "seed": seed}
        model.add_weighted_adapter(["a0", "a1"], [1, 1], f"n{index}", **options)
        found.append(model.logits(IDS, f"n{index}"))
    assert np.array_equal(found[0], found[1]) and relative_error(found[2], found[0]) > 1e-3


def test_what_does_not_combine_is_refused_by_name(world: World, model: adaptrt.Model, tmp_path: Path) -> None:
    model.load_adapter(perturbed_peft(tmp_path / "r2", world.folder, r=2), "r2")
    biased = {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["norm"]}
    model.load_adapter(perturbed_peft(tmp_path / "biased", world.folder, **biased), "biased")
    invoked = {"target_modules": ["q_proj"], "alora_invocation_tokens": [1]}
    model.load_adapter(perturbed_peft(tmp_path / "alora", world.folder, **invoked), "alora")
    cases: list[tuple[list[str], list[Any], dict[str, Any], str]] = [
        (["a0", "gone"], [1, 1], {}, "adapter 'gone': not loaded; loaded: a0, a1"),
        (["a0", "alora"], [1, 1], {}, "adapter 'alora' is of variant alora, expected lora or rslora"),
        (["a0", "biased"], [1, 1], {}, "adapter 'biased' has bias, replaced_weight, which do not combine"),
        (["a0", "r2"], [1, 1], {"combination_type": "linear"}, "blk.0.attn_q: ranks 4, 2, and linear needs"),
        (["a0"], [1, 2], {}, "found 1 adapters and 2 weights, expected as many"),
        (["a0"], [float("nan")], {}, "weight nan, expected a finite number"),
        (
            ["a0", "a1"],
            [1, 1],
            {"combination_type": "mean"},
            "combination_type is 'mean', expected one of svd",
        ),
        (["a0", "a1"], [1, 1], {"combination_type": "ties"}, "density is None, expected a number above 0"),
        (["a0", "a1"], [1, 1], {"svd_rank": 0}, "svd_rank is 0, expected a whole number above 0"),
        (["a0", "a1"], [1, 1], {"svd_rank": 9}, "svd_rank is 9, expected at most 8: no combined target"),
        (
            ["a0", "a1"],
            [1, 1],
            {"combination_type": "ties_svd", "density": 0.5, "svd_rank": 257},
            "svd_rank is 257, expected at most 256",
        ),
        (["a0", "a1"], [1, 1], {"seed": -1}, "seed is -1, expected a whole number, 0 or more"),
        (
            ["a0"],
            [1],
            {"svd_rank": 2},
            "found one adapter with combination_type 'svd', svd_rank 2, expected several",
        ),
        (
            ["a0"],
            [1],
            {"combination_type": "ties", "density": 0.5},
            "found one adapter with combination_type 'ties'",
        ),
        *(
            (
                ["a0", "a1"],
                [1, 1],
                {"combination_type": kind, name: value},
                f"{name} is {value!r}, which has no effect",
            )
            for kind, name, value in UNUSED
        ),
    ]
    for names, weights, options, expected in cases:
        with pytest.raises(AdaptrtError, match=re.escape(expected)):
            model.add_weighted_adapter(names, weights, "new", **options)
    assert "new" not in model.adapters


def test_the_command_writes_what_peft_loads(world: World, tmp_path: Path) -> None:
    out, back = tmp_path / "new.adrt", tmp_path / "back"
    sources = [f"{folder}:{weight}" for folder, weight in zip(world.adapters, WEIGHTS, strict=True)]
    outcome = adaptrt_cli("adapter", "combine", out, *sources, "--type", "cat", "--base", world.base)
    assert outcome.code == 0, outcome.err
    assert adaptrt_cli("convert", out, "-o", back, "--to", "peft").code == 0
    expected = peft_logits(world, ["a0", "a1", "a2"], WEIGHTS, combination_type="cat")
    with adaptrt.load(world.base, "cpu", precision="exact", kv_dtype="f32") as model:
        model.load_adapter(out)
        assert relative_error(model.logits(IDS, "new"), expected) <= 1e-4
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base_model(world.folder), back).eval()
        assert relative_error(loaded(torch.tensor([IDS])).logits[0].numpy(), expected) <= 1e-4
    again = adaptrt_cli("adapter", "combine", out, *sources, "--base", world.base)
    assert again.code == 1 and "exists; --force replaces it" in again.error


def test_the_command_refuses_an_adapter_file_that_cannot_be_lowered(world: World, tmp_path: Path) -> None:
    sound, odd = tmp_path / "sound.adrt", tmp_path / "odd.adrt"
    assert adaptrt_cli("convert", world.adapters[0], "-o", sound, "--base", world.base).code == 0
    with open_file(sound) as file:
        adapter = read_adapter(file, PREFIX + only_adapter(file))
        first = min(adapter.tensors)
        bytes_only = Tensor.from_numpy(np.zeros(adapter.tensors[first].shape, np.uint8))
        write_adapter_file(odd, replace(adapter, tensors={**adapter.tensors, first: bytes_only}))
    command = ["adapter", "combine", tmp_path / "new.adrt", odd, "--base", world.base]
    assert "is of dtype u8, expected f32" in adaptrt_cli(*command).error
    for text in ("[]", "{"):
        odd.unlink()
        write_adapter_file(odd, replace(adapter, config_text=text))
        assert f"its config is '{text}', expected JSON" in adaptrt_cli(*command).error
