"""What single variants promise beside parity: shared projections, streamed norms, and refusals by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adaptrt_vera import kaiming_uniform
from helpers.adapters import Tensors, edited, open_view
from helpers.oracle import llama_folder
from helpers.tiny import convert_model
from helpers.variant_cases import CASES, OPTIONS
from helpers.variant_oracle import VariantOracle
from numpy.typing import NDArray
from peft.tuners.vera.model import _kaiming_init
from safetensors.torch import load_file, save_file

import adaptrt
from adaptrt.adapters import variant as variant_module
from adaptrt.adapters.base import BaseTarget, BaseView
from adaptrt.adapters.normal import LowRank
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import read_adapter, write_adapter
from adaptrt.adapters.stored import without_derived
from adaptrt.adapters.variant import Adapter
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdapterError
from adaptrt.format import Writer, open_file
from adaptrt.plugins import load_registry
from adaptrt.quant.plain import to_float32

VARIANTS = load_registry().variants
A = "base_model.vera_A"


@dataclass
class World:
    """A quantized base and PEFT folders of it, each made when first asked for."""

    path: Path
    adrt: Path
    view: BaseView
    oracle: VariantOracle

    def folder(self, name: str) -> Path:
        path = self.path / name
        return path if path.exists() else self.oracle.save((CASES | OPTIONS)[name], path, seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("variants")
    hf = llama_folder(path / "hf")
    adrt = convert_model(hf, path / "base.adrt")
    return World(path, adrt, open_view(adrt), VariantOracle(hf, adrt))


def lowered(world: World, folder: Path, scale: float = 1.0) -> Any:
    return lower(import_peft(folder, VARIANTS, world.view), VARIANTS, world.view, scale)


@pytest.mark.parametrize(("rows", "cols", "key"), [(3, 64, 0), (500, 7, 7), (1, 1, -7), (16, 160, 2**40 + 3)])
def test_vera_draws_the_projections_that_torch_draws(rows: int, cols: int, key: int) -> None:
    torchs, ours = torch.Generator().manual_seed(key), np.random.RandomState(key & 0xFFFFFFFF)
    for shape in ((rows, cols), (cols, rows)):
        found = to_float32(kaiming_uniform(ours, *shape))
        assert np.array_equal(found, _kaiming_init(shape, torchs).numpy())


def test_vera_projections_that_were_not_saved_are_stored_and_noted(world: World, tmp_path: Path) -> None:
    folder = world.folder("VeRA, projections not saved")
    adapter = import_peft(folder, VARIANTS, world.view)
    assert adapter.tensors[A].shape == (16, 160)
    assert f"{A} is not in the folder; variant vera computed it" in adapter.notes
    huge = edited(folder, tmp_path / "huge", {"r": 10**9})
    with pytest.raises(AdapterError, match=f"{A} is missing"):
        import_peft(huge, VARIANTS, world.view)
    empty = edited(folder, tmp_path / "empty", tensors=lambda _: {})
    with pytest.raises(AdapterError, match="it adapts nothing"):
        import_peft(empty, VARIANTS, world.view)
    kept = edited(folder, tmp_path / "kept", {"save_projection": True})
    with pytest.raises(AdapterError, match="vera_A is missing"):
        import_peft(kept, VARIANTS, world.view)


def test_vera_projections_are_attached_once_for_all_modules_and_adapters(
    world: World, tmp_path: Path
) -> None:
    """Two adapters of one folder, one as PEFT saved it and one in our file, and another with other vectors."""
    folder = world.folder("VeRA")
    other = edited(folder, tmp_path / "other", tensors=halved_vectors)
    with Writer(tmp_path / "stored.adrt", {}) as writer:
        write_adapter(writer, import_peft(folder, VARIANTS, world.view, "stored"))
    with adaptrt.load(world.adrt, backend="reference") as model:
        for source in (folder, other, tmp_path / "stored.adrt"):
            model.load_adapter(source)
        attached = model._executable._executable.adapters.values()  # type: ignore[union-attr]
        terms = [low.terms[0] for adapter in attached for low in adapter.values()]
        assert len(terms) == 3 * 14
        assert len({id(term.u) for term in terms}) == len({id(term.v) for term in terms}) == 1
        assert len({term.d.tobytes() for term in terms}) > 14


def halved_vectors(tensors: Tensors) -> Tensors:
    return {name: tensor / 2 if "lambda" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["DoRA, embedding and head", "HRA"])
def test_the_base_is_read_in_blocks_of_rows(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end within a quantization group give what one block gives."""
    whole = lowered(world, world.folder(name))
    monkeypatch.setattr(variant_module, "BLOCK_VALUES", 7 * 64)
    for target, blocks in lowered(world, world.folder(name)).items():
        if name == "HRA":
            found, expected = (to_float32(low.terms[0].u) for low in (blocks, whole[target]))
        else:
            found, expected = blocks.g_out, whole[target].g_out
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def true_norm(world: World, adapter: Adapter, target: str, scale: float) -> NDArray[np.float64]:
    """‖W + scale · s · B A‖ of every output, in float64, from the whole weight."""
    (found,) = [one for one in adapter.targets if one.target == target]
    a, b = (to_float32(adapter.tensors[found.tensors[role]]).astype(np.float64) for role in "AB")
    weight = world.view.targets[target].weight().astype(np.float64)
    changed = (weight.T if target == "token_embd" else weight) + scale * float(found.params["scale"]) * b @ a
    return np.asarray(np.linalg.norm(changed, axis=1))


