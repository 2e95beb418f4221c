"""The whole way, file to logits, against transformers + PEFT in float32 on the same dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.oracle import SHAPES, Oracle, llama_folder, peft_folder, relative_error

import adaptrt
from adaptrt.convert.base import ConvertOptions
from adaptrt.plugins import load_registry

TOLERANCE = {"exact": 1e-4, "fast": 2e-2}
IDS = np.random.default_rng(0).integers(0, 131, 45).tolist()
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {"r": 16, "lora_alpha": 4, "use_rslora": True},
    {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 5},
    },
]
STACKS = {"none": [], "one": [(0, 1.0)], "three": [(1, 0.7), (0, -1.3), (2, 1.0)]}


class Case:
    """A converted model, its adapters as PEFT folders, and the oracle."""

    def __init__(self, path: Path, shape: str) -> None:
        self.folder = llama_folder(path / "hf", **SHAPES[shape])
        self.adrt = path / "base.adrt"
        registry = load_registry()
        registry.importers["hf"].convert(self.folder, self.adrt, ConvertOptions(), lambda *_: None)
        self.adapters = [
            peft_folder(path / f"a{i}", self.folder, i, **options) for i, options in enumerate(ADAPTERS)
        ]
        oracle = Oracle(self.folder, self.adrt)
        self.expected = {
            name: oracle.logits(IDS, [(self.adapters[i], scale) for i, scale in stack])
            for name, stack in STACKS.items()
        }


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def load(case: Case, backend: str, precision: str) -> adaptrt.Model:
    model = adaptrt.load(case.adrt, backend=backend, precision=precision, threads=2, kv_dtype="f32")
    for i, folder in enumerate(case.adapters):
        model.load_adapter(folder, name=f"a{i}")
    return model


@pytest.mark.parametrize(
    ("backend", "precision"), [("reference", "exact"), ("cpu", "exact"), ("cpu", "fast")]
)
def test_logits_match_transformers_and_peft(case: Case, backend: str, precision: str) -> None:
    with load(case, backend, precision) as model:
        for name, stack in STACKS.items():
            found = model.logits(IDS, [(f"a{i}", scale) for i, scale in stack])
            assert relative_error(found, case.expected[name]) <= TOLERANCE[precision], name
    # the tolerance means something only if the adapters move the logits far more than it allows
    for name in ("one", "three"):
        assert relative_error(case.expected[name], case.expected["none"]) > 10 * TOLERANCE["fast"]


def test_mixed_batch_equals_each_alone_to_the_last_bit(case: Case) -> None:
    """Greedy ids of eight prompts with different stacks, and the logits along them, batched and alone."""
    rng = np.random.default_rng(1)
    stacks = [[(f"a{i}", scale) for i, scale in stack] for stack in STACKS.values()]
    requests = [
        adaptrt.Request(
            rng.integers(0, 131, size).tolist(), stacks[i % 3], adaptrt.Sampling(max_tokens=12, temperature=0)
        )
        for i, size in enumerate([1, 3, 17, 40, 33, 2, 64, 8])
    ]
    with load(case, "cpu", "exact") as model:
        batched: dict[int, list[int]] = {i: [] for i in range(len(requests))}
        for chunk in model.generate_batch(requests):
            batched[chunk.index] += chunk.token_ids
        for i, request in enumerate(requests):
            alone = [t for chunk in model.generate_batch([request]) for t in chunk.token_ids]
            assert batched[i] == alone


def test_ragged_steps_give_the_same_bits(case: Case) -> None:
    """Logits of three sequences stepped together in odd pieces equal those of each run alone, bit for bit."""
    from adaptrt.engine.scheduler import Sequence, Slice, build_batch

    rng = np.random.default_rng(2)
    with load(case, "cpu", "exact") as model:
        executable = model._executable
        executable.reserve(64)
        spec = [[("a0", 1.0)], [("a1", 0.7), ("a0", -1.3), ("a2", 1.0)], []]
        prompts = [rng.integers(0, 131, size).tolist() for size in (37, 50, 5)]
        alone = [model.logits(ids, stack) for ids, stack in zip(prompts, spec, strict=True)]
        handles = []
        for stack in spec:
            with model._adapters.use(stack) as stack_handles:
                handles.append(stack_handles)
        sequences = [
            Sequence(i, ids, handles[i], pages=list(range(20 + 4 * i, 24 + 4 * i)))
            for i, ids in enumerate(prompts)
        ]
        together: list[list[np.ndarray]] = [[], [], []]
        while any(s.pending for s in sequences):
            pieces = [Slice(s, min(s.pending, 1 + 7 * s.index)) for s in sequences if s.pending]
            logits = executable.step(build_batch(pieces, range(sum(p.count for p in pieces))))
            start = 0
            for piece in pieces:
                together[piece.sequence.index].append(logits[start : start + piece.count].copy())
                start += piece.count
                piece.sequence.computed += piece.count
        for rows, expected in zip(together, alone, strict=True):
            assert np.array_equal(np.concatenate(rows), expected)
