"""What any adapter may carry (replaced modules, token rows, biases) against PEFT: logits of whole models."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import Tensors, base_model, edit_tensors, edited, open_view, perturbed_peft
from helpers.oracle import SHAPES, Oracle, llama_folder, relative_error
from helpers.tiny import convert_model
from peft import TrainableTokensConfig, get_peft_model

import adaptrt
from adaptrt.adapters.normal import LowRank
from adaptrt.adapters.stack import lower
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdaptrtError
from adaptrt.plugins import load_registry

IDS = [1, 5, 9, 100, 5, 2, 77, 1, 30, 12]
NORMS = ["norm", "input_layernorm", "post_attention_layernorm"]

# name → (base, LoraConfig options): what the adapter carries beside LoRA on q_proj
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("gqa", {"modules_to_save": NORMS}),
    "head": ("gqa", {"modules_to_save": ["lm_head"]}),
    "embedding": ("gqa", {"modules_to_save": ["embed_tokens"]}),
    "linear layers": ("gqa", {"modules_to_save": ["k_proj", "layers.1.mlp.down_proj"]}),
    "modules of modules": (
        "biases",
        {
            "modules_to_save": ["layers.0.mlp", "layers.1.self_attn"],
            "target_modules": ["gate_proj"],
            "layers_to_transform": [1],
        },
    ),
    "linear layers and their biases": ("biases", {"modules_to_save": ["k_proj", "up_proj"]}),
    "tied embedding alone": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied head alone": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied together": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "token rows": ("gqa", {"trainable_token_indices": [5, 1, 77]}),
    "rows of both": ("gqa", {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}),
    "rows of the head": ("gqa", {"trainable_token_indices": {"lm_head": [3, 0]}}),
    "tied rows": ("tied", {"trainable_token_indices": [5, 1, 77]}),
    "tied rows by both names": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    ),
    "tied base, other rows": ("tied", {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}),
    "tied rows beside LoRA on the head": (
        "tied",
        {"trainable_token_indices": [5, 1, 77], "target_modules": ["q_proj", "lm_head"]},
    ),
    "everything": (
        "biases",
        {"modules_to_save": [*NORMS, "lm_head"], "trainable_token_indices": [9, 1], "bias": "all"},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Oracle]]:
    found = {}
    for shape in ("gqa", "biases", "tied"):
        path = tmp_path_factory.mktemp(shape)
        folder = llama_folder(path / "hf", **SHAPES[shape])
        adrt = convert_model(folder, path / "base.adrt")
        found[shape] = folder, adrt, Oracle(folder, adrt)
    return found


def peft_logits(oracle: Oracle, folder: Path) -> np.ndarray:
    """PEFT's logits, on a copy of the model: what replaces its modules is not easily undone."""
    fresh = copy.copy(oracle)
    fresh.model = copy.deepcopy(oracle.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fresh.logits(IDS, [(folder, 1.0)])


@pytest.mark.parametrize("case", CASES)
def test_replacements_act_as_in_peft(case: str, bases: dict[str, Any], tmp_path: Path) -> None:
    shape, options = CASES[case]
    folder, adrt, oracle = bases[shape]
    adapter = perturbed_peft(tmp_path / "a", folder, **{"target_modules": ["q_proj"]} | options)
    expected = peft_logits(oracle, adapter)
    for backend in ("reference", "cpu"):
        with adaptrt.load(adrt, backend, precision="exact", kv_dtype="f32") as model:
            model.load_adapter(adapter)
            assert relative_error(model.logits(IDS, "a"), expected) <= 1e-4
    with adaptrt.load(adrt, "reference", kv_dtype="f32") as model:
        assert relative_error(model.logits(IDS), expected) > 0.05


def test_a_replaced_head_is_neither_widened_nor_copied(bases: dict[str, Any], tmp_path: Path) -> None:
    folder, adrt, _ = bases["gqa"]
    perturbed_peft(tmp_path / "a", folder, target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit_tensors(tmp_path / "a", lambda ts: {name: tensor.bfloat16() for name, tensor in ts.items()})
    view, variants = open_view(adrt), load_registry().variants
    adapter = import_peft(tmp_path / "a", variants, view)
    new, old = lower(adapter, variants, view, 0.5)["output"].terms
    assert isinstance(new, LowRank) and isinstance(old, LowRank)
    assert new.v is adapter.tensors["base_model.model.lm_head.weight"] and new.v.dtype == "bf16"
    assert old.v is view.weights()["output.weight"]


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_embeddings_saved_beside_the_adapter_take_the_base_s_place_unless_they_are_the_base_s(
    shape: str, bases: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT's `save_embedding_layers`, which it turns on by itself for a resized vocabulary."""
    folder, adrt, oracle = bases[shape]
    plain = perturbed_peft(tmp_path / "plain", folder, target_modules=["q_proj"])
    same = base_model(folder).state_dict()
    table = torch.randn_like(same["model.embed_tokens.weight"])
    names = {"model.embed_tokens": table, "lm_head": table if shape == "tied" else torch.randn_like(table)}
    prefix = "base_model.model."

    def with_ends(weights: dict[str, torch.Tensor]) -> Callable[[Tensors], Tensors]:
        return lambda tensors: tensors | {f"{prefix}{name}.weight": w.clone() for name, w in weights.items()}

    frozen = {name: same[f"{name}.weight"] for name in names}
    with adaptrt.load(adrt, "cpu", precision="exact", kv_dtype="f32") as model:
        model.load_adapter(plain)
        model.load_adapter(edited(plain, tmp_path / "frozen", tensors=with_ends(frozen)))
        assert np.array_equal(model.logits(IDS, "plain"), model.logits(IDS, "frozen"))
        assert sum("the base holds it already" in note for note in model.adapters["frozen"].notes) == 2
        for count in (1, 2):
            trained = with_ends(dict(list(names.items())[:count]))
            new = edited(plain, tmp_path / f"new{count}", tensors=trained)
            model.load_adapter(new)
            assert relative_error(model.logits(IDS, new.name), peft_logits(oracle, new)) <= 1e-4
        broken = with_ends({"lm_head": table * float("nan")})
        with pytest.raises(AdaptrtError, match=r"lm_head.weight holds NaN or infinity"):
            model.load_adapter(edited(plain, tmp_path / "broken", tensors=broken))


ENDS = ["embed_tokens", "lm_head"]
SAVED_WITH_ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "both replaced": ("gqa", {"modules_to_save": ENDS}),
    "tied and replaced": ("tied", {"modules_to_save": ENDS}),
    "one adapted, one replaced": (
        "gqa",
        {"target_modules": ["q_proj", ENDS[0]], "modules_to_save": ENDS[1:]},
    ),
    "rows": ("gqa", {"trainable_token_indices": [5, 1, 77]}),
    "tied rows": ("tied", {"trainable_token_indices": [5, 1, 77]}),
    "rows of both": ("gqa", {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}),
}


@pytest.fixture(scope="module")
def saved_with_ends(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Oracle]]:
    """An adapter, its base in float32 (PEFT puts the saved copy in the base's place) and the oracle, by case."""

    @cache
    def world(shape: str) -> tuple[Path, Path, Oracle]:
        folder = llama_folder(tmp_path_factory.mktemp(shape) / "hf", **SHAPES[shape])
        adrt = convert_model(folder, folder.parent / "base.adrt", dtype="f32", head="f32")
        return folder, adrt, Oracle(folder, adrt)

    @cache
    def made(case: str) -> tuple[Path, Path, Oracle]:
        shape, options = SAVED_WITH_ENDS[case]
        folder, adrt, oracle = world(shape)
        out = tmp_path_factory.mktemp("adapter") / "a"
        perturbed_peft(out, folder, save_embeddings=True, **{"target_modules": ["q_proj"]} | options)
        return out, adrt, oracle

    return made


@pytest.mark.parametrize("case", SAVED_WITH_ENDS)
def test_all_that_peft_saves_of_a_resized_vocabulary_is_understood(
    case: str, saved_with_ends: Callable[[str], tuple[Path, Path, Oracle]]
) -> None:
    """`save_embedding_layers` saves frozen copies of the base, and what was replaced once more."""
    folder, adrt, oracle = saved_with_ends(case)
    with adaptrt.load(adrt, "cpu", precision="exact", kv_dtype="f32") as model:
        model.load_adapter(folder)
        assert relative_error(model.logits(IDS, "a"), peft_logits(oracle, folder)) <= 1e-4
        assert relative_error(model.logits(IDS), peft_logits(oracle, folder)) > 0.05


def edit_row(name: str, row: int) -> Callable[[Tensors], Tensors]:
    """Another value of one row of the tensor whose name ends so."""

    def edit(tensors: Tensors) -> Tensors:
        (key,) = [key for key in tensors if key.endswith(name)]
        changed = tensors[key].clone()
        changed[row] += 1
        return tensors | {key: changed}

    return edit


@pytest.mark.parametrize(("case", "tensor", "row", "expected"), [
    ("rows", "embed_tokens.token_adapter.base_layer.weight", 130, "differs from the base by .* in row 130"),
    ("tied rows", "lm_head.token_adapter.trainable_tokens_delta", 0, "which it is tied to"),
    ("both replaced", "lm_head.modules_to_save.weight", 2, "lm_head.weight and lm_head.modules_to_save.weight differ"),
])  # fmt: skip
def test_a_second_copy_that_says_something_else_is_refused(
    case: str,
    tensor: str,
    row: int,
    expected: str,
    saved_with_ends: Callable[[str], tuple[Path, Path, Oracle]],
    tmp_path: Path,
) -> None:
    folder, adrt, _ = saved_with_ends(case)
    with adaptrt.load(adrt, "reference") as model, pytest.raises(AdaptrtError, match=expected):
        model.load_adapter(edited(folder, tmp_path / "a", tensors=edit_row(tensor, row)))


def test_a_frozen_copy_may_differ_where_its_rows_are_replaced(
    saved_with_ends: Callable[[str], tuple[Path, Path, Oracle]], tmp_path: Path
) -> None:
    """New tokens start at random, so another resized base has other rows there."""
    folder, adrt, _ = saved_with_ends("rows")
    edit = edit_row("token_adapter.base_layer.weight", 77)
    with adaptrt.load(adrt, "reference") as model:
        model.load_adapter(folder)
        model.load_adapter(edited(folder, tmp_path / "b", tensors=edit))
        assert np.array_equal(model.logits(IDS, "a"), model.logits(IDS, "b"))


@pytest.mark.parametrize(("shape", "modules"), [
    ("gqa", None), ("gqa", ["embed_tokens", "lm_head"]), ("tied", None),
])  # fmt: skip
def test_trainable_tokens_are_a_method_of_their_own_too(
    shape: str, modules: list[str] | None, bases: dict[str, Any], tmp_path: Path
) -> None:
    _, adrt, oracle = bases[shape]
    config = TrainableTokensConfig(token_indices=[5, 1, 77], target_modules=modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(oracle.model), config).eval()
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.copy_(torch.randn_like(parameter))
            expected = peft(torch.tensor([IDS])).logits[0].numpy()
        peft.save_pretrained(tmp_path / "a")
    with adaptrt.load(adrt, "cpu", precision="exact", kv_dtype="f32") as model:
        model.load_adapter(tmp_path / "a")
        assert relative_error(model.logits(IDS, "a"), expected) <= 1e-4
        assert relative_error(model.logits(IDS), expected) > 0.05


def test_the_scale_interpolates_what_is_replaced(bases: dict[str, Any], tmp_path: Path) -> None:
    """At scale s the value in use is old + s · (new - old), here put into the oracle's weights by hand."""
    folder, adrt, oracle = bases["gqa"]
    adapter = perturbed_peft(
        tmp_path / "a",
        folder,
        target_modules=["q_proj"],
        modules_to_save=[*NORMS, "lm_head", "k_proj"],
        trainable_token_indices=[9, 1],
    )
    half = edited(adapter, tmp_path / "half", {"lora_alpha": 4})
    old = {name: p.detach().clone() for name, p in oracle.model.named_parameters()}

    def interpolate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mixed = dict(tensors)
        for key, new in tensors.items():
            name = key.removeprefix("base_model.model.")
            if name in old:
                mixed[key] = (old[name] + new) / 2
            elif "trainable_tokens" in name:
                mixed[key] = (old["model.embed_tokens.weight"][[9, 1]] + new) / 2
        return mixed

    half = edited(half, tmp_path / "halved", tensors=interpolate)
    with adaptrt.load(adrt, "reference", kv_dtype="f32") as model:
        model.load_adapter(adapter)
        assert relative_error(model.logits(IDS, {"a": 0.5}), peft_logits(oracle, half)) <= 1e-4


def test_a_norm_that_was_zero_cannot_be_anything_else(bases: dict[str, Any], tmp_path: Path) -> None:
    def zero_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: torch.zeros_like(t) if t.ndim == 1 else t for key, t in tensors.items()}

    folder, _, _ = bases["gqa"]
    shutil_base = edited_base(folder, tmp_path / "zero")
    adrt = convert_model(shutil_base, tmp_path / "zero.adrt", dtype="f32", head="f32")
    adapter = perturbed_peft(tmp_path / "a", folder, target_modules=["q_proj"], modules_to_save=["norm"])
    with adaptrt.load(adrt, "reference") as model:
        with pytest.raises(AdaptrtError, match=r"model.norm.weight is not 0 at 3, where the base's norm is"):
            model.load_adapter(adapter)
        model.load_adapter(edited(adapter, tmp_path / "b", tensors=zero_one))


