"""Every variant against PEFT in float32 on the same dequantized base: alone, scaled, stacked, in a mixed batch.

The errors are also the parity table of spec/adapters.md; ADAPTRT_WRITE_PARITY=1 writes it anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import Tensors, edited
from helpers.oracle import llama_folder, relative_error
from helpers.tiny import convert_model
from helpers.variant_cases import CASES, OPTIONS
from helpers.variant_oracle import Logits, VariantOracle

import adaptrt
from adaptrt.convert.base import ConvertOptions
from adaptrt.engine.scheduler import Sequence as Running
from adaptrt.engine.scheduler import Slice, build_batch
from adaptrt.plugins import load_registry

SPEC = Path(__file__).parents[1] / "spec" / "adapters.md"
BACKENDS = ("reference", "cpu")
LIMIT = 1e-4
MOVES = 0.03  # what an adapter must change at least, or the limit means nothing
IDS = np.random.default_rng(0).integers(0, 131, 24).tolist()
COLUMNS = ("single", "scaled 0.5", "stacked after LoRA", "mixed batch")
Stack = Sequence[tuple[str, float]]
STACKS: dict[str, Stack] = {
    "single": [("variant", 1.0)],
    "scaled 0.5": [("variant", 0.5)],
    "stacked after LoRA": [("lora", 1.0), ("variant", 1.0)],
}
LENGTHS = (24, 1, 17, 9, 23)  # of the sequences in the mixed batch


class Parity:
    """One base, PEFT's logits on it, ours on every backend, and the errors of each case, computed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        hf = llama_folder(path / "hf", attention_bias=True, mlp_bias=True)
        self.adrt = convert_model(hf, path / "base.adrt")
        self.oracle = VariantOracle(hf, self.adrt)
        self.lora = self.oracle.save(CASES["LoRA"], path / "lora", seed=100)
        self.plain = self.oracle.logits(IDS)
        self.beside = self.oracle.logits(IDS, self.oracle.single(self.lora))
        self.models = ExitStack()
        self._errors: dict[str, dict[str, float]] = {}

    @cached_property
    def backends(self) -> dict[str, adaptrt.Model]:
        found = {}
        for name in BACKENDS:
            model = adaptrt.load(self.adrt, backend=name, precision="exact", threads=2, kv_dtype="f32")
            found[name] = self.models.enter_context(model)
            model.load_adapter(self.lora, name="lora")
        return found

    def errors(self, name: str) -> dict[str, float]:
        """Worst relative logit error over the backends, by column: from the folder, and as stored in our file."""
        if name not in self._errors:
            folder = self.folder(name)
            expected = self.expected(name, folder)
            self._errors[name] = dict.fromkeys(COLUMNS, 0.0)
            stored = convert_adapter(folder, folder.with_suffix(".adrt"), self.adrt)
            for backend, model in self.backends.items():
                source = stored if backend == "cpu" else folder
                for column, error in compare(model, source, CASES[name].variant, expected).items():
                    self._errors[name][column] = max(error, self._errors[name][column])
        return self._errors[name]

    def folder(self, name: str) -> Path:
        """The PEFT folder of a case."""
        every = CASES | OPTIONS
        seed = list(every).index(name)
        return self.oracle.save(every[name], self.path / f"case{seed}", seed)

    def expected(self, name: str, folder: Path) -> dict[str, Logits]:
        """PEFT's logits for each of STACKS, for the LoRA alone and for the plain base; all of them differ."""
        models = {
            "single": self.oracle.single(folder),
            "scaled 0.5": self.oracle.scaled(folder, 0.5),
            "stacked after LoRA": self.oracle.stacked(self.lora, folder, CASES[name].stacking),
        }
        found = {"plain": self.plain, "lora": self.beside}
        for column, model in models.items():
            found[column] = self.oracle.logits(IDS, model)
            for other in found.keys() - {column}:
                assert relative_error(found[column], found[other]) > MOVES, f"{name}: {column} is {other}"
        return found


def convert_adapter(folder: Path, out: Path, base: Path) -> Path:
    """Convert a PEFT folder as the command does."""
    registry = load_registry()
    options = ConvertOptions(base=base, variants=registry.variants, architectures=registry.architectures)
    registry.importers["peft"].convert(folder, out, options, lambda *_: None)
    return out


def compare(
    model: adaptrt.Model, source: Path, variant: str, expected: dict[str, Logits]
) -> dict[str, float]:
    """Relative logit errors of one backend, by column."""
    stacks = {**STACKS, "plain": [], "lora": [("lora", 1.0)]}
    with loaded(model, source, variant):
        errors = {
            name: relative_error(model.logits(IDS, stack), expected[name]) for name, stack in STACKS.items()
        }
        rows = mixed_batch(
            model, [(IDS[:n], stack) for n, stack in zip(LENGTHS, stacks.values(), strict=True)]
        )
    errors["mixed batch"] = max(
        relative_error(found, expected[name][: len(found)]) for name, found in zip(stacks, rows, strict=True)
    )
    return errors


