"""Timed steps over an executable, interleaved in rounds so that noise falls on every scenario alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.backends.base import Batch, Executable
from adaptrt.program import Embed, Program
from adaptrt.tensor import Tensor


@dataclass
class Scenario:
    """`len(stacks)` streams that each run `n_tokens` tokens a step; `seconds` of one step, a value per round."""

    name: str
    stacks: Sequence[tuple[int, ...]]
    n_tokens: int
    step_bytes: int  # weights and adapters that one step must read
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Over all streams, median of the rounds."""
        return len(self.stacks) * self.n_tokens / statistics.median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        """Median of the rounds."""
        return self.step_bytes / statistics.median(self.seconds)

    def ratio_to(self, other: Scenario) -> list[float]:
        """This scenario's step time over another's, [min, median, max] of the rounds."""
        ratios = sorted(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))
        return [ratios[0], statistics.median(ratios), ratios[-1]]


def weight_bytes(program: Program, tensors: dict[str, Tensor]) -> int:
    """Bytes of weights that a step reads whole: everything but an embedding table that only gives rows."""
    tables = {op.weight for op in program.ops if isinstance(op, Embed)}
    read = {op.weight for op in program.ops if not isinstance(op, Embed) and hasattr(op, "weight")}
    return sum(tensor.data.nbytes for name, tensor in tensors.items() if name in read or name not in tables)


def adapter_bytes(adapter: LoweredAdapter) -> int:
    """Bytes of an adapter's factors."""
    return sum(
        term.u.data.nbytes + term.v.data.nbytes for lowered in adapter.values() for term in lowered.terms
    )


@dataclass(frozen=True)
class Bench:
    """Runs scenarios on one executable; every stream owns `max_tokens` tokens of KV pages."""

    executable: Executable
    page_tokens: int
    max_tokens: int
    vocab_size: int

    def run(
        self, scenarios: Sequence[Scenario], rounds: int, steps: int, progress: Callable[[str], None]
    ) -> None:
        """Fill in `seconds`: in each round, the median of `steps` decode steps or one prefill per scenario."""
        self.executable.reserve(max(len(s.stacks) for s in scenarios) * self._pages_each)
        for number in range(rounds + 1):  # the first round warms caches and page tables, and is dropped
            for scenario in scenarios:
                progress(f"round {number}/{rounds}: {scenario.name}")
                count = steps if scenario.n_tokens == 1 else 1
                times = [self._step(scenario, position) for position in range(count)]
                if number:
                    scenario.seconds.append(statistics.median(times))

    @property
    def _pages_each(self) -> int:
        return -(-self.max_tokens // self.page_tokens)

    def _step(self, scenario: Scenario, position: int) -> float:
        batch = self._batch(scenario, position)
        start = time.perf_counter()
        self.executable.step(batch)
        return time.perf_counter() - start

    def _batch(self, scenario: Scenario, position: int) -> Batch:
        streams, n_tokens = len(scenario.stacks), scenario.n_tokens
        ids = (np.arange(streams * n_tokens) * 7919 + position) % self.vocab_size
        edges = np.arange(streams + 1)
        return Batch(
            tokens=ids.astype(np.int32),
            positions=np.tile(np.arange(position, position + n_tokens), streams).astype(np.int32),
            run_start=(edges * n_tokens).astype(np.int32),
            page_start=(edges * self._pages_each).astype(np.int32),
            pages=np.arange(streams * self._pages_each, dtype=np.int32),
            stack_start=np.cumsum([0, *(len(stack) for stack in scenario.stacks)]).astype(np.int32),
            stacks=np.asarray([handle for stack in scenario.stacks for handle in stack], np.int32),
            logit_rows=(edges[1:] * n_tokens - 1).astype(np.int32),
        )