def edited_base(folder: Path, out: Path) -> Path:
    """The model with one zero in its last norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = 0
    model.save_pretrained(out)
    return out


def test_rows_do_not_go_beside_a_method_that_needs_the_weight(bases: dict[str, Any], tmp_path: Path) -> None:
    folder, adrt, _ = bases["tied"]
    options = {"trainable_token_indices": [5, 1], "target_modules": ["lm_head"], "use_dora": True}
    adapter = perturbed_peft(tmp_path / "a", folder, **options)
    with (
        adaptrt.load(adrt, "reference") as model,
        pytest.raises(
            AdaptrtError, match="trainable_tokens_delta replaces what other tensors of the target change"
        ),
    ):
        model.load_adapter(adapter)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "module that is not there": (
        {"modules_to_save": ["lm_head", "classifier"]},
        "the weights hold no module 'classifier'",
    ),
    "names": ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head': expected a list of names"),
    "row beyond": (
        {"trainable_token_indices": [5, 131]},
        "replaces rows '5 131', expected different ones from 0 to 130",
    ),
    "row below": (
        {"trainable_token_indices": [-1, 5]},
        "trainable_tokens_delta is [2, 256], expected [0, 256]",
    ),
    "row twice": ({"trainable_token_indices": [5, 5]}, "replaces rows '5 5', expected different ones"),
    "count": ({"trainable_token_indices": [5]}, "trainable_tokens_delta is [2, 256], expected [1, 256]"),
    "no rows": ({"trainable_token_indices": {"lm_head": [5]}}, "the weights hold no token_adapter."),
    "types": ({"trainable_token_indices": ["5"]}, "expected a list of token ids, or an object of them"),
    "forgotten": ({"trainable_token_indices": None}, "trainable_tokens_delta is not understood"),
    "not saved": ({"modules_to_save": ["lm_head"]}, "o_proj.weight is not understood by variant lora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, bases: dict[str, Any], tmp_path: Path) -> None:
    folder, adrt, _ = bases["gqa"]
    config, expected = REFUSED[case]
    adapter = perturbed_peft(
        tmp_path / "a",
        folder,
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "0.self_attn.o_proj"],
        trainable_token_indices=[5, 1],
    )
    with (
        adaptrt.load(adrt, "reference") as model,
        pytest.raises(AdaptrtError, match=re.escape(expected)),
    ):
        model.load_adapter(edited(adapter, tmp_path / "b", config))


def test_a_resized_vocabulary_is_refused_saying_what_to_do(bases: dict[str, Any], tmp_path: Path) -> None:
    folder, adrt, _ = bases["gqa"]
    adapter = perturbed_peft(tmp_path / "a", folder, target_modules=["q_proj"], modules_to_save=["lm_head"])

    def longer(tensors: Tensors) -> Tensors:
        return {n: torch.cat([t, t[:5]]) if "lm_head" in n else t for n, t in tensors.items()}

    with (
        adaptrt.load(adrt, "reference") as model,
        pytest.raises(
            AdaptrtError, match=r"lm_head.weight is \[136, 256\].*resize the base's as training did"
        ),
    ):
        model.load_adapter(edited(adapter, tmp_path / "b", tensors=longer))
