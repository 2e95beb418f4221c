"""The built-in demo model: small, sound, and its adapters really speak differently."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import adaptrt_cli

import adaptrt
from adaptrt.api import DEMO
from adaptrt.format import verify

VOICES = {"scripture": "kjv.txt", "bard": "shakespeare.txt", "president": "presidents.txt"}


def test_the_file_is_small_and_sound() -> None:
    assert os.path.getsize(DEMO) <= 4_000_000  # noqa: PTH202
    assert verify(DEMO) == []
    with adaptrt.load("demo") as model:
        assert len(model.stored_adapters) >= 3 and set(VOICES) <= set(model.stored_adapters)


@pytest.mark.parametrize("voice", VOICES)
def test_each_adapter_lowers_the_perplexity_of_its_own_voice(shared: Path, voice: str) -> None:
    text = (shared / "corpora" / VOICES[voice]).read_text(encoding="utf-8")
    sample = text[len(text) // 2 : len(text) // 2 + 4000]
    with adaptrt.load("demo") as model:
        # short windows: with little context to go by, the base cannot guess the voice
        assert model.perplexity(sample, voice, ctx=16) < 0.95 * model.perplexity(sample, {}, ctx=16)


def test_fast_keeps_the_perplexity_of_exact(shared: Path) -> None:
    text = (shared / "corpora" / "wikitext2-valid.txt").read_text(encoding="utf-8")[:6000]
    found = []
    for precision in ("exact", "fast"):
        with adaptrt.load("demo", precision=precision) as model:
            found.append(model.perplexity(text))
    assert np.isclose(*found, rtol=1e-3)


def test_the_demo_is_a_base_by_name_wherever_one_is_read(tmp_path: Path) -> None:
    made, folder = tmp_path / "both.adrt", tmp_path / "folder"
    for command in (
        ["adapter", "combine", made, "bard:0.5", "--base", "demo"],
        ["pack", tmp_path / "packed.adrt", "demo", made],
        ["convert", made, "-o", folder, "--to", "peft"],
        ["convert", folder, "-o", tmp_path / "again.adrt", "--base", "demo"],
    ):
        outcome = adaptrt_cli(*command)
        assert outcome.code == 0, outcome.err


def test_run_demo_without_a_prompt_continues_its_own() -> None:
    plain = adaptrt_cli("run", "demo", "-n", "12", "--temp", "0")
    voiced = adaptrt_cli("run", "demo", "-n", "12", "--temp", "0", "-a", "scripture")
    assert plain.code == voiced.code == 0
    assert plain.out.strip() and plain.out != voiced.out
