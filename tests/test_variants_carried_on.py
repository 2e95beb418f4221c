"""What is done for every variant without knowing it: storage in other dtypes, export to PEFT, merging."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import open_view
from helpers.cli import adaptrt_cli
from helpers.oracle import llama_folder, relative_error
from helpers.tiny import convert_model
from helpers.variant_cases import CASES
from helpers.variant_oracle import VariantOracle, load

import adaptrt
from adaptrt.adapters.base import BaseView
from adaptrt.adapters.stored import convert_tensors, is_factor
from adaptrt.convert.peft import import_peft
from adaptrt.convert.to_peft import export_peft
from adaptrt.errors import AdapterError
from adaptrt.plugins import load_registry
from adaptrt.quant.plain import to_float32

VARIANTS = load_registry().variants
IDS = np.random.default_rng(0).integers(0, 131, 24).tolist()


@dataclass
class World:
    base: Path
    view: BaseView
    oracle: VariantOracle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("world")
    folder = llama_folder(path / "hf", attention_bias=True, mlp_bias=True)
    base = convert_model(folder, path / "base.adrt", dtype="f32", head="f32")
    return World(base, open_view(base), VariantOracle(folder, base))


@pytest.fixture
def saved(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Path:
    return world.oracle.save(CASES[request.param], tmp_path / "a", 0)


@pytest.mark.parametrize("saved", CASES, indirect=True)
def test_every_variant_merges_and_goes_back_to_peft(saved: Path, world: World, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = world.oracle.logits(IDS, world.oracle.single(saved))
        adapter = import_peft(saved, VARIANTS, world.view)
        export_peft(adapter, VARIANTS, tmp_path / "back")
        found = world.oracle.logits(IDS, load(world.oracle.plain, tmp_path / "back"))
    assert relative_error(found, expected) <= 1e-6
    outcome = adaptrt_cli("merge", world.base, saved, "-o", tmp_path / "m.adrt")
    assert outcome.code == 0, outcome.err
    with adaptrt.load(tmp_path / "m.adrt", "cpu", precision="exact", kv_dtype="f32") as model:
        assert relative_error(model.logits(IDS), expected) <= 1e-4


@pytest.mark.parametrize("saved", CASES, indirect=True)
def test_every_variant_computes_with_quantized_factors(saved: Path, world: World, tmp_path: Path) -> None:
    """As int8 its logits stay near, and exported they are those of the export, whatever the variant does with them."""
    adapter = import_peft(saved, VARIANTS, world.view)
    variant = VARIANTS[adapter.variant]
    if not any(is_factor(dims) for dims in variant.roles.values()):
        with pytest.raises(AdapterError, match="has no tensors to store as int8"):
            convert_tensors(adapter, variant, "int8")
        return
    packed = convert_tensors(adapter, variant, "int8")
    export_peft(packed, VARIANTS, tmp_path / "back")
    unpacked = import_peft(tmp_path / "back", VARIANTS, world.view)
    assert any(tensor.dtype == "int8" for tensor in packed.tensors.values())
    with adaptrt.load(world.base, "cpu", precision="exact", kv_dtype="f32") as model:
        for name, one in (("a", adapter), ("packed", packed), ("unpacked", unpacked)):
            model._adapters.add(name, one)
        exact, rounded, again = (model.logits(IDS, name) for name in ("a", "packed", "unpacked"))
        assert relative_error(rounded, again) <= 1e-5
        assert 0 < relative_error(rounded, exact) < 0.1
    for name, tensor in packed.tensors.items():
        assert tensor.dtype != "int8" or np.isfinite(to_float32(tensor)).all(), name
