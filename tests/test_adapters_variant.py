"""The seam for variants: what a page of Python may declare and return, and spec/adapters.md as written."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.adapters import edited, open_view, perturbed_peft
from helpers.oracle import SHAPES, llama_folder
from helpers.tiny import convert_model

import adaptrt
from adaptrt.adapters.base import BaseView
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import any_value
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import read_adapter, write_adapter
from adaptrt.adapters.variant import Target, Variant
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdapterError
from adaptrt.format import Writer, open_file
from adaptrt.tensor import Tensor


class World:
    """A base with biases and any PEFT folder of it."""

    def __init__(self, path: Path) -> None:
        hf = llama_folder(path / "hf", **SHAPES["biases"])
        self.view: BaseView = open_view(convert_model(hf, path / "base.adrt", dtype="f32", head="f32"))
        self.folder = perturbed_peft(path / "a", hf, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class GainVariant(Variant):
    """y = g ⊙ (W x + scale · u (P x)), P shared by all modules; a test spoils what `lower` returns."""

    name = "gain"
    options: ClassVar[Mapping[str, Any]] = {"gain_seed": any_value}
    params: ClassVar[Mapping[str, type]] = {"mode": str}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "gain": ("out",),
        "u": ("out", "rank"),
        "P": ("rank", "in"),
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "GAIN"

    def resolve(self, config: Any, module: Any, problems: Any) -> Any:
        if config.get("gain_seed") == 13:
            problems.add("seed 13 is unlucky")
        return {"mode": "out"}, {"gain": "gain_vector", "u": "gain_u", "P": "base_model.gain_P"}

    def lower(self, params: Any, tensors: Mapping[str, Tensor], base: Any) -> Lowered:
        gain = tensors["gain"].data.view(np.float32)
        return self.spoil(Lowered((LowRank(tensors["u"], tensors["P"]),), g_out=gain))

    def spoil(self, lowered: Lowered) -> Lowered:
        return lowered


def gain_folder(world: World, path: Path, **config: Any) -> Path:
    """A PEFT folder of the method above for the two q_proj, with biases replaced as any method may."""
    modules = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    tensors = {"base_model.gain_P": torch.randn(3, 64)}
    for module in modules:
        tensors |= {f"{module}.gain_vector": torch.randn(64), f"{module}.gain_u": torch.randn(64, 3)}
        tensors[f"{module}.base_layer.bias"] = torch.randn(64)
    return edited(world.folder, path, {"peft_type": "GAIN", "bias": "gain_only"} | config, lambda _: tensors)


def only_known(folder: Path) -> Path:
    """Take LoRA's options out of the folder's config."""
    path = folder / "adapter_config.json"
    known = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key in ("peft_type", "bias", "gain_seed")
    }
    path.write_text(json.dumps(known))
    return folder


def test_a_page_of_python_is_a_variant(world: World, tmp_path: Path) -> None:
    """Shared tensors are one object, biases come for free, and storage keeps all of it."""
    variants = {"gain": GainVariant()}
    adapter = import_peft(only_known(gain_folder(world, tmp_path / "g")), variants, world.view)
    with Writer(tmp_path / "g.adrt", {}) as writer:
        write_adapter(writer, adapter)
    with open_file(tmp_path / "g.adrt") as file:
        lowered = lower(read_adapter(file, "adapter/g"), variants, world.view, 0.5)
    assert sorted(lowered) == ["blk.0.attn_q", "blk.1.attn_q"]
    first, second = lowered["blk.0.attn_q"], lowered["blk.1.attn_q"]
    assert first.terms[0].v is second.terms[0].v and first.terms[0].u is not second.terms[0].u
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    old, new = world.view.targets["blk.0.attn_q"].bias(), adapter.tensors[name].data.view(np.float32)
    assert first.c is not None and old is not None
    np.testing.assert_allclose(first.c, 0.5 * (new - old), rtol=1e-6)


def test_a_variant_can_refuse_a_module(world: World, tmp_path: Path) -> None:
    folder = only_known(gain_folder(world, tmp_path / "g", gain_seed=13))
    with pytest.raises(
        AdapterError, match=r"model.layers.0.self_attn.q_proj: seed 13 is unlucky \(and 1 more like it\)"
    ):
        import_peft(folder, {"gain": GainVariant()}, world.view)


SPOILT: dict[str, Callable[[Lowered], Lowered]] = {
    "U0 is [3, 64], expected [64, 3]": lambda low: replace(
        low, terms=(replace(low.terms[0], u=low.terms[0].v),)
    ),
    "V0 is [64, 3], expected [rank, 64]": lambda low: replace(
        low, terms=(replace(low.terms[0], v=low.terms[0].u),)
    ),
    "d0 is [2], expected [3]": lambda low: replace(
        low, terms=(replace(low.terms[0], d=np.ones(2, np.float32)),)
    ),
    "scale0 is nan": lambda low: replace(low, terms=(replace(low.terms[0], scale=float("nan")),)),
    "g_out is [3], expected [64]": lambda low: replace(low, g_out=np.ones(3, np.float32)),
    "g_in is [1, 64], expected [64]": lambda low: replace(low, g_in=np.ones((1, 64), np.float32)),
    "g_out is not all finite float32": lambda low: replace(low, g_out=np.full(64, np.inf, np.float32)),
    "c is not all finite float32": lambda low: replace(low, c=np.ones(64)),
    "U0 is of dtype i32": lambda low: replace(
        low, terms=(replace(low.terms[0], u=Tensor.from_numpy(np.ones((64, 3), np.int32))),)
    ),
}


def test_what_a_variant_returns_is_checked(world: World, tmp_path: Path) -> None:
    variant = GainVariant()
    folder = only_known(edited(gain_folder(world, tmp_path / "g"), tmp_path / "h"))
    adapter = import_peft(folder, {"gain": variant}, world.view)
    for expected, spoil in SPOILT.items():
        if expected.startswith("c "):
            adapter = replace(adapter, targets=tuple(without_bias(target) for target in adapter.targets))
        variant.spoil = spoil  # type: ignore[method-assign]
        with pytest.raises(AdapterError, match=r"lowered by variant gain: ") as caught:
            lower(adapter, {"gain": variant}, world.view, 1.0)
        assert f"blk.0.attn_q: {expected}" in str(caught.value)


def without_bias(target: Target) -> Target:
    return replace(
        target, tensors={role: name for role, name in target.tensors.items() if role != "replaced_bias"}
    )


def test_the_spec_says_what_the_code_does() -> None:
    path = Path(adaptrt.__file__).parents[1] / "spec" / "adapters.md"
    if not path.exists():
        pytest.skip("spec/adapters.md is not beside the package: this is an installed adaptrt")
    failed, run = doctest.testfile(str(path), module_relative=False)
    assert run > 15 and failed == 0