@contextmanager
def loaded(model: adaptrt.Model, source: Path, variant: str) -> Iterator[None]:
    """The adapter of a folder or file loaded as "variant", taken by the variant of this name."""
    model.load_adapter(source, name="variant")
    try:
        assert model.adapters["variant"].variant == variant
        yield
    finally:
        model.unload_adapter("variant")


def mixed_batch(model: adaptrt.Model, requests: Sequence[tuple[list[int], Stack]]) -> list[Logits]:
    """Logits of several sequences, each under its own stack, computed in one step."""
    with ExitStack() as pins:
        handles = [pins.enter_context(model._adapters.use(stack)) for _, stack in requests]
        model._executable.reserve(64)
        page = model._engine._pool.page_tokens
        starts = np.cumsum([0] + [-(-len(ids) // page) for ids, _ in requests]).tolist()
        slices = [
            Slice(Running(i, ids, handles[i], pages=list(range(starts[i], starts[i + 1]))), len(ids))
            for i, (ids, _) in enumerate(requests)
        ]
        logits = model._executable.step(build_batch(slices, range(sum(piece.count for piece in slices))))
        return np.split(logits, np.cumsum([piece.count for piece in slices])[:-1])


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parity]:
    made = Parity(tmp_path_factory.mktemp("parity"))
    with made.models:
        yield made


@pytest.mark.parametrize("name", CASES)
def test_logits_match_peft_alone_scaled_stacked_and_mixed(parity: Parity, name: str) -> None:
    for column, error in parity.errors(name).items():
        assert error <= LIMIT, column


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_means_what_it_means_in_peft(parity: Parity, name: str) -> None:
    folder = parity.folder(name)
    expected = parity.oracle.logits(IDS, parity.oracle.single(folder))
    assert relative_error(expected, parity.plain) > MOVES / 10
    for model in parity.backends.values():
        with loaded(model, folder, OPTIONS[name].variant):
            assert relative_error(model.logits(IDS, "variant"), expected) <= LIMIT


def test_thirty_two_adapters_of_five_variants_in_one_step_give_the_bits_of_each_alone(parity: Parity) -> None:
    """Ragged sequences, every one under an adapter of its own, on the native backend in `exact`."""
    model, names = parity.backends["cpu"], [f"a{i}" for i in range(32)]
    made = [parity.folder(name) for name in ("LoRA", "DoRA", "VeRA", "IA3", "HRA")]
    for i, name in enumerate(names):
        folder = edited(made[i % len(made)], parity.path / name, tensors=partial(disturbed, i))
        model.load_adapter(folder, name=name)
    rng = np.random.default_rng(4)
    requests: list[tuple[list[int], Stack]] = [
        (rng.integers(0, 131, 1 + 7 * i % 40).tolist(), [(name, 1.0)]) for i, name in enumerate(names)
    ]
    together = mixed_batch(model, requests)
    for (ids, stack), found in zip(requests, together, strict=True):
        assert np.array_equal(found, model.logits(ids, stack))
    for name in names:
        model.unload_adapter(name)


def disturbed(seed: int, tensors: Tensors) -> Tensors:
    """Every tensor but the shared ones times numbers around 1."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: tensor if "vera_A" in name or "vera_B" in name else tensor * noise(tensor, rng)
        for name, tensor in tensors.items()
    }


def noise(tensor: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return 1 + 0.2 * torch.rand(tensor.shape, generator=rng)


TABLE = re.compile(r"(?<=<!-- parity -->\n).*?(?=<!-- /parity -->)", re.DOTALL)


def test_the_table_in_the_spec_has_every_case_within_the_limit(parity: Parity) -> None:
    if not SPEC.exists():
        pytest.skip("spec/adapters.md is not beside the tests")
    text = SPEC.read_text(encoding="utf-8")
    if os.environ.get("ADAPTRT_WRITE_PARITY"):
        text = TABLE.sub(table({name: parity.errors(name) for name in CASES}), text)
        SPEC.write_text(text, encoding="utf-8")
    (found,) = TABLE.findall(text)
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines())
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in lines}
    assert header == ["variant", *COLUMNS] and list(rows) == list(CASES)
    assert all(0 < error <= LIMIT for errors in rows.values() for error in errors)


def table(errors: dict[str, dict[str, float]]) -> str:
    """The errors as Markdown, one digit each."""
    lines = [["variant", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *(f"{row[column]:.0e}" for column in COLUMNS)] for name, row in errors.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
