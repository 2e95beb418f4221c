"""A token's logits are the same to the last bit however it is batched, chunked or threaded, in `exact` and `fast`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.isas import FLOAT_ISAS, INTEGER_ISAS, load_on_cpu

from adaptrt.adapters.normal import Lowered, LoweredAdapter, LowRank
from adaptrt.backends.base import Executable, LoadOptions, attach_points
from adaptrt.quant.plain import from_float32
from adaptrt.testing.programs import Model, Pages, Run, Sizes, adapter, batch, decoder, everything, random

OPTIONS = LoadOptions(threads=1, precision="exact", page_tokens=4)
SEQUENCES = [
    [5, 9, 2, 30, 7, 7, 1, 22, 3, 14, 6],
    [1],
    [8, 8, 8, 8, 8],
    [3, 4],
    [12, 0, 19, 25, 2, 31, 6],
    *([7, 3, 9], [2, 2, 5, 1], [6], [11, 30, 4, 4, 4, 4]),
]
STACKS = [(0, 1), (), (0,), (2, 1), (1, 2), (3,), (4,), (), (4, 0, 3)]  # 3 and 4 share U and V
MODELS = {
    "nf4": decoder(Sizes(layers=1)),
    "nf4 odd": decoder(Sizes(width=75, heads=3, kv_heads=1, head_dim=10, mlp=43, vocabulary=37, layers=1)),
    "nf4 long": decoder(
        Sizes(width=192, heads=3, kv_heads=1, head_dim=64, mlp=1216, vocabulary=300, layers=1)
    ),
    "bf16": decoder(Sizes(layers=1), dtype="bf16", head="f16"),
    "int8": decoder(Sizes(layers=1), dtype="int8", head="f32"),
}


def sharing(made: Model, rank: int, count: int) -> list[LoweredAdapter]:
    """Adapters with one U and one V for all targets, two vectors for each, as VeRA's."""
    points = {t: at for t, at in attach_points(made.program, made.tensors).items() if at.kind == "linear"}
    u = from_float32(random(1, max(at.out for at in points.values()), rank, scale=0.1), "bf16")
    v = from_float32(random(2, rank, max(at.inner for at in points.values()), scale=0.1), "bf16")

    def lowered(seed: int, out: int) -> Lowered:
        return Lowered((LowRank(u, v, 0.5, d=random(seed, rank), e=random(seed + 1, out)),))

    return [
        {target: lowered(1000 * i + 10 * k, at.out) for k, (target, at) in enumerate(points.items())}
        for i in range(count)
    ]


def load(model: str, **options: Any) -> Executable:
    made = MODELS[model]
    executable = load_on_cpu(made, OPTIONS, **options)
    for seed, dtype, rank in ((1, "bf16", 6), (2, "f32", 17)):
        executable.attach(adapter(made, seed, dtype, rank))
    executable.attach(everything(made, 3))
    for shared in sharing(made, 128, 2):
        executable.attach(shared)
    executable.reserve(64)
    return executable


def alone(executable: Executable) -> list[np.ndarray]:
    """Each sequence in a step of its own, whole."""
    results = []
    for tokens, stack in zip(SEQUENCES, STACKS, strict=True):
        pages = Pages(OPTIONS.page_tokens, 64).take(len(tokens))
        results.append(executable.step(batch([Run(tokens, 0, pages, stack)])))
    return results


def together(executable: Executable, chunks: list[list[int]]) -> list[np.ndarray]:
    """All sequences in the same steps, sequence i cut into chunks[i][step] tokens."""
    pages = Pages(OPTIONS.page_tokens, 64)
    taken = [pages.take(len(tokens)) for tokens in SEQUENCES]
    done, results = [0] * len(SEQUENCES), [[] for _ in SEQUENCES]
    for step in range(len(chunks[0])):
        picked = [i for i in range(len(SEQUENCES)) if chunks[i][step]]
        runs = [
            Run(SEQUENCES[i][done[i] : done[i] + chunks[i][step]], done[i], taken[i], STACKS[i])
            for i in picked
        ]
        logits = np.split(executable.step(batch(runs)), np.cumsum([len(run.tokens) for run in runs])[:-1])
        for i, run, rows in zip(picked, runs, logits, strict=True):
            done[i] += len(run.tokens)
            results[i].append(rows)
    return [np.concatenate(rows) for rows in results]


WHOLE = [[len(tokens)] for tokens in SEQUENCES]
CHUNKED = [
    *([3, 1, 5, 2], [0, 0, 1, 0], [1, 1, 1, 2], [0, 2, 0, 0], [4, 0, 0, 3]),
    *([1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 4, 0, 1]),
]


@pytest.mark.parametrize(
    ("isa", "precision"),
    [*((isa, "exact") for isa in FLOAT_ISAS), *((isa, "fast") for isa in INTEGER_ISAS)],
)
@pytest.mark.parametrize("model", MODELS)
def test_batches_chunks_and_threads_change_no_bit(model: str, isa: str, precision: str) -> None:
    expected = alone(load(model, isa=isa, precision=precision))
    for threads in (1,) if isa.startswith("neon") else (1, 2, 3):
        executable = load(model, isa=isa, threads=threads, precision=precision)
        for chunks in (WHOLE, CHUNKED):
            for found, wanted in zip(together(executable, chunks), expected, strict=True):
                np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("isa", INTEGER_ISAS)
def test_fast_differs_from_exact_so_that_the_equality_above_means_something(isa: str) -> None:
    exact, fast = (alone(load("nf4", isa=isa, precision=p))[0] for p in ("exact", "fast"))
    assert (exact != fast).mean() > 0.5


def test_runs_of_one_sequence_share_pages_within_a_step() -> None:
    """A sequence whose stack changes inside a step: the second run attends to what the first one stored."""
    executable = load("nf4")
    tokens, pages = SEQUENCES[0], list(range(3))
    executable.step(batch([Run(tokens[:6], 0, pages, (0,))]))
    expected = executable.step(batch([Run(tokens[6:], 6, pages, (1,))]))
    found = executable.step(batch([Run(tokens[:6], 0, pages, (0,), []), Run(tokens[6:], 6, pages, (1,))]))
    np.testing.assert_array_equal(found, expected)


def test_logit_rows_in_any_order_and_none() -> None:
    executable = load("nf4", threads=2)
    runs = [Run(SEQUENCES[0], 0, [0, 1, 2], STACKS[0]), Run(SEQUENCES[2], 0, [5, 4], STACKS[2])]
    every = executable.step(batch(runs))
    rows = np.array([15, 0, 11, 11, 10, 3], np.int32)
    found = executable.step(replace(batch(runs), logit_rows=rows))
    np.testing.assert_array_equal(found, every[rows])
    assert executable.step(replace(batch(runs), logit_rows=rows[:0])).shape == (0, every.shape[1])
