"""Sampling against transformers' logits processors, and its own promises: seeds, greed, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adaptrt.engine.request import Sampling
from adaptrt.engine.sampler import Sampler
from adaptrt.errors import RequestError

VOCAB = 50
CONTEXT = [3, 3, 7, 11]


def expected_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """transformers' processors in llama.cpp's order."""
    ids, scores = torch.tensor([CONTEXT]), torch.tensor(logits)[None]
    steps = [RepetitionPenaltyLogitsProcessor(sampling.repeat_penalty)]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    steps += [TemperatureLogitsWarper(sampling.temperature)]
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.7},
    ],
)
def test_draws_follow_the_filtered_distribution(options: dict[str, float]) -> None:
    logits = (np.random.default_rng(0).standard_normal(VOCAB) * 2).astype(np.float32)
    sampling = Sampling.from_dict({**options, "seed": 1})
    expected = expected_distribution(logits, sampling)
    sampler, draws = Sampler(sampling), 8000
    counts = np.bincount([sampler.pick(logits, CONTEXT) for _ in range(draws)], minlength=VOCAB)
    assert not counts[expected == 0].any()
    error = np.abs(counts / draws - expected)
    assert (error <= 5 * np.sqrt(expected / draws) + 1e-9).all()  # five standard deviations


def test_greedy_is_argmax_after_the_penalty() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[3], logits[20] = 2.0, 1.5
    assert Sampler(Sampling(temperature=0)).pick(logits, CONTEXT) == 3
    assert Sampler(Sampling(temperature=0, repeat_penalty=2.0)).pick(logits, CONTEXT) == 20


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([0.0, 3.0, 2.0], np.float32)
    assert Sampler(Sampling(temperature=5e-324)).pick(logits, []) == 1


def test_numpy_s_numbers_are_numbers() -> None:
    options = Sampling(max_tokens=np.int64(3), seed=np.uint64(2**64 - 1), top_p=np.float32(0.5))  # type: ignore[arg-type]
    assert options == Sampling(max_tokens=3, seed=2**64 - 1, top_p=0.5)
    with pytest.raises(RequestError, match=r"max_tokens: found 1\.0, expected a whole number"):
        Sampling(max_tokens=np.float64(1))  # type: ignore[arg-type]


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    logits = np.zeros(VOCAB, np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed, top_k=0, top_p=1.0))
        return [sampler.pick(logits, []) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", "x"),
        ("repeat_penalty", 0.0),
        ("max_tokens", -1),
        ("seed", -1),
        ("stop", ("",)),
        ("temprature", 1.0),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        Sampling.from_dict({name: value})
