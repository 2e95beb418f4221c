"""aLoRA: an adapter acts from the last match of its invocation tokens in the prompt, as in PEFT."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import edited, open_view, perturbed_peft
from helpers.oracle import Oracle, relative_error
from helpers.tiny import convert_model, tiny_folder
from peft import PeftModel

import adaptrt
from adaptrt.adapters.check import check_adapter
from adaptrt.adapters.problems import Problems
from adaptrt.convert.peft import import_peft
from adaptrt.engine.scheduler import Sequence, Slice, build_batch
from adaptrt.errors import AdaptrtError
from adaptrt.plugins import load_registry

INVOKE = [40, 41, 42]
PROMPTS = {
    "middle": [0, 9, 8, *INVOKE, 7, 6, 5],
    "twice": [0, *INVOKE, 8, 9, *INVOKE, 7],
    "start": [*INVOKE, 1, 2],
    "end": [0, 1, 2, 3, *INVOKE],
    "none": [0, 40, 41, 9, 42, 40, 41],
    "cut short": [0, *INVOKE, 3, 40, 41],
}


@dataclass
class World:
    adrt: Path
    folder: Path
    oracle: Oracle

    def peft(self) -> PeftModel:
        """A PEFT model with the adapter, which finds the invocation in what it is given."""
        return PeftModel.from_pretrained(copy.deepcopy(self.oracle.model), self.folder).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("alora")
    hf = tiny_folder(path / "hf")
    adrt = convert_model(hf, path / "base.adrt")
    folder = perturbed_peft(path / "a", hf, alora_invocation_tokens=INVOKE)
    return World(adrt, folder, Oracle(hf, adrt))


def load(world: World, backend: str) -> adaptrt.Model:
    model = adaptrt.load(world.adrt, backend, threads=2, precision="exact", kv_dtype="f32")
    model.load_adapter(world.folder)
    return model


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_are_pefts_wherever_the_invocation_is(world: World, backend: str) -> None:
    peft = world.peft()
    with load(world, backend) as model:
        for name, ids in PROMPTS.items():
            with torch.no_grad():
                expected = peft(torch.tensor([ids])).logits[0].numpy()
            found, plain = model.logits(ids, "a"), model.logits(ids)
            assert relative_error(found, expected) <= 1e-4, name
            at = max((i for i in range(len(ids)) if ids[i : i + 3] == INVOKE), default=len(ids))
            assert not at or relative_error(found[:at], plain[:at]) <= 1e-6, name
            assert backend != "cpu" or np.array_equal(found[:at], plain[:at]), "the base's, to the bit"
            assert at == len(ids) or relative_error(found[at:], plain[at:]) > 0.02, name


def test_what_is_generated_does_not_move_the_position(world: World) -> None:
    """Greedy ids as PEFT generates them, for prompts with and without the invocation, in one batch."""
    peft = world.peft()
    with load(world, "cpu") as model:
        sampling = adaptrt.Sampling(max_tokens=20, temperature=0)
        requests = [adaptrt.Request(ids, "a", sampling) for ids in PROMPTS.values()]
        found: dict[int, list[int]] = {i: [] for i in range(len(requests))}
        for chunk in model.generate_batch(requests):
            found[chunk.index] += chunk.token_ids
    for index, ids in enumerate(PROMPTS.values()):
        out = peft.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )
        expected = [token for token in out[0, len(ids) :].tolist() if token != 1]
        assert found[index] == expected


def test_it_stacks_with_adapters_that_act_everywhere(world: World, tmp_path: Path) -> None:
    lora = edited(world.folder, tmp_path / "lora", {"alora_invocation_tokens": None, "lora_alpha": 3})
    peft = world.peft()
    peft.load_adapter(lora, "everywhere")
    peft.base_model.set_adapter(["default", "everywhere"])
    ids = PROMPTS["twice"]
    with torch.no_grad():
        expected = peft(torch.tensor([ids]), alora_offsets=[len(ids) - 6]).logits[0].numpy()
    with load(world, "cpu") as model:
        model.load_adapter(lora, "everywhere")
        stack = ["a", "everywhere"]
        assert relative_error(model.logits(ids, stack), expected) <= 1e-4
        assert np.array_equal(model.logits(ids, stack)[:6], model.logits(ids, "everywhere")[:6])


def test_perplexity_runs_each_window_as_a_prompt(world: World) -> None:
    text = "abcABCabc and some more of the text ABC"
    with load(world, "cpu") as model:
        invoke = model.tokenize("ABC", add_special_tokens=False)
        ids = model.tokenize(text)
    peft = world.peft()
    peft.peft_config["default"].alora_invocation_tokens = invoke
    total, window = 0.0, 16
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            scores = torch.log_softmax(peft(piece[None]).logits[0], -1)
        total -= float(scores[torch.arange(len(piece) - 1), piece[1:]].sum())
    windows = -(-len(ids) // window)
    with adaptrt.load(world.adrt, "cpu", precision="exact", kv_dtype="f32") as model:
        adapter = import_peft(world.folder, load_registry().variants, open_view(world.adrt))
        text_of = " ".join(map(str, invoke))
        targets = tuple(
            replace(t, params={**t.params, "invocation_tokens": text_of}) for t in adapter.targets
        )
        model._adapters.add("a", replace(adapter, targets=targets))
        found = model.perplexity(text, "a", ctx=window)
    assert found == pytest.approx(math.exp(total / (len(ids) - windows)), rel=1e-4)


def test_a_slice_is_cut_into_runs_where_the_stack_changes() -> None:
    sequence = Sequence(0, list(range(10, 22)), (7, 8, 9), computed=2, pages=[4, 5], starts=(0, 5, 9))
    batch = build_batch([Slice(sequence, 8), Slice(Sequence(1, [3], (7,)), 1)], [])
    assert batch.run_start.tolist() == [0, 3, 7, 8, 9]
    assert batch.stack_start.tolist() == [0, 1, 3, 6, 7]
    assert batch.stacks.tolist() == [7, 7, 8, 7, 8, 9, 7]
    assert batch.positions.tolist() == [*range(2, 10), 0]
    assert batch.tokens.tolist() == [*range(12, 20), 3]
    assert batch.pages.tolist() == [4, 5] * 3 and batch.page_start.tolist() == [0, 2, 4, 6, 6]


def test_what_makes_no_sense_is_refused(world: World, tmp_path: Path) -> None:
    variants, view = load_registry().variants, open_view(world.adrt)
    for tokens in ([], [-1], [1.5], "AB"):
        bad = edited(world.folder, tmp_path / repr(tokens), {"alora_invocation_tokens": tokens})
        if tokens:
            with pytest.raises(
                AdaptrtError, match=r"alora_invocation_tokens = .*expected a list of token ids"
            ):
                import_peft(bad, variants, view)
    beyond = edited(
        world.folder, tmp_path / "beyond", {"alora_invocation_tokens": [5, view.program.vocab_size]}
    )
    with pytest.raises(AdaptrtError, match=r"invocation_tokens is '5 \d+', expected token ids from 0 to \d+"):
        import_peft(beyond, variants, view)
    adapter = import_peft(world.folder, variants, view)
    first, *rest = adapter.targets
    for text, expected in (("40 41", "act from different positions"), ("40  41", "expected token ids")):
        other = replace(first, params={**first.params, "invocation_tokens": text})
        problems = Problems()
        check_adapter(replace(adapter, targets=(other, *rest)), variants["alora"], view.targets, problems)
        assert expected in "; ".join(problems.lines)
