"""PEFT folders as they should not be: every option and tensor is honoured or refused by name, in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import CONFIG, WEIGHTS, Tensors, edit_tensors, edited, open_view, perturbed_peft
from helpers.oracle import SHAPES, llama_folder
from helpers.tiny import convert_model
from safetensors.torch import load_file

from adaptrt.adapters.base import BaseView
from adaptrt.adapters.lora import LoraVariant
from adaptrt.adapters.storage import read_adapter
from adaptrt.adapters.variant import Adapter
from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.peft import PeftImporter, import_peft
from adaptrt.convert.to_peft import export_peft
from adaptrt.errors import AdaptrtError
from adaptrt.format import open_file, verify
from adaptrt.plugins import load_registry

VARIANTS = load_registry().variants
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
EMBED = "base_model.model.model.embed_tokens"


@dataclass
class World:
    """Two bases, one of them quantized, and adapters of each."""

    base: Path
    view: BaseView
    tied: BaseView
    quantized: BaseView
    folder: Path  # q_proj of both layers and the embedding
    head: Path  # embedding and head of the tied base


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("world")
    hf, tied = llama_folder(path / "hf"), llama_folder(path / "tied", **SHAPES["tied"])
    base = convert_model(hf, path / "base.adrt", dtype="f32", head="f32")
    return World(
        base,
        open_view(base),
        open_view(convert_model(tied, path / "tied.adrt", dtype="f32", head="f32")),
        open_view(convert_model(hf, path / "nf4.adrt", dtype="nf4", head="nf4")),
        perturbed_peft(path / "a", hf, target_modules=["q_proj", "embed_tokens"]),
        perturbed_peft(
            path / "h", tied, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
        ),
    )


def refusal(folder: Path, view: BaseView, variants: Any = VARIANTS) -> str:
    with pytest.raises(AdaptrtError) as caught:
        import_peft(folder, variants, view)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message
    return message.removeprefix(str(folder))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "qalora": (
        {"use_qalora": True},
        "handles peft_type 'LORA' with use_qalora: it needs a variant plugin, or, where PEFT can merge it",
    ),
    "qalora and rslora": (
        {"use_qalora": True, "use_rslora": True},
        "with use_qalora, use_rslora: it needs a variant plugin",
    ),
    "qalora and dora": (
        {"use_qalora": True, "use_dora": True},
        "with use_dora, use_qalora: it needs a variant plugin",
    ),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "with use_bdlora: it needs a variant plugin"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "with arrow_config: it needs a variant plugin"),
    "kasa": ({"kasa_config": {"beta": 1}}, "with kasa_config: it needs a variant plugin"),
    "future method": ({"use_newlora": True}, "with use_newlora: it needs a variant plugin"),
    "another method": (
        {"peft_type": "XLORA"},
        "no installed variant handles peft_type 'XLORA': it needs a variant plugin",
    ),
    "no change": (
        {"peft_type": "PREFIX_TUNING"},
        "'PREFIX_TUNING' is not supported: it gives the model more",
    ),
    "no type": ({"peft_type": None}, "adapter_config.json has no peft_type, so it is not PEFT's"),
    "odd type": ({"peft_type": ["LORA"]}, "no installed variant handles peft_type ['LORA']"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, "option target_parameters = ['mlp.experts']"),
    "replication": ({"layer_replication": [[0, 2]]}, "option layer_replication = [[0, 2]]"),
    "megatron": ({"megatron_config": {"a": 1}}, "option megatron_config = {'a': 1}: unknown option"),
    "unknown": ({"shiny": 0.5}, "option shiny = 0.5: unknown option"),
    "bias": ({"bias": "some"}, "option bias = 'some': expected none, all or a method's _only"),
    "rank 0": ({"r": 0}, "option r = 0: expected a whole number above 0"),
    "rank -1": ({"r": -1}, "option r = -1: expected a whole number above 0"),
    "rank 4.0": ({"r": 4.0}, "option r = 4.0: expected a whole number above 0"),
    "rank true": ({"r": True}, "option r = True: expected a whole number above 0"),
    "alpha nan": ({"lora_alpha": float("nan")}, "option lora_alpha = nan: expected a finite number"),
    "alpha inf": ({"lora_alpha": float("inf")}, "option lora_alpha = inf: expected a finite number"),
    "alpha huge": ({"lora_alpha": 10**400}, "expected a finite number"),
    "alpha text": ({"lora_alpha": "8"}, "option lora_alpha = '8': expected a finite number"),
    "rank pattern value": ({"rank_pattern": {"q_proj": 0}}, "'q_proj': 0: expected a whole number above 0"),
    "alpha pattern value": ({"alpha_pattern": {"q_proj": None}}, "'q_proj': None: expected a finite number"),
    "pattern type": ({"rank_pattern": [1]}, "option rank_pattern = [1]: expected an object"),
    "pattern syntax": ({"rank_pattern": {"q_proj(": 4}}, "not a regular expression"),
    "pattern that never ends": ({"rank_pattern": {"((.*)*)*x": 4}}, "pattern repeats a group"),
    "pattern of choices": ({"alpha_pattern": {"(.|.)" * 30: 1}}, "could take too long to match"),
    "pattern that takes long": (
        {"rank_pattern": {".*.*.*.*.*x": 4}},
        "these patterns could take too long to match",
    ),
    "lora_bias text": ({"lora_bias": "no"}, "option lora_bias = 'no': expected true or false"),
    "module not named": (
        {"target_modules": ["k_proj", "embed_tokens"]},
        "model.layers.0.self_attn.q_proj has tensors, but option target_modules does not name it (and 1 more like it)",
    ),
    "rank differs": ({"r": 8}, "lora_A.weight is [4, 64], expected [8, 64] (rank, in)"),
    "rank of one differs": (
        {"rank_pattern": {"1.self_attn.q_proj": 2}},
        "layers.1.self_attn.q_proj.lora_B.weight is [64, 4], expected [64, 2] (out, rank)",
    ),
    "lora_bias without one": ({"lora_bias": True}, "model.layers.0.self_attn.q_proj.lora_B.bias is missing"),
    **{
        init: (
            {"init_lora_weights": init},
            f"option init_lora_weights = '{init}': this initialisation changed the base",
        )
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "OLoRA")
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(
    case: str, world: World, tmp_path: Path
) -> None:
    config, expected = OPTIONS[case]
    assert expected in refusal(edited(world.folder, tmp_path / "a", config), world.view)


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def filled(name: str, value: float, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        tensor = tensors[name].to(dtype)
        tensor[0, -1] = value
        return tensors | {name: tensor}

    return edit


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "unknown suffix": (
        with_tensor(f"{Q}.lora_C.weight", torch.ones(1)),
        "model.layers.0.self_attn.q_proj.lora_C.weight is not understood by variant lora",
    ),
    "magnitude": (
        with_tensor(f"{Q}.lora_magnitude_vector", torch.ones(64)),
        "q_proj.lora_magnitude_vector is not understood",
    ),
    "unasked lora_bias": (
        with_tensor(f"{Q}.lora_B.bias", torch.ones(64)),
        "q_proj.lora_B.bias is not understood",
    ),
    "unasked bias": (
        with_tensor(f"{Q}.base_layer.bias", torch.ones(64)),
        "q_proj.base_layer.bias is not understood",
    ),
    "saved module": (
        with_tensor("base_model.model.model.norm.weight", torch.ones(64)),
        "model.norm.weight is not understood by variant lora",
    ),
    "layer beyond": (
        renamed("layers.1.", "layers.7."),
        "layers.7.self_attn.q_proj.lora_A.weight' belongs to no module",
    ),
    "shared": (
        with_tensor("base_model.vera_A", torch.ones(2)),
        "'base_model.vera_A' is not understood by variant lora",
    ),
    "foreign": (with_tensor("lora_te_down.weight", torch.ones(2)), "'lora_te_down.weight' is not understood"),
    "no prefix": (
        renamed("base_model.model.", ""),
        "'model.layers.0.self_attn.q_proj.lora_A.weight' is not understood",
    ),
    "A missing": (without(A), "model.layers.0.self_attn.q_proj.lora_A.weight is missing"),
    "twice": (
        with_tensor(f"{Q}.lora_A.default.weight", torch.ones(4, 64)),
        "lora_A.default.weight' name the same tensor",
    ),
    "linear in an embedding": (
        renamed("lora_embedding_A", "lora_A.weight"),
        "model.embed_tokens.lora_A.weight is not understood",
    ),
    "B transposed": (
        with_tensor(B, torch.ones(4, 64)),
        "q_proj.lora_B.weight is [4, 64], expected [64, 4] (out, rank)",
    ),
    "A of another width": (
        with_tensor(A, torch.ones(4, 32)),
        "q_proj.lora_A.weight is [4, 32], expected [4, 64] (rank, in)",
    ),
    "sharded away": (
        with_tensor(A, torch.ones(0)),
        "q_proj.lora_A.weight is [0], expected [4, 64]",
    ),
    "other vocabulary": (
        with_tensor(f"{EMBED}.lora_embedding_A", torch.ones(4, 140)),
        "lora_embedding_A is [4, 140], expected [4, 131] (rank, in)",
    ),
    "NaN": (
        filled(A, float("nan"), torch.float32),
        "lora_A.weight holds NaN or infinity (1 of 256 values)",
    ),
    "inf bf16": (
        filled(B, float("inf"), torch.bfloat16),
        "lora_B.weight holds NaN or infinity (1 of 256 values)",
    ),
    "-inf f16": (
        filled(B, -float("inf"), torch.float16),
        "lora_B.weight holds NaN or infinity (1 of 256 values)",
    ),
    "integers": (
        with_tensor(A, torch.ones(4, 64, dtype=torch.int32)),
        "lora_A.weight is of dtype i32, expected f32, f16, bf16",
    ),
    "float64": (
        with_tensor(A, torch.ones(4, 64, dtype=torch.float64)),
        "has dtype f64, expected",
    ),
    "resized": (
        with_tensor(f"{EMBED}.base_layer.weight", torch.ones(140, 64)),
        "embed_tokens.base_layer.weight is [140, 64], expected the base's [131, 64]",
    ),
    "another base": (
        with_tensor(f"{EMBED}.base_layer.weight", torch.randn(131, 64)),
        "embed_tokens.base_layer.weight differs from the base by",
    ),
    "nothing": (lambda _: {}, "it adapts nothing"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_cannot_be_used_is_refused_by_name(case: str, world: World, tmp_path: Path) -> None:
    edit, expected = TENSORS[case]
    assert expected in refusal(edited(world.folder, tmp_path / "a", tensors=edit), world.view)


def test_a_bias_for_a_base_without_biases_is_refused(world: World, tmp_path: Path) -> None:
    edit = with_tensor(f"{Q}.base_layer.bias", torch.ones(64))
    message = refusal(edited(world.folder, tmp_path / "a", {"bias": "all"}, edit), world.view)
    assert "q_proj.base_layer.bias replaces a bias that the base does not have" in message


def test_half_of_a_tied_adapter_is_refused(world: World, tmp_path: Path) -> None:
    import_peft(world.head, VARIANTS, world.tied)

    def edit(tensors: Tensors) -> Tensors:
        return {key: tensor for key, tensor in tensors.items() if "lm_head" not in key}

    message = refusal(edited(world.head, tmp_path / "a", tensors=edit), world.tied)
    assert "expected tensors of both model.embed_tokens and lm_head" in message


def test_all_problems_are_reported_at_once_and_counted(world: World, tmp_path: Path) -> None:
    config = {"r": 0, "modules_to_save": ["x"], "shiny": 1}
    message = refusal(edited(world.folder, tmp_path / "a", config), world.view)
    assert [name for name in config if f"option {name} = " in message] == list(config)

    def edit(tensors: Tensors) -> Tensors:
        names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
        odd = {f"base_model.{name}": torch.ones(1) for name in names}
        return tensors | odd | {f"{Q}.odd{i}": torch.ones(1) for i in range(4)} | {B: torch.ones(2, 2)}

    message = refusal(edited(world.folder, tmp_path / "b", tensors=edit), world.view)
    assert "q_proj.odd0 is not understood by variant lora (and 3 more like it); " in message
    assert message.count("is not understood") == 8 and message.endswith("; and 3 more")


def test_two_variants_that_claim_one_config_are_refused(world: World) -> None:
    class Twin(LoraVariant):
        name = "twin"

    message = refusal(world.folder, world.view, {"lora": LoraVariant(), "twin": Twin()})
    assert "peft_type 'LORA' is claimed by variants lora, twin" in message


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda path: (path / CONFIG).unlink(),
        ": not a PEFT adapter folder, adapter_config.json is missing",
    ),
    "no folder": (lambda path: path.rename(path.with_name("gone")), "adapter_config.json is missing"),
    "a folder of adapters": (
        lambda path: ((path / "mine").mkdir(), (path / CONFIG).rename(path / "mine" / CONFIG)),
        "adapter_config.json is missing; there is one in mine",
    ),
    "bad JSON": (lambda path: (path / CONFIG).write_text("{"), "adapter_config.json: not valid JSON"),
    "JSON list": (lambda path: (path / CONFIG).write_text("[]"), "found a JSON list, expected an object"),
    "duplicate key": (lambda path: (path / CONFIG).write_text('{"r": 1, "r": 2}'), "key 'r' appears twice"),
    "huge config": (
        lambda path: (path / CONFIG).write_bytes(b" " * (5 << 20)),
        "5242880 bytes, expected at most 4194304",
    ),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), ": adapter_model.safetensors is missing"),
    "pickle": (lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"), "safe_serialization=True"),
    "truncated": (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9]), "truncated"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_broken_folder_is_refused_in_one_line(case: str, world: World, tmp_path: Path) -> None:
    folder = edited(world.folder, tmp_path / "a")
    damage, expected = FOLDERS[case]
    damage(folder)
    assert expected in refusal(folder, world.view)


def test_keys_with_the_adapter_name_are_understood(world: World, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        return {
            re.sub(r"(lora_[AB])\.|(lora_embedding_[AB])$", r"\1\2.default.", key).removesuffix("."): tensor
            for key, tensor in tensors.items()
        }

    named = import_peft(edited(world.folder, tmp_path / "a", tensors=edit), VARIANTS, world.view)
    assert (
        f"{Q}.lora_A.default.weight" in named.tensors and f"{EMBED}.lora_embedding_A.default" in named.tensors
    )
    assert_same_targets(import_peft(world.folder, VARIANTS, world.view), named)


@pytest.mark.parametrize("pattern", [
    r"^(base_model\.model\.)(.*)", r"(.*layers\.\d+\.)(.*)", r"^()(.*)"
])  # fmt: skip
def test_an_adapter_of_a_compiled_or_wrapped_base_fits_the_plain_one(
    pattern: str, world: World, tmp_path: Path
) -> None:
    """PEFT itself writes such names: get_peft_model(torch.compile(model)), or of compiled layers."""

    def edit(tensors: Tensors) -> Tensors:
        return {re.sub(pattern, r"\1_orig_mod.\2", key): tensor for key, tensor in tensors.items()}

    folder = edited(world.folder, tmp_path / "a", tensors=edit)
    plain, wrapped = (import_peft(path, VARIANTS, world.view) for path in (world.folder, folder))
    assert wrapped.tensors.keys() != plain.tensors.keys()
    assert_same_targets(plain, wrapped)
    export_peft(wrapped, VARIANTS, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == plain.tensors.keys()


def assert_same_targets(plain: Adapter, named: Adapter) -> None:
    """The same targets and tensors, whatever the tensors are called."""
    for ours, theirs in zip(plain.targets, named.targets, strict=True):
        assert (ours.target, ours.params) == (theirs.target, theirs.params)
        for role, name in ours.tensors.items():
            found = named.tensors[theirs.tensors[role]]
            assert found.data.tobytes() == plain.tensors[name].data.tobytes()


def test_a_frozen_copy_is_recognised_beside_a_quantized_base(world: World) -> None:
    assert import_peft(world.folder, VARIANTS, world.quantized).notes


def convert(world: World, folder: Path, out: Path, **options: Any) -> list[str]:
    """Convert; returns what was said."""
    said: list[str] = []
    settings = ConvertOptions(base=world.base, variants=VARIANTS, **options)
    PeftImporter().convert(folder, out, settings, lambda done, total, what: said.append(what))
    return said


def test_the_importer_writes_a_file_of_its_own(world: World, tmp_path: Path) -> None:
    importer = PeftImporter()
    assert importer.claims(world.folder) and not importer.claims(tmp_path) and not importer.claims(world.base)
    said = convert(world, world.folder, tmp_path / "a.adrt", name="voice")
    assert any("left out: a frozen copy of the base" in line for line in said)
    assert verify(tmp_path / "a.adrt") == []
    with open_file(tmp_path / "a.adrt") as file:
        assert file.metadata["general.type"] == "adapter"
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["adapter.type"] == "lora"
        adapter = read_adapter(file, "adapter/voice")
    stored = load_file(world.folder / WEIGHTS)
    assert adapter.tensors.keys() == {name for name in stored if "base_layer" not in name}
    for name, tensor in adapter.tensors.items():
        assert tensor.data.tobytes() == stored[name].numpy().tobytes()
    assert adapter.base["fingerprint"] == world.view.fingerprint


def test_the_same_input_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    for name in ("1", "2"):
        convert(world, world.folder, tmp_path / f"{name}.adrt", name="voice")
    assert (tmp_path / "1.adrt").read_bytes() == (tmp_path / "2.adrt").read_bytes()


def test_conversion_failures_leave_no_file(world: World, tmp_path: Path) -> None:
    bad = edited(world.folder, tmp_path / "bad", {"lora_alpha": 1e300})
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (bad, {}, "expected a finite float32"),
        (world.folder, {"name": "a/b"}, "adapter name 'a/b': expected 1 to 100 printable characters"),
        (world.folder, {"name": "a:2"}, "adapter name 'a:2'"),
    ]
    for folder, options, expected in cases:
        with pytest.raises(AdaptrtError, match=re.escape(expected)):
            convert(world, folder, tmp_path / "a.adrt", **options)
    with pytest.raises(AdaptrtError, match=r"needs the base it belongs to \(--base BASE.adrt\)"):
        convert(replace(world, base=None), world.folder, tmp_path / "a.adrt")  # type: ignore[arg-type]
    with pytest.raises(AdaptrtError, match="is the base itself"):
        convert(world, world.folder, world.base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_a_variant_that_cannot_read_a_config_is_passed_over(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(LoraVariant):
        name = "broken"

        def claims(self, config: Mapping[str, Any]) -> bool:
            return bool(config["a key that is never there"])

    adapter = import_peft(world.folder, {**VARIANTS, "broken": Broken()}, world.view)
    assert adapter.variant == "lora"
    (warning,) = [line for line in caplog.messages if "broken" in line]
    assert warning.startswith("variant broken passed over: it cannot read the config: KeyError")


def test_an_adapter_file_is_no_base(world: World, tmp_path: Path) -> None:
    convert(world, world.folder, tmp_path / "a.adrt")
    with pytest.raises(AdaptrtError, match=r"a.adrt: holds no base model, expected a model file"):
        convert(replace(world, base=tmp_path / "a.adrt"), world.folder, tmp_path / "b.adrt")


def test_options_at_rest_and_of_training_are_accepted(world: World, tmp_path: Path) -> None:
    config = {
        "lora_dropout": 0.1,
        "future": None,
        "other": [],
        "use_qalora": False,
        "revision": "main",
        **dict.fromkeys(
            ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), None
        ),  # as axolotl saves some
    }
    folder = edited(world.folder, tmp_path / "a", config)
    edit_tensors(folder, lambda tensors: tensors)
    assert json.loads(import_peft(folder, VARIANTS, world.view).config_text)["lora_dropout"] == 0.1
