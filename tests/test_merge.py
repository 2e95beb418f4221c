"""Merging: one model out of a base and a stack, against the stack itself and against transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import open_view, perturbed_peft
from helpers.cli import adaptrt_cli
from helpers.oracle import SHAPES, relative_error
from helpers.tiny import convert_model, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaptrt
from adaptrt.adapters.base import BaseTarget
from adaptrt.adapters.fit import AttachPoint, check_fit
from adaptrt.adapters.merge import merged_bias, merged_rows
from adaptrt.adapters.normal import Kronecker, Lowered, LowRank, Sparse
from adaptrt.adapters.problems import Problems
from adaptrt.backends.reference import apply_stack, map_input, multiply, pick_columns
from adaptrt.convert.safetensors import open_safetensors
from adaptrt.format import open_file, verify
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.tensor import Tensor

IDS = [1, 5, 9, 100, 5, 2, 77, 1, 30, 12]
ADAPTERS: list[dict[str, Any]] = [
    {"modules_to_save": ["model.norm", "input_layernorm"], "trainable_token_indices": [5, 9]},
    {"use_rslora": True, "r": 3, "target_modules": ["k_proj", "down_proj", "embed_tokens", "lm_head"]},
]


@dataclass
class World:
    folder: Path
    path: Path
    adapters: list[Path]

    def base(self, dtype: str) -> Path:
        out = self.path / f"{dtype}.adrt"
        return out if out.exists() else convert_model(self.folder, out, dtype=dtype, head=dtype)

    @property
    def sources(self) -> list[str]:
        return [f"{self.adapters[0]}:0.5", str(self.adapters[1])]


@pytest.fixture(scope="module", params=["gqa", "biases", "tied", "llama3-rope"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp(request.param)
    folder = tiny_folder(path / "hf", **SHAPES[request.param])
    bias = {"bias": "all"} if request.param == "biases" else {}
    adapters = [
        perturbed_peft(path / f"a{i}", folder, i, **options, **(bias if i else {}))
        for i, options in enumerate(ADAPTERS)
    ]
    return World(folder, path, adapters)


def stacked_logits(world: World, base: Path) -> np.ndarray:
    with adaptrt.load(base, "cpu", precision="exact", kv_dtype="f32") as model:
        names = [model.load_adapter(folder) for folder in world.adapters]
        return model.logits(IDS, list(zip(names, (0.5, 1.0), strict=True)))


def logits(path: Path) -> np.ndarray:
    with adaptrt.load(path, "cpu", precision="exact", kv_dtype="f32") as model:
        return model.logits(IDS)


def test_a_merged_file_computes_what_the_stack_does(world: World, tmp_path: Path) -> None:
    base, out = world.base("f32"), tmp_path / "merged.adrt"
    outcome = adaptrt_cli("merge", base, *world.sources, "-o", out)
    assert outcome.code == 0, outcome.err
    assert "changed them by 0.00e+00 of their norm" in outcome.err
    assert verify(out) == []
    expected = stacked_logits(world, base)
    assert relative_error(logits(out), expected) <= 1e-5
    assert relative_error(logits(base), expected) > 0.1
    with open_file(out) as merged, open_file(base) as plain:
        for section, name in (("base", "blk.0.ffn_norm.weight"), ("tokenizer", "tokenizer.json")):
            assert merged.tensor(section, name).data.tobytes() == plain.tensor(section, name).data.tobytes()


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_merged_file_is_quantized_as_its_full_precision_folder(
    dtype: str, world: World, tmp_path: Path
) -> None:
    """Merged and quantized here, or merged to a folder, read by the importer and quantized there: the same bytes."""
    base, out = world.base(dtype), tmp_path / "merged.adrt"
    outcome = adaptrt_cli("merge", base, *world.sources, "-o", out)
    assert outcome.code == 0, outcome.err
    assert adaptrt_cli("merge", base, *world.sources, "-o", tmp_path / "hf", "--to", "hf").code == 0
    again = convert_model(tmp_path / "hf", tmp_path / "again.adrt", dtype=dtype, head=dtype)
    with open_file(out) as found, open_file(again) as expected:
        assert found.sections["base"].digest == expected.sections["base"].digest
        name = "blk.1.ffn_down.weight"
        stored = to_float32(found.tensor("base", name))
    with open_safetensors(tmp_path / "hf/model.safetensors") as full:
        exact = to_float32(full.tensor("model.layers.1.mlp.down_proj.weight"))
    (printed,) = re.findall(r"changed them by (\S+) of their norm", outcome.err)
    assert float(printed) == pytest.approx(relative_error(stored, exact), rel=0.3)


def test_a_merged_folder_is_what_transformers_computes(world: World, tmp_path: Path) -> None:
    base, out = world.base("nf4"), tmp_path / "merged"
    outcome = adaptrt_cli("merge", base, *world.sources, "-o", out, "--to", "hf")
    assert outcome.code == 0, outcome.err
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0].numpy()
    assert relative_error(found, stacked_logits(world, base)) <= 1e-4
    assert model.config.eos_token_id == 1 and model.dtype == torch.float32
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (out, world.folder))
    messages = [{"role": "user", "content": "Grüße"}]
    assert tokenizer.encode("Hello wörld") == original.encode("Hello wörld")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    again = convert_model(out, tmp_path / "again.adrt", dtype="f32", head="f32")
    assert relative_error(logits(again), found) <= 1e-4


def test_shards_and_16_bits(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrt.convert.to_hf.SHARD_BYTES", 60_000)
    out = tmp_path / "merged"
    outcome = adaptrt_cli(
        "merge", world.base("f32"), *world.sources, "-o", out, "--to", "hf", "--dtype", "bf16"
    )
    assert outcome.code == 0, outcome.err
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        found = model.float()(torch.tensor([IDS])).logits[0].numpy()
    assert relative_error(found, stacked_logits(world, world.base("f32"))) <= 2e-2


def test_what_cannot_be_merged_is_refused_by_name(world: World, tmp_path: Path) -> None:
    base = world.base("f32")
    invoked = perturbed_peft(
        tmp_path / "invoked", world.folder, target_modules=["q_proj"], alora_invocation_tokens=[1]
    )
    biased = perturbed_peft(tmp_path / "biased", world.folder, target_modules=["lm_head"], lora_bias=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    cases: list[tuple[list[object], str]] = [
        ([invoked, "-o", tmp_path / "o"], "cannot merge: adapter 'invoked' acts only after its invocation"),
        ([biased, "-o", tmp_path / "o"], "cannot merge: output would get a bias, which the base has not"),
        ([invoked, "-o", tmp_path / "o", "--dtype", "bf16"], "option dtype goes with --to hf"),
        ([invoked, "-o", base, "--force"], "is part of the input"),
        (["nowhere", "-o", tmp_path / "o"], "adapter 'nowhere': no such file or folder"),
        ([world.adapters[0], "-o", tmp_path, "--to", "hf"], "exists, expected a new folder"),
    ]
    for args, expected in cases:
        outcome = adaptrt_cli("merge", base, *args)
        assert outcome.code == 1 and expected in outcome.error, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("dtype", "scale", "expected"), [
    ("f32", "7e37", "is -?inf"), ("nf4", "7e37", "is -?inf"), ("f16", "1e6", "is beyond the range of f16"),
])  # fmt: skip
def test_what_outgrows_the_numbers_is_refused_naming_the_tensor(
    dtype: str, scale: str, expected: str, world: World, tmp_path: Path
) -> None:
    sources = [f"{world.adapters[1]}:{scale}"] * 30
    for kind in (["-o", tmp_path / "m.adrt"], ["-o", tmp_path / "hf", "--to", "hf", "--dtype", "f16"]):
        outcome = adaptrt_cli("merge", world.base(dtype), *sources, *kind)
        assert outcome.code == 1 and re.search(f"merged tensor model.*{expected}", outcome.error)
    assert not list(tmp_path.iterdir())


def test_the_error_of_huge_weights_is_a_number(world: World, tmp_path: Path) -> None:
    out = tmp_path / "m.adrt"
    outcome = adaptrt_cli("merge", world.base("nf4"), f"{world.adapters[1]}:1e30", "-o", out)
    (printed,) = re.findall(r"changed them by (\S+) of their norm", outcome.err)
    assert outcome.code == 0 and 0 < float(printed) < 0.2


# Every part of the normal form, against the reference backend's own reading of it


def random_stack(point: AttachPoint, rng: np.random.Generator) -> list[Lowered]:
    def vector(size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    def tensor(rows: int, cols: int, dtype: str = "f32") -> Tensor:
        return from_float32(rng.standard_normal((rows, cols)).astype(np.float32), dtype)

    out, inner = point.out, point.inner
    rows, cols = point.weight_shape
    start = np.cumsum([0, *rng.integers(0, 4, rows)]).astype(np.int32)
    columns = [np.sort(rng.choice(cols, n, replace=False)) for n in np.diff(start)]
    sparse = Sparse(start, np.concatenate(columns).astype(np.int32), vector(start[-1]), 0.7)
    low = [
        LowRank(tensor(out + 3, 5), tensor(5, inner + 2), 0.5, vector(5), vector(out)),
        LowRank(tensor(6, out, "int8"), tensor(6, inner, "nf4"), -0.5, vector(6)),
        LowRank(None, tensor(out, inner, "bf16"), 0.3, vector(out)),
    ]
    plain = point.kind != "embedding"
    kron = [Kronecker(tensor(4, 2), tensor(out // 4, inner // 2), 0.2)] if plain else []
    rotation = rng.standard_normal((inner // 8, 8, 8)).astype(np.float32) if plain else None
    return [
        Lowered((low[0], sparse), vector(inner), rotation, vector(out), True, vector(out)),
        Lowered((low[1], low[2], *kron), vector(inner), None, vector(out), False, vector(out)),
    ]


@pytest.mark.parametrize("target", ["blk.0.attn_k", "output", "token_embd"])
def test_every_part_of_the_normal_form_is_merged(target: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", vocab_size=264, hidden_size=64)
    view = open_view(convert_model(folder, tmp_path / "b.adrt"))
    base: BaseTarget = view.targets[target]
    rows, cols = base.shape
    embedding = base.kind == "embedding"
    point = AttachPoint(base.kind, cols if embedding else rows, rows if embedding else cols)
    rng = np.random.default_rng(3)
    stack = random_stack(point, rng)
    problems = Problems()
    for lowered in stack:
        check_fit(lowered, point, problems)
    problems.raise_for("the test's own stack")
    merged = np.concatenate([merged_rows(base, stack, a, min(a + 37, rows)) for a in range(0, rows, 37)])
    bias = rng.standard_normal(point.out).astype(np.float32)
    if embedding:
        ids = np.arange(rows)
        gains = map_input(np.ones((1, rows), np.float32), stack)[0]
        expected = apply_stack(base.weight() * gains[:, None], stack, point, lambda m: pick_columns(ids, m))
        found = merged
    else:
        x = rng.standard_normal((9, cols)).astype(np.float32)
        product = map_input(x, stack) @ base.weight().T
        expected = apply_stack(product, stack, point, lambda m: multiply(x, m), bias)
        constant = merged_bias(bias, stack, point.out)
        assert constant is not None
        found = x @ merged.T + constant
    assert relative_error(found, expected) <= 1e-5
