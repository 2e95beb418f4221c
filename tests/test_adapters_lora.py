"""LoRA and rsLoRA against PEFT itself: every module's output under one adapter and under stacks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import base_model, open_view, perturbed_peft
from helpers.oracle import SHAPES, llama_folder
from helpers.tiny import convert_model
from numpy.typing import NDArray
from peft import MontecloraConfig, PeftModel, VeloraConfig
from peft.tuners.lora import LoraLayer

from adaptrt.adapters.base import BaseTarget, BaseView
from adaptrt.adapters.normal import Lowered, LoweredAdapter
from adaptrt.adapters.stack import lower
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdapterError
from adaptrt.plugins import load_registry
from adaptrt.quant.plain import to_float32

VARIANTS = load_registry().variants
ENDS = ["embed_tokens", "lm_head"]

# name → (base, LoraConfig options); `dtype` is what the tensors are stored in
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rank 1": ("gqa", {"r": 1}),
    "rank 3": ("gqa", {"r": 3, "lora_alpha": 7}),
    "rank 16": ("gqa", {"r": 16, "lora_alpha": 4}),
    "bf16": ("gqa", {"dtype": torch.bfloat16}),
    "f16": ("gqa", {"dtype": torch.float16}),
    "rsLoRA": ("gqa", {"use_rslora": True, "r": 3}),
    "rank pattern": ("gqa", {"rank_pattern": {"q_proj": 5, r"model.layers.1.mlp.*": 2}}),
    "alpha pattern": ("gqa", {"alpha_pattern": {r"layers\.0\..*_proj": 3, "k_proj": 40, "down_proj": 0.5}}),
    "pattern that is no whole name": (
        "gqa",
        {"rank_pattern": {"proj": 2, "0.self_attn.k_proj": 6, "ayers.1.mlp.up_proj": 9}},
    ),
    "both patterns, rsLoRA": (
        "gqa",
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "one module": ("gqa", {"target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "embedding and head": ("gqa", {"target_modules": [*ENDS, "q_proj"]}),
    "embedding and head, bf16": ("gqa", {"target_modules": ENDS, "dtype": torch.bfloat16}),
    "tied head": ("tied", {"target_modules": ["lm_head", "up_proj"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"]}),
    "tied together": ("tied", {"target_modules": ENDS, "ensure_weight_tying": True}),
    "lora_bias": ("biases", {"lora_bias": True, "use_rslora": True}),
    "bias all": ("biases", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "bias lora_only": (
        "biases",
        {"bias": "lora_only", "lora_bias": True, "target_modules": ["v_proj", "up_proj"]},
    ),
    "gaussian": ("gqa", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("gqa", {"init_lora_weights": "orthogonal"}),
    "mica": ("gqa", {"init_lora_weights": "mica"}),
    "velora": ("gqa", {"velora_config": VeloraConfig(num_groups=4), "target_modules": ["q_proj"]}),
    "monteclora": ("gqa", {"monteclora_config": MontecloraConfig(), "target_modules": ["q_proj"]}),
    "fan_in_fan_out": ("gqa", {"fan_in_fan_out": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, BaseView]]:
    """Hugging Face folder and converted base, in float32 so that PEFT runs on the same weights."""
    found = {}
    for shape in ("gqa", "biases", "tied"):
        path = tmp_path_factory.mktemp(shape)
        folder = llama_folder(path / "hf", **SHAPES[shape])
        found[shape] = folder, open_view(convert_model(folder, path / "base.adrt", dtype="f32", head="f32"))
    return found


def peft_model(base: Path, stack: Sequence[tuple[Path, float]]) -> Any:
    """PEFT's own multi-adapter model in float32, each adapter at its scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = base_model(base)
        for index, (folder, _) in enumerate(stack):
            if index == 0:
                model = PeftModel.from_pretrained(model, folder, adapter_name="a0")
            else:
                model.load_adapter(folder, adapter_name=f"a{index}")
        model.base_model.set_adapter([f"a{index}" for index in range(len(stack))])
    for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for index, (_, scale) in enumerate(stack):
            if f"a{index}" in module.scaling:
                module.set_scale(f"a{index}", scale)
    return model.eval()


def outputs(base: BaseTarget, stack: Sequence[Lowered], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """W x + b + Σ scale · U (V x) + c in float64; an embedding's x is one-hot."""
    weight = to_float32(base.file.tensor("base", base.weight_name)).astype(np.float64)
    y = x @ (weight if base.kind == "embedding" else weight.T)
    bias = base.bias()
    y = y + (0 if bias is None else bias)
    for lowered in stack:
        for term in lowered.terms:
            u, v = (to_float32(t).astype(np.float64) for t in (term.u, term.v))
            y = y + term.scale * ((x @ v.T) @ u.T)
        y = y + (0 if lowered.c is None else lowered.c)
    return y


def adapted(view: BaseView) -> dict[str, BaseTarget]:
    """Modules that LoRA can act on, by path."""
    return {path: base for path, base in view.modules.items() if base.kind != "norm"}


def compare(view: BaseView, model: Any, stack: Sequence[LoweredAdapter]) -> int:
    """Check every attach point's output against PEFT's module; returns how many the stack changes."""
    rng, changed = np.random.default_rng(0), 0
    for path, base in adapted(view).items():
        module = model.base_model.model.get_submodule(path)
        if base.kind == "embedding":
            ids = rng.integers(0, base.shape[0], 9)
            x = np.eye(base.shape[0], dtype=np.float32)[ids]
            given = torch.from_numpy(ids)
        else:
            x = rng.standard_normal((9, base.shape[1])).astype(np.float32)
            given = torch.from_numpy(x)
        with torch.no_grad():
            expected = module(given).numpy()
        here = [adapter[base.target] for adapter in stack if base.target in adapter]
        found, plain = outputs(base, here, x), outputs(base, [], x)
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), path
        changed += bool(np.linalg.norm(plain - expected) > 1e-2 * np.linalg.norm(expected))
    return changed