@pytest.mark.parametrize("target", ["blk.0.attn_q", "token_embd", "output"])
def test_dora_goes_over_the_base_once_at_import_whatever_the_scale(
    world: World, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = import_peft(world.folder("DoRA, embedding and head"), VARIANTS, world.view)
    plain = without_derived(adapter, VARIANTS["dora"])
    for scale in (1.0, -0.3):
        expected = 1 / true_norm(world, adapter, target, scale)
        for one in (adapter, plain):
            (found,) = [t for t in one.targets if t.target == target]
            m = to_float32(one.tensors[found.tensors["magnitude"]])
            gain = lower(one, VARIANTS, world.view, scale)[target].g_out
            np.testing.assert_allclose(gain / m, expected, rtol=1e-6)
    monkeypatch.delattr(BaseTarget, "rows")
    monkeypatch.delattr(BaseTarget, "weight")
    assert lower(adapter, VARIANTS, world.view, 0.7)
    with pytest.raises(AttributeError):
        lower(plain, VARIANTS, world.view, 0.7)


def test_hra_goes_over_the_base_once_at_import(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, name = import_peft(world.folder("HRA"), VARIANTS, world.view), "blk.0.attn_q"
    plain = without_derived(adapter, VARIANTS["hra"])
    (found,) = [target for target in adapter.targets if target.target == name]
    chain = np.eye(64)
    for u in to_float32(adapter.tensors[found.tensors["u"]]).astype(np.float64).T:
        chain = chain @ (np.eye(64) - 2 * np.outer(u, u) / (u @ u))
    expected = world.view.targets[name].weight().astype(np.float64) @ (chain - np.eye(64))
    for one in (adapter, plain):
        (term,) = lower(one, VARIANTS, world.view, 0.5)[name].terms
        assert isinstance(term, LowRank) and term.u is not None
        change = term.scale * to_float32(term.u) @ to_float32(term.v)
        np.testing.assert_allclose(change, 0.5 * expected, atol=1e-5)
    monkeypatch.delattr(BaseTarget, "rows")
    monkeypatch.delattr(BaseTarget, "weight")
    assert lower(adapter, VARIANTS, world.view, 0.7)
    with pytest.raises(AttributeError):
        lower(plain, VARIANTS, world.view, 0.7)


def test_what_was_derived_from_a_base_is_refused_without_that_base(world: World, tmp_path: Path) -> None:
    adapter = import_peft(world.folder("DoRA"), VARIANTS, world.view)
    with Writer(tmp_path / "a.adrt", {}) as writer:
        write_adapter(writer, adapter)
    with (
        open_file(tmp_path / "a.adrt") as file,
        pytest.raises(AdapterError, match="base is empty, expected the"),
    ):
        read_adapter(file, "adapter/DoRA")


def test_a_dora_that_nearly_cancels_the_base_keeps_its_digits(world: World, tmp_path: Path) -> None:
    """B A = -W + ε in all rows but one: ‖W‖² and its like would be rounded off."""
    name = "blk.0.attn_q"
    weight = torch.from_numpy(world.view.targets[name].weight().copy())
    q = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = {
        f"{q}lora_A.weight": torch.eye(64),
        f"{q}lora_B.weight": 1e-3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) - weight,
        f"{q}lora_magnitude_vector": torch.ones(64),
    }
    tensors[f"{q}lora_B.weight"][5] = 1
    folder = edited(world.folder("DoRA"), tmp_path / "a", {"r": 64, "lora_alpha": 64}, lambda _: tensors)
    adapter = import_peft(folder, VARIANTS, world.view)
    gain = lower(adapter, VARIANTS, world.view, 1.0)[name].g_out
    np.testing.assert_allclose(gain, 1 / true_norm(world, adapter, name, 1.0), rtol=1e-4)


def with_zeros(part: str) -> Any:
    return lambda tensors: {n: torch.zeros_like(t) if part in n else t for n, t in tensors.items()}


def with_shape(part: str, *shape: int) -> Any:
    return lambda tensors: {n: torch.ones(shape) if part in n else t for n, t in tensors.items()}


def without(part: str) -> Any:
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


def same(tensors: Tensors) -> Tensors:
    return tensors


REFUSED: list[tuple[str, dict[str, Any], Any, str]] = [
    (
        "DoRA",
        {"lora_bias": True},
        same,
        "option lora_bias = True: PEFT does not support it together with use_dora",
    ),
    (
        "DoRA",
        {"use_qalora": True},
        same,
        "no installed variant handles peft_type 'LORA' with use_dora, use_qalora",
    ),
    ("DoRA", {"layer_magic": 3}, same, "option layer_magic = 3: unknown option"),
    ("DoRA", {}, with_shape("magnitude", 3), "lora_magnitude_vector is [3], expected [64] (out)"),
    ("DoRA", {}, without("0.self_attn.q_proj.lora_magnitude"), "q_proj.lora_magnitude_vector is missing"),
    ("VeRA", {"r": 0}, same, "option r = 0: expected a whole number above 0"),
    (
        "VeRA",
        {"projection_prng_key": 1.5},
        same,
        "option projection_prng_key = 1.5: expected a whole number",
    ),
    ("VeRA", {}, with_shape("vera_A", 16, 63), "V0 is [16, 63], expected [rank, 64]"),
    ("VeRA", {"r": 8}, same, "base_model.vera_A is [16, 160], expected [8, 160] (rank, largest in)"),
    ("AdaLoRA", {"rank_pattern": {"q.lora_E": 3}}, same, "expected an object of lists of true and false"),
    ("AdaLoRA", {"init_r": 5}, same, "lora_A is [4, 64], expected [5, 64] (rank, in)"),
    ("AdaLoRA", {"use_dora": True}, same, "option use_dora = True: unknown option"),
    ("IA3", {}, with_shape("ia3_l", 1, 65), "ia3_l is [1, 65], expected [1, 64] (1, in)"),
    ("IA3", {}, with_shape("ia3_l", 65, 1), "ia3_l is [65, 1], expected [64, 1] (out, 1)"),
    ("HRA", {"apply_GS": "yes"}, same, "option apply_GS = 'yes': expected true or false"),
    ("HRA", {}, with_zeros("hra_u"), "HRA: a reflection's vector is zero, it has no direction"),
    ("DeLoRA", {"rank_pattern": {"q_proj": 0}}, same, "'q_proj': 0: expected a whole number above 0"),
    ("DeLoRA", {}, without("w_norm"), "delora_w_norm is missing"),
    (
        "LN tuning",
        {},
        with_shape("input_layernorm", 63),
        "ln_tuning_layers.weight is [63], expected [64]",
    ),
]


@pytest.mark.parametrize(("name", "config", "tensors", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_variant_cannot_honour_is_refused_by_name(
    world: World, tmp_path: Path, name: str, config: dict[str, Any], tensors: Any, message: str
) -> None:
    folder = edited(world.folder(name), tmp_path / "a", config, tensors)
    with pytest.raises(AdapterError) as caught:
        lowered(world, folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_weight_without_direction_and_a_norm_that_is_zero_are_refused(world: World, tmp_path: Path) -> None:
    """A base with a zero row under DoRA, and one with a zero in a norm under LN tuning."""
    hf = llama_folder(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][5] = 0
    tensors["model.norm.weight"][7] = 0
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    view = open_view(convert_model(hf, tmp_path / "base.adrt", dtype="f32"))
    still = edited(world.folder("DoRA"), tmp_path / "still", tensors=with_zeros("lora_B"))
    for folder, message in (
        (still, "DoRA: row 5 of the changed weight is zero, it has no direction"),
        (world.folder("LN tuning"), "output_norm: .* is not 0 at 7, where the base's norm is"),
    ):
        with pytest.raises(AdapterError, match=message):
            lower(import_peft(folder, VARIANTS, view), VARIANTS, view, 1.0)


def test_a_module_that_adalora_pruned_away_is_noted_and_left_out(world: World) -> None:
    adapter = import_peft(world.folder("AdaLoRA, pruned"), VARIANTS, world.view)
    assert [target.target for target in adapter.targets] == ["blk.0.attn_q"]
    assert adapter.targets[0].params["rank"] == 3
    assert sum("q_proj.lora_" in note and "pruned it to rank 0" in note for note in adapter.notes) == 3
