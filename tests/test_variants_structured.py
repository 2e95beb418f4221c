"""LoHa, LoKr, MiSS, VB-LoRA, SHiRA, OFT, BOFT, FourierFT, C3A, RandLoRA: what the parity table does not show."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adaptrt_fourierft import first_of_permutation
from helpers.adapters import Tensors, edited, open_view
from helpers.oracle import llama_folder, relative_error
from helpers.tiny import convert_model
from helpers.variant_cases import CASES, OPTIONS
from helpers.variant_oracle import VariantOracle

import adaptrt
from adaptrt.adapters import dense
from adaptrt.adapters.base import BaseView
from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import Lowered, LowRank, Sparse
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import read_adapter
from adaptrt.adapters.variant import Adapter, Target, Variant
from adaptrt.backends.multiplied import multiplied_out
from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.peft import PeftImporter, import_peft
from adaptrt.errors import AdaptrtError
from adaptrt.format import open_file
from adaptrt.plugins import load_registry
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.tensor import Tensor

OURS = ("loha", "lokr", "miss", "vblora", "shira", "oft", "boft", "fourierft", "c3a", "randlora")
EVERY = CASES | OPTIONS
NAMES = [name for name, case in EVERY.items() if case.variant in OURS]
Q = "base_model.model.model.layers.0.self_attn.q_proj."


@dataclass
class World:
    """A base, its adapters as PEFT folders by case, and our variants."""

    path: Path
    base: Path
    view: BaseView
    oracle: VariantOracle
    variants: Mapping[str, Variant]

    def folder(self, name: str) -> Path:
        path = self.path / str(list(EVERY).index(name))
        return path if path.exists() else self.oracle.save(EVERY[name], path, seed=1)

    def adapter(self, name: str) -> Adapter:
        return import_peft(self.folder(name), self.variants, self.view)

    def lower(self, adapter: Adapter) -> Mapping[str, Lowered]:
        return lower(adapter, self.variants, self.view, 0.7)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("structured")
    folder = llama_folder(path / "hf")
    base = convert_model(folder, path / "base.adrt")
    return World(path, base, open_view(base), VariantOracle(folder, base), load_registry().variants)


def arrays(lowered: Mapping[str, Lowered]) -> dict[str, Any]:
    """All that was lowered, by where it is."""
    found: dict[str, Any] = {}
    for target, one in lowered.items():
        for where, thing in (("", one), *enumerate(one.terms)):
            for name, value in vars(thing).items():
                if isinstance(value, Tensor):
                    found[f"{target} {where} {name}"] = to_float32(value)
                elif name != "terms" and value is not None:
                    found[f"{target} {where} {name}"] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_adapter_lowers_to_the_same_bits_as_its_folder(world: World, name: str) -> None:
    out = world.path / "stored.adrt"
    PeftImporter().convert(
        world.folder(name), out, ConvertOptions(base=world.base, variants=world.variants), lambda *_: None
    )
    with open_file(out) as file:
        stored = arrays(
            world.lower(read_adapter(file, next(n for n in file.sections if n.startswith("adapter/"))))
        )
        expected = arrays(world.lower(world.adapter(name)))
        assert stored.keys() == expected.keys() and expected
        assert all(np.array_equal(stored[key], expected[key]) for key in expected)


Edit = Callable[[Tensors], Tensors]


def renamed(old: str, new: str) -> Edit:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(part: str) -> Edit:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def with_value(part: str, value: float) -> Edit:
    def edit(tensors: Tensors) -> Tensors:
        for key, tensor in tensors.items():
            if part in key:
                tensor.view(-1)[0] = value
        return tensors

    return edit


REFUSED: dict[str, tuple[str, dict[str, Any], Edit | None, str]] = {
    "loha rank": ("LoHa", {"r": 5}, None, "hada_w1_a is [64, 4], expected [64, 5] (out, rank)"),
    "loha convolution": ("LoHa", {}, renamed("hada_w1_a", "hada_t1"), "hada_w1_a is missing"),
    "lokr half": ("LoKr, both products", {}, without("w1_b"), "lokr_w1_b is missing"),
    "lokr convolution": ("LoKr", {}, renamed("lokr_w2_a", "lokr_t2"), "lokr_t2 is not understood"),
    "lokr size": ("LoKr", {}, renamed("q_proj", "o_proj2"), "belongs to no module"),
    "miss form": ("MiSS", {"init_weights": "gaussian"}, None, "expected true, false, bat or mini"),
    "miss mini": ("MiSS, mini", {"mini_r": 8}, None, "miss_block is [16, 4], expected [rank, 8]"),
    "miss bat": ("MiSS", {"init_weights": "bat"}, None, "miss_block is [8, 64], expected [shards, 8, 8]"),
    "vblora bank": ("VB-LoRA", {"num_vectors": 13}, None, "vector_bank is [12, 16], expected [13, 16]"),
    "vblora length": ("VB-LoRA", {"vector_length": 8}, None, "vector_bank is [12, 16], expected [12, 8]"),
    "vblora form": ("VB-LoRA", {"save_only_topk_weights": True}, None, "logits_A_topk_indices is missing"),
    "vblora index": (
        "VB-LoRA, saved best", {}, with_value("A_topk_indices", 300), "logits_A: expected 3 of 300 vectors",
    ),
    "shira row": ("SHiRA, one module", {}, with_value("indices", -1), "entry 0 is at (-1, "),
    "oft old": ("OFT", {"oft_block_size": 0, "r": 0}, None, "r = 0 and oft_block_size = 0: expected one of them"),
    "oft both": ("OFT", {"r": 4}, None, "r = 4 and oft_block_size = 16: expected one of them"),
    "oft series": ("OFT", {"peft_version": "0.17.1"}, None, "use_cayley_neumann of an adapter saved by PEFT '0.17.1'"),
    "oft endless version": ("OFT", {"peft_version": "9" * 5000}, None, "the series was another before 0.18"),
    "oft no version": ("OFT", {"peft_version": None}, None, "the series was another before 0.18"),
    "oft endless": ("OFT", {"num_cayley_neumann_terms": 2**40}, None, "terms = 1099511627776: expected a whole number"),
    "oft block": ("OFT", {"oft_block_size": 8}, None, "oft_R.weight is [4, 120], expected [8, 28]"),
    "oft sharing": ("OFT", {"block_share": True}, None, "oft_R.weight is [4, 120], expected [1, 120]"),
    "boft sizes": ("BOFT", {"boft_block_num": 16}, None, "boft_block_size = 4 and boft_block_num = 16: expected one"),
    "boft factors": ("BOFT", {"boft_n_butterfly_factor": 2}, None, "expected [2, 16, 4, 4]"),
    "fourierft count": ("FourierFT", {"n_frequency": 49}, None, "fourierft_spectrum is [50], expected [49]"),
    "fourierft choice": (
        "FourierFT", {"n_frequency_pattern": {"q_proj|k_proj": 9}}, None, "write the choices of a pattern one by one",
    ),
    "fourierft no table": ("FourierFT", {"n_frequency_pattern": True}, None, "pattern = True: expected an object"),
    "c3a no table": ("C3A", {"block_size_pattern": 5}, None, "block_size_pattern = 5: expected an object"),
    "fourierft seed": ("FourierFT", {"random_loc_seed": 1.5}, None, "expected a whole number"),
    "c3a block": ("C3A", {"block_size": 8}, None, "c3a_kernel is [4, 4, 16], expected [4, 4, 8]"),
    "randlora bases": ("RandLoRA", {"save_projection": False}, None, "the random bases are not in the file"),
    "randlora no A": ("RandLoRA", {}, without("base_model.randlora_A"), "base_model.randlora_A is missing"),
    "randlora rank": ("RandLoRA", {"r": 6}, None, "randlora_lambda is [12, 6], expected [6, 6]"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(world: World, tmp_path: Path, row: str) -> None:
    name, config, tensors, message = REFUSED[row]
    with pytest.raises(AdaptrtError) as refusal:
        world.lower(
            import_peft(
                edited(world.folder(name), tmp_path / "a", config, tensors), world.variants, world.view
            )
        )
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["LoHa", "LoKr", "MiSS", "VB-LoRA", "SHiRA", "OFT", "BOFT", "FourierFT", "C3A", "RandLoRA"]
)
def test_an_option_that_no_rule_knows_is_refused(world: World, tmp_path: Path, name: str) -> None:
    folder = edited(world.folder(name), tmp_path / "a", {"sorcery": 3})
    with pytest.raises(AdaptrtError, match="option sorcery = 3: unknown option"):
        import_peft(folder, world.variants, world.view)


def test_oft_from_before_its_present_form_is_refused(world: World, tmp_path: Path) -> None:
    folder = edited(world.folder("OFT"), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["oft_block_size"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdaptrtError, match="option oft_block_size is missing"):
        import_peft(folder, world.variants, world.view)


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("OFT", {"block": 7}),
    "fourierft": ("FourierFT", {"frequencies": 51}),
    "vblora": ("VB-LoRA, saved best", {"topk": 2}),
    "miss": ("MiSS, bat", {"rank": 4}),
    "boft": ("BOFT", {"factors": 5}),
}


@pytest.mark.parametrize("row", HOSTILE)
def test_a_stored_param_that_its_tensors_do_not_fit_is_refused(world: World, row: str) -> None:
    name, params = HOSTILE[row]
    adapter = world.adapter(name)
    targets = tuple(replace(target, params={**target.params, **params}) for target in adapter.targets)
    with pytest.raises(AdaptrtError, match="expected"):
        world.lower(replace(adapter, targets=targets))


# Roles that shapes by name allow and the method does not: (case, role → shape or None to drop it, message)
MISFITS: dict[str, tuple[str, dict[str, tuple[int, ...] | None], str]] = {
    "lokr twice": ("LoKr", {"w2": (8, 8)}, "found w2, w2_a, w2_b for w2"),
    "lokr none": ("LoKr", {"w1": None}, "found no tensors for w1"),
    "miss both": ("MiSS", {"bat": (8, 8, 8)}, "expected block or bat"),
    "miss width": ("MiSS", {"block": (8, 7)}, "expected a width that divides the 64 outputs"),
    "miss shards": ("MiSS, bat", {"bat": (9, 8, 8)}, "do not divide the weight [64, 64]"),
    "vblora both": ("VB-LoRA", {"logits_A_topk_indices": (3, 4, 2)}, "expected either logits or indices"),
    "vblora runs": ("VB-LoRA", {"logits_A": (3, 5, 12)}, "vectors make [64, 80], expected [64, 64]"),
    "oft blocks": ("OFT", {"R": (3, 120)}, "oft_R is"),
    "boft blocks": ("BOFT", {"R": (3, 15, 4, 4)}, "expected such butterfly factors of 64 inputs"),
    "c3a blocks": ("C3A", {"kernel": (4, 3, 16)}, "expected blocks of [64, 64]"),
    "randlora gamma": ("RandLoRA", {"gamma": (6, 63)}, "do not fit the weight [64, 64]"),
    "randlora bases": ("RandLoRA", {"B": (63, 14, 12)}, "do not fit the weight [64, 64]"),
}


@pytest.mark.parametrize("row", MISFITS)
def test_stored_tensors_that_do_not_make_the_weight_are_refused(world: World, row: str) -> None:
    name, roles, message = MISFITS[row]
    adapter = world.adapter(name)
    (target,) = (t for t in adapter.targets if t.target == "blk.0.attn_q")
    tensors, named = dict(adapter.tensors), dict(target.tensors)
    for role, shape in roles.items():
        named.pop(role, None)
        if shape is not None:
            integer = role in world.variants[adapter.variant].integers
            tensors[role] = Tensor.from_numpy(np.zeros(shape, np.int32 if integer else np.float32))
            named[role] = role
    params = {**target.params, **({"blocks": 3} if row == "oft blocks" else {})}
    with pytest.raises(AdaptrtError) as refusal:
        world.lower(replace(adapter, targets=(Target(target.target, params, named),), tensors=tensors))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "roles", "message"),
    [
        ("LoHa", ["w1_a", "w2_a"], "[UV]0 is not all finite float32"),
        ("LoKr, both products", ["w1_a", "w1_b"], "W1 of term 0 is not all finite float32"),
        ("BOFT", ["R"], "rotation is not all finite float32|Singular matrix"),
    ],
)
def test_what_overflows_when_it_is_computed_is_refused(
    world: World, name: str, roles: list[str], message: str
) -> None:
    adapter, rng = world.adapter(name), np.random.default_rng(0)
    tensors = dict(adapter.tensors)
    for target in adapter.targets:
        for role in roles:
            shape = tensors[target.tensors[role]].shape
            huge = rng.choice([-3e38, 3e38], shape).astype(np.float32)
            tensors[target.tensors[role]] = Tensor.from_numpy(huge)
    with pytest.raises(AdaptrtError, match=message):
        world.lower(replace(adapter, tensors=tensors))


def test_bone_is_miss_under_its_former_name(world: World, tmp_path: Path) -> None:
    for name in ("MiSS", "MiSS, bat"):
        folder = edited(world.folder(name), tmp_path / name, {"peft_type": "BONE"}, renamed("miss_", "bone_"))
        bone, miss = (
            arrays(world.lower(a))
            for a in (import_peft(folder, world.variants, world.view), world.adapter(name))
        )
        assert bone.keys() == miss.keys() and all(np.array_equal(bone[key], miss[key]) for key in miss)


def test_the_sums_over_shards_are_one_tensor_for_all_modules_and_adapters(world: World) -> None:
    one, other = (world.lower(world.adapter("MiSS")) for _ in range(2))
    sums = {id(low.terms[0].v) for lowered in (one, other) for low in lowered.values()}  # type: ignore[union-attr]
    assert len(sums) == len({64, 160})  # the widths of the inputs


def test_places_in_any_order_as_any_number_and_twice(world: World, tmp_path: Path) -> None:
    """What torch makes of the same coordinates, which PEFT on Windows stores as float32."""

    def shuffle(tensors: Tensors) -> Tensors:
        for key in [key for key in tensors if key.endswith("indices")]:
            order = torch.randperm(tensors[key].shape[1])
            tensors[key] = tensors[key][:, order].float()
            tensors[key][:, 1] = tensors[key][:, 0]
        return tensors

    folder = edited(world.folder("SHiRA, one module"), tmp_path / "a", tensors=shuffle)
    adapter = import_peft(folder, world.variants, world.view)
    for name, lowered in world.lower(adapter).items():
        term, (out, inner) = lowered.terms[0], world.view.targets[name].shape
        assert isinstance(term, Sparse)
        roles = next(target.tensors for target in adapter.targets if target.target == name)
        places, values = (
            torch.from_numpy(to_float32(adapter.tensors[roles[r]])) for r in ("places", "values")
        )
        expected = torch.sparse_coo_tensor(places.int(), values, (out, inner)).to_dense().numpy()
        found = np.zeros((out, inner), np.float32)
        found[np.repeat(np.arange(out), np.diff(term.row_start)), term.columns] = term.values
        assert np.allclose(found, expected, rtol=1e-6)


def test_places_that_are_no_whole_numbers_are_refused(world: World, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> Tensors:
        return {key: t.float() / 2 if key.endswith("indices") else t for key, t in tensors.items()}

    with pytest.raises(AdaptrtError, match="shira_indices holds numbers that are not whole"):
        import_peft(
            edited(world.folder("SHiRA, one module"), tmp_path / "a", tensors=halve),
            world.variants,
            world.view,
        )


@pytest.mark.parametrize(("name", "order"), [("OFT", ["a", "b"]), ("BOFT", ["b", "a"])])
def test_two_turns_of_the_input_act_in_order_and_two_of_boft_in_pefts_reverse(
    world: World, tmp_path: Path, name: str, order: list[str]
) -> None:
    a, b = world.folder(name), world.oracle.save(EVERY[name], tmp_path / "b", seed=2)
    ids = list(range(20))
    expected = world.oracle.logits(ids, world.oracle.stacked(a, b, "active"))
    with adaptrt.load(world.base, backend="reference", kv_dtype="f32") as model:
        model.load_adapter(a, name="a")
        model.load_adapter(b, name="b")
        assert relative_error(model.logits(ids, [(one, 1.0) for one in order]), expected) < 1e-4
        assert relative_error(model.logits(ids, [(one, 1.0) for one in order[::-1]]), expected) > 0.03


def test_boft_trained_without_its_extension_has_one_factor_whatever_the_option(
    world: World, tmp_path: Path
) -> None:
    folder = edited(world.folder("BOFT, one factor"), tmp_path / "a", {"boft_n_butterfly_factor": 4})
    (rotation,) = {
        low.rotation.shape for low in world.lower(import_peft(folder, world.variants, world.view)).values()
    } - {(8, 20, 20)}
    assert rotation == (8, 8, 8)


@pytest.mark.parametrize(
    ("size", "count", "seed"),
    [
        (1, 1, 0),
        (2, 2, 5),
        (64, 0, 1),
        (4096, 4096, 0),
        (4096, 50, 777),
        (10240, 1000, -3),
        (1 << 24, 99, (1 << 40) + 7),
    ],
)
def test_frequencies_lie_where_torch_draws_them(size: int, count: int, seed: int) -> None:
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    assert np.array_equal(first_of_permutation(size, count, seed), drawn)


class Wide:
    """A base weight of one size."""

    kind = "linear"
    shape = (2048, 512)

    def weight(self) -> np.ndarray:
        return np.ones(self.shape, np.float32)

    def bias(self) -> None:
        return None


OUT, IN = Wide.shape
BYTES = 4 * OUT * IN
DENSE: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "loha": ({"scale": 1.0}, {"w1_a": (OUT, 64), "w1_b": (64, IN), "w2_a": (OUT, 64), "w2_b": (64, IN)}),
    "miss": ({"rank": 64}, {"bat": (OUT // 64, 64, 64)}),
    "fourierft": ({"scale": 1.0, "seed": 7.0}, {"spectrum": (2000,)}),
    "c3a": ({"block": 64}, {"kernel": (OUT // 64, IN // 64, 64)}),
}


def test_what_has_more_ranks_than_kernels_are_made_for_is_multiplied_out_once_for_all_scales() -> None:
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((50, 40)).astype(np.float32), rng.standard_normal((40, 70)).astype(np.float32)
    wide = Lowered(terms=(LowRank(from_float32(u, "bf16"), Tensor.from_numpy(v), 0.5),))
    points = {name: AttachPoint("linear", out, 64) for name, out in (("smaller", 48), ("larger", 200))}
    made = [
        multiplied_out({"smaller": one, "larger": one}, points, widest_rank=32)
        for one in (wide, wide.scaled(3.0))
    ]
    for scale, found in zip((0.5, 1.5), made, strict=True):
        (term,) = found["smaller"].terms
        assert isinstance(term, LowRank) and term.u is None and term.scale == scale
        expected = to_float32(from_float32(u, "bf16"))[:48] @ v[:, :64]
        np.testing.assert_allclose(to_float32(term.v), expected, rtol=1e-5, atol=1e-5)
        assert (
            found["larger"].terms[0].u is wide.terms[0].u
        )  # 200 outputs have no room in 50 rows: refused later
    assert made[0]["smaller"].terms[0].v is made[1]["smaller"].terms[0].v
    assert multiplied_out({"smaller": wide}, points, widest_rank=40)["smaller"].terms == wide.terms


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_change_takes_no_more_memory_than_itself_and_another(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "PART_ELEMENTS", 1 << 14)
    params, shapes = DENSE[name]
    tensors = {role: Tensor.from_numpy(np.full(shape, 0.1, np.float32)) for role, shape in shapes.items()}
    tracemalloc.start()
    lowered = world.variants[name].lower(params, tensors, Wide())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (term,) = lowered.terms
    assert isinstance(term, LowRank) and term.u is None and term.nbytes == BYTES
    assert peak < 2.3 * BYTES