def load(folder: Path, view: BaseView, scale: float = 1.0) -> LoweredAdapter:
    return lower(import_peft(folder, VARIANTS, view), VARIANTS, view, scale)


@pytest.mark.parametrize("case", CASES)
def test_every_module_gives_what_peft_gives(
    case: str, bases: Mapping[str, tuple[Path, BaseView]], tmp_path: Path
) -> None:
    shape, options = CASES[case]
    base, view = bases[shape]
    folder = perturbed_peft(tmp_path / "a", base, **options)
    lowered = load(folder, view)
    assert compare(view, peft_model(base, [(folder, 1.0)]), [lowered]) == len(lowered) > 0


def test_the_scale_multiplies_the_product_and_lora_bias(
    bases: Mapping[str, tuple[Path, BaseView]], tmp_path: Path
) -> None:
    base, view = bases["biases"]
    folder = perturbed_peft(tmp_path / "a", base, lora_bias=True, use_rslora=True)
    for scale in (0.3, -2.0):
        assert compare(view, peft_model(base, [(folder, scale)]), [load(folder, view, scale)])


def test_a_replaced_bias_is_interpolated_by_the_scale(
    bases: Mapping[str, tuple[Path, BaseView]], tmp_path: Path
) -> None:
    base, view = bases["biases"]
    folder = perturbed_peft(tmp_path / "a", base, bias="all", target_modules=["q_proj"])
    whole, half = (load(folder, view, scale)["blk.1.ffn_up"].c for scale in (1.0, 0.5))
    model = peft_model(base, [(folder, 1.0)])
    new = model.base_model.model.get_submodule("model.layers.1.mlp.up_proj").bias.detach().numpy()
    old = view.targets["blk.1.ffn_up"].bias()
    assert whole is not None and half is not None and old is not None
    np.testing.assert_allclose(old + whole, new, atol=1e-7)
    np.testing.assert_allclose(old + half, (old + new) / 2, atol=1e-7)


def test_stacks_of_three_match_peft_in_any_order(
    bases: Mapping[str, tuple[Path, BaseView]], tmp_path: Path
) -> None:
    base, view = bases["gqa"]
    folders = [
        perturbed_peft(tmp_path / "plain", base, 1),
        perturbed_peft(tmp_path / "rs", base, 2, use_rslora=True, r=3, target_modules=["q_proj", *ENDS]),
        perturbed_peft(
            tmp_path / "pattern", base, 3, rank_pattern={"up_proj": 9}, alpha_pattern={"q_proj": 1}
        ),
    ]
    for order, scales in (((0, 1, 2), (1.0, 0.5, -1.5)), ((2, 0, 1), (0.25, 2.0, 1.0))):
        stack = [(folders[i], scale) for i, scale in zip(order, scales, strict=True)]
        lowered = [load(folder, view, scale) for folder, scale in stack]
        assert compare(view, peft_model(base, stack), lowered) == len(adapted(view))


def test_scale_zero_has_no_effect_and_a_scale_that_is_not_finite_is_refused(
    bases: Mapping[str, tuple[Path, BaseView]], tmp_path: Path
) -> None:
    base, view = bases["gqa"]
    adapter = import_peft(perturbed_peft(tmp_path / "a", base), VARIANTS, view)
    assert lower(adapter, VARIANTS, view, 0.0) == {}
    for scale in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match=f"adapter 'a': scale is {scale}, expected a finite number"):
            lower(adapter, VARIANTS, view, scale)
    with pytest.raises(AdapterError, match=r"blk.0.attn_q: scale0 is .*e\+39, expected a finite float32"):
        lower(adapter, VARIANTS, view, 1e39)


def test_tensors_are_kept_as_stored_and_the_folder_names_the_adapter(
    bases: Mapping[str, tuple[Path, BaseView]], tmp_path: Path
) -> None:
    base, view = bases["gqa"]
    folder = perturbed_peft(tmp_path / "voice", base, dtype=torch.bfloat16, target_modules=["embed_tokens"])
    adapter = import_peft(folder, VARIANTS, view)
    assert (adapter.name, adapter.variant) == ("voice", "lora")
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {"bf16"}
    assert adapter.config_text == (folder / "adapter_config.json").read_text()
    assert adapter.notes == ("model.embed_tokens.base_layer.weight left out: a frozen copy of the base",)
    [target] = adapter.targets
    assert target.target == "token_embd"
    assert target.params == {"rank": 4, "scale": 2.0}
