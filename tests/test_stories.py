"""The real small model beside the checkout: the way of a user, against transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.oracle import Oracle

import adaptrt
from adaptrt.convert.base import ConvertOptions
from adaptrt.plugins import load_registry

PROMPT = "Once upon a time, there was a little girl named Lily."
STORY = (
    "She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was "
    "too high. Lily's mom said, \"Lily, let's go to the park.\""
)
CTX = 256
GRIMM_CHARS = 6_000


def convert(shared: Path, out: Path, dtype: str) -> Path:
    source = shared / "models" / "stories260K"
    load_registry().importers["hf"].convert(source, out, ConvertOptions(dtype=dtype), lambda *_: None)
    return out


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_float32_continues_the_story_word_for_word(
    shared: Path, tmp_path: Path, backend: str, precision: str
) -> None:
    path = convert(shared, tmp_path / "s.adrt", "f32")
    with adaptrt.load(path, backend=backend, precision=precision) as model:
        text = model.generate(PROMPT, max_tokens=90, temperature=0)
    assert " ".join(text.split()).startswith(STORY)  # its README wraps the lines anew


def test_perplexity_matches_transformers_on_the_same_weights(shared: Path, tmp_path: Path) -> None:
    path = convert(shared, tmp_path / "s.adrt", "nf4")
    text = (shared / "corpora" / "grimm.txt").read_text(encoding="utf-8")[100_000 : 100_000 + GRIMM_CHARS]
    with adaptrt.load(path) as model:
        ids = model.tokenize(text)
        found = {"fast": model.perplexity(text, ctx=CTX)}
    with adaptrt.load(path, precision="exact") as model:
        found["exact"] = model.perplexity(text, ctx=CTX)
    oracle = Oracle(shared / "models" / "stories260K", path)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, CTX):
        window = ids[start : start + CTX]
        log_probs = torch.log_softmax(torch.from_numpy(oracle.logits(window)).double(), -1)
        total -= float(log_probs[torch.arange(len(window) - 1), torch.tensor(window[1:])].sum())
        count += len(window) - 1
    expected = math.exp(total / count)
    assert found["exact"] == pytest.approx(expected, rel=1e-3)
    assert found["fast"] == pytest.approx(expected, rel=1e-2)
