"""What is timed, and how: in turns, so that a machine's noise and its changes of speed fall on everything alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from adaptrt.backends.base import Reads


@dataclass
class Work:
    """`run` does the work once and returns its seconds; `rounds` collects those of `runs` of them per round.

    `tokens` come out of one run; `floor_bytes` and `operations` are what it must at least read and compute
    (a multiply and an add are two operations). `without` is the same work without its adapters, `shared_bytes` of the
    bytes those of factors that their targets share; `probe` then does the reads of a step with them, and `reads`
    collects what it found after each run. A `steady` work is run once more, uncounted, before each run: what ran before
    changes a step by several percent.
    """

    name: str
    tokens: int
    run: Callable[[], float]
    floor_bytes: int = 0
    operations: int = 0
    runs: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    without: Work | None = None
    shared_bytes: int = 0
    probe: Callable[[], Reads] | None = None
    reads: list[list[Reads]] = field(default_factory=list)
    steady: bool = False

    @property
    def median_seconds(self) -> float:
        """Median over the rounds of their medians."""
        return statistics.median(map(statistics.median, self.rounds))

    @property
    def tokens_per_second(self) -> float:
        """Median over the rounds."""
        return self.tokens / self.median_seconds

    def floor_seconds(self, bytes_per_second: float, operations_per_second: float) -> float:
        """The time that neither the memory nor the arithmetic allows to be beaten; an unknown peak (0) counts not."""
        compute = self.operations / operations_per_second if operations_per_second else 0.0
        return max(self.floor_bytes / bytes_per_second if bytes_per_second else 0.0, compute)

    def ratio_to(self, other: Work) -> tuple[float, float, float]:
        """This work's time over another's, round by round: min, median, max."""
        ratios = [_ratio(mine, theirs) for mine, theirs in zip(self.rounds, other.rounds, strict=True)]
        return min(ratios), statistics.median(ratios), max(ratios)


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Of a round; turn by turn, since a machine changes its speed within a round, unless one of them ran only once."""
    if 1 in (len(mine), len(theirs)):
        return statistics.median(mine) / statistics.median(theirs)
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=False))


def measure(works: Sequence[Work], rounds: int, progress: Callable[[str], None]) -> None:
    """Run every work `runs` times a round, all works in turn; a first round, dropped, warms caches and page tables.

    A work's runs lie among the others' ones, so that steps that are compared follow each other within a second.
    """
    for number in range(rounds + 1):
        for work in works:
            work.rounds.append([])
            work.reads.append([])
        for turn in range(max(work.runs for work in works)):
            for work in works:
                if turn == 0:
                    progress(f"round {number} of {rounds}: {work.name}")
                if turn < work.runs:
                    if work.steady:
                        work.run()
                    work.rounds[-1].append(work.run())
                    work.reads[-1].append(work.probe() if work.probe else Reads())
        if number == 0:
            for work in works:
                work.rounds.clear()
                work.reads.clear()
