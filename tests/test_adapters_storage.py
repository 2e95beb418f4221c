"""Adapters as sections: round trips, wrong bases, hostile sections."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import open_view, perturbed_peft
from helpers.oracle import SHAPES, llama_folder
from helpers.tiny import convert_model

from adaptrt.adapters.base import BaseView
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import check_base, list_adapters, read_adapter, write_adapter
from adaptrt.adapters.variant import Adapter
from adaptrt.convert.peft import import_peft
from adaptrt.errors import AdapterError, BaseMismatchError, MissingError
from adaptrt.format import Writer, append, open_file
from adaptrt.plugins import load_registry
from adaptrt.tensor import Tensor

VARIANTS = load_registry().variants
NAMES = ("plain", "biased", "scaled")


class World:
    """A base, the same with other weights, and three adapters that say which base they are for."""

    def __init__(self, path: Path) -> None:
        hf = llama_folder(path / "hf", **SHAPES["biases"])
        self.base = convert_model(hf, path / "base.adrt", dtype="f32", head="f32")
        self.view = open_view(self.base)
        self.other = open_view(convert_model(hf, path / "other.adrt", dtype="f32", head="int8"))
        folders = [
            perturbed_peft(path / "plain", hf, target_modules=["q_proj"], dtype=torch.bfloat16),
            perturbed_peft(path / "biased", hf, bias="all", lora_bias=True, target_modules=["v_proj"]),
            perturbed_peft(path / "scaled", hf, use_rslora=True, target_modules=["embed_tokens"]),
        ]
        self.adapters = {
            folder.name: replace(import_peft(folder, VARIANTS, self.view), base=self.view.record())
            for folder in folders
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def same(first: Adapter, second: Adapter) -> bool:
    plain = [replace(adapter, tensors={}) for adapter in (first, second)]
    return plain[0] == plain[1] and all(
        (a.dtype, a.shape, a.data.tobytes()) == (b.dtype, b.shape, b.data.tobytes())
        for a, b in (
            (first.tensors[name], second.tensors[name])
            for name in first.tensors.keys() | second.tensors.keys()
        )
    )


def test_adapters_come_back_as_they_were_and_lower_the_same(world: World, tmp_path: Path) -> None:
    path = tmp_path / "three.adrt"
    with Writer(path, {}) as writer:
        write_adapter(writer, world.adapters["plain"])
    with append(path) as appender:
        write_adapter(appender, world.adapters["biased"])
        write_adapter(appender, world.adapters["scaled"])
    with open_file(path) as file:
        assert list_adapters(file) == list(NAMES)
        for name in NAMES:
            stored, made = read_adapter(file, f"adapter/{name}"), world.adapters[name]
            assert same(stored, made)
            check_base(stored, world.view)
            lowered = [lower(adapter, VARIANTS, world.view, 0.7) for adapter in (stored, made)]
            assert lowered[0].keys() == lowered[1].keys()
            for target, found in lowered[0].items():
                expected = lowered[1][target]
                assert [term.scale for term in found.terms] == [term.scale for term in expected.terms]
                assert (found.c is None) == (expected.c is None)
                assert found.c is None or np.array_equal(found.c, expected.c)  # type: ignore[arg-type]
    with open_file(world.base) as file:
        assert list_adapters(file) == []


def test_reading_what_is_no_adapter_is_refused(world: World) -> None:
    with open_file(world.base) as file:
        with pytest.raises(MissingError, match="no section 'adapter/plain'"):
            read_adapter(file, "adapter/plain")
        with pytest.raises(AdapterError, match="base: section of kind 'base', expected an adapter"):
            read_adapter(file, "base")


def test_a_wrong_base_is_refused_saying_what_differs(world: World) -> None:
    adapter = world.adapters["plain"]
    with pytest.raises(BaseMismatchError) as caught:
        check_base(adapter, world.other)
    message = str(caught.value)
    total = len(world.view.tensors)
    here, there = (view.tensors["token_embd.weight"][2] for view in (world.other, world.view))
    assert f"differs in 2 of {total} tensors" in message
    assert f"token_embd.weight is int8 [131, 64] {here} here, expected f32 [131, 64] {there}" in message
    assert re.search(r"output.weight is int8 \[131, 64\] \w{16} here", message) and "\n" not in message
    check_base(replace(adapter, base={}), world.other)  # straight from a PEFT folder: nothing is known

    smaller = {name: entry for name, entry in world.view.tensors.items() if name != "blk.0.attn_q.weight"}
    record = dict(adapter.base) | {"fingerprint": "0" * 64, "tensors": smaller}
    with pytest.raises(
        BaseMismatchError, match=rf"differs in 1 of {total} tensors: .* here, expected absent"
    ):
        check_base(replace(adapter, base=record), world.view)
    record = dict(adapter.base) | {"architecture": "gemma"}
    with pytest.raises(BaseMismatchError, match=r"\(gemma, \w{16}\): this one, .* \(llama"):
        check_base(replace(adapter, base=record), world.view)


Metadata = dict[str, Any]


def put(value: Any, *path: Any) -> Callable[[Metadata], None]:
    """An edit that sets one place of the metadata."""

    def edit(metadata: Metadata) -> None:
        place: Any = metadata
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


def drop(*path: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        place: Any = metadata
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return edit


def twice(metadata: Metadata) -> None:
    metadata["targets"].append(metadata["targets"][0])


T0 = ("targets", 0)
HOSTILE: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "no targets": (drop("targets"), "found ['base', 'config', 'notes', 'variant'], expected"),
    "extra field": (put(1, "more"), "expected ['base', 'config', 'notes', 'targets', 'variant']"),
    "variant": (put(7, "variant"), "variant is 7, expected str"),
    "targets": (put({}, "targets"), "targets is {}, expected list"),
    "notes": (put([1], "notes"), "notes are not all strings"),
    "target": (put([], *T0), "targets[0]: found [], expected ['params', 'target', 'tensors']"),
    "target name": (put(3, *T0, "target"), "targets[0]: target is 3, expected str"),
    "listed twice": (twice, "blk.0.attn_q: listed twice"),
    "no tensors": (put({}, *T0, "tensors"), "blk.0.attn_q: has no tensors"),
    "missing tensor": (put("gone", *T0, "tensors", "A"), "role 'A' names tensor 'gone', which is missing"),
    "tensor list": (put([], *T0, "tensors", "A"), "role 'A' names tensor [], which is missing"),
    "left over": (drop(*T0, "tensors", "A"), "lora_A.weight' belongs to no target"),
    "param list": (put([1], *T0, "params", "rank"), "param 'rank' is [1], expected a finite number"),
    "param null": (put(None, *T0, "params", "scale"), "param 'scale' is None, expected a finite number"),
    "base": (put({"fingerprint": "x"}, "base"), "base: found ['fingerprint'], expected"),
    "base name": (put(1, "base", "name"), "base: name is 1, expected str"),
    "base tensor": (
        put(["f32", 3, "x"], "base", "tensors", "output.weight"),
        "base: 'output.weight' is ['f32', 3, 'x']",
    ),
    "base shape": (
        put(["f32", ["3"], "x"], "base", "tensors", "output.weight"),
        "expected [dtype, shape, digest]",
    ),
}

# What only the variant and the base can tell.
UNFIT: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "variant": (put("magic", "variant"), "needs a plugin for variant 'magic', installed: "),
    "target": (
        put("blk.9.attn_q", *T0, "target"),
        "target 'blk.9.attn_q': the base has no such tensor to adapt",
    ),
    "wider target": (
        put("blk.0.ffn_up", *T0, "target"),
        "lora_B.weight is [64, 4], expected [160, 4] (out, rank)",
    ),
    "rank": (put(5, *T0, "params", "rank"), "lora_A.weight is [4, 64], expected [5, 64] (rank, in)"),
    "rank 0": (put(0, *T0, "params", "rank"), "param rank is 0, expected a whole number above 0"),
    "rank true": (put(True, *T0, "params", "rank"), "param rank is True, expected a whole number above 0"),
    "rank text": (put("4", *T0, "params", "rank"), "param rank is '4', expected a whole number above 0"),
    "no rank": (drop(*T0, "params", "rank"), "param rank is missing"),
    "scale text": (put("1", *T0, "params", "scale"), "param scale is '1', expected a finite number"),
    "scale huge": (put(1e300, *T0, "params", "scale"), "scale0 is 1e+300, expected a finite float32"),
    "no scale": (drop(*T0, "params", "scale"), "param scale is missing"),
    "more params": (put(1, *T0, "params", "gain"), "param gain is unknown to variant lora"),
}


def swap(metadata: Metadata) -> None:
    roles = metadata["targets"][0]["tensors"]
    roles["A"], roles["B"] = roles["B"], roles["A"]


def rename_role(metadata: Metadata) -> None:
    roles = metadata["targets"][0]["tensors"]
    roles["C"] = roles.pop("A")


UNFIT["swapped"] = (swap, "lora_B.weight is [64, 4], expected [4, 64] (rank, in)")
UNFIT["role"] = (rename_role, "tensor A is missing; blk.0.attn_q: role 'C' is unknown to variant lora")


def rewritten(world: World, path: Path, edit: Callable[[Metadata], None]) -> Path:
    """The adapter `plain` as a file whose metadata was edited."""
    with Writer(path.with_suffix(".good"), {}) as writer:
        write_adapter(writer, world.adapters["plain"])
    with open_file(path.with_suffix(".good")) as file, Writer(path, {}) as writer:
        metadata = copy.deepcopy(file.sections["adapter/plain"].metadata)
        edit(metadata)
        with writer.section("adapter/plain", kind="adapter", codec="zstd", metadata=metadata) as section:
            for name, tensor in file.read_section("adapter/plain").items():
                section.add(name, tensor)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_section_is_refused(case: str, world: World, tmp_path: Path) -> None:
    edit, expected = HOSTILE[case]
    with (
        open_file(rewritten(world, tmp_path / "a.adrt", edit)) as file,
        pytest.raises(AdapterError) as caught,
    ):
        read_adapter(file, "adapter/plain")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", UNFIT)
def test_a_section_that_does_not_fit_is_refused(case: str, world: World, tmp_path: Path) -> None:
    edit, expected = UNFIT[case]
    with open_file(rewritten(world, tmp_path / "a.adrt", edit)) as file:
        adapter = read_adapter(file, "adapter/plain")
    with pytest.raises(AdapterError) as caught:
        lower(adapter, VARIANTS, world.view, 1.0)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_nothing_is_refused(world: World) -> None:
    with pytest.raises(AdapterError, match="adapter 'plain': it adapts nothing"):
        lower(replace(world.adapters["plain"], targets=(), tensors={}), VARIANTS, world.view, 1.0)


def test_stored_tensors_are_checked_like_imported_ones(world: World) -> None:
    adapter = world.adapters["plain"]
    [name] = [name for name in adapter.tensors if "layers.0" in name and "lora_A" in name]
    wrong = {
        "holds NaN or infinity (256 of 256 values)": Tensor.from_numpy(np.full((4, 64), np.nan, np.float32)),
        "is of dtype u8, expected f32, f16, bf16": Tensor.from_numpy(np.zeros((4, 64), np.uint8)),
    }
    for expected, tensor in wrong.items():
        bad = replace(adapter, tensors={**adapter.tensors, name: tensor})
        with pytest.raises(AdapterError, match=re.escape(expected)):
            lower(bad, VARIANTS, world.view, 1.0)


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    """What a frozen copy is compared with, in every dtype a base may be stored in; blocks cross the rows' ends."""
    hf = llama_folder(tmp_path / "hf", hidden_size=72, num_attention_heads=4, num_key_value_heads=4)
    for dtype in ("f32", "bf16", "int8", "nf4"):
        view: BaseView = open_view(convert_model(hf, tmp_path / f"{dtype}.adrt", dtype=dtype, head=dtype))
        base = view.targets["token_embd"]
        for start, stop in ((0, 64), (0, 131), (1, 2), (7, 60), (130, 131), (64, 64)):
            assert np.array_equal(base.rows(start, stop), base.weight()[start:stop])
