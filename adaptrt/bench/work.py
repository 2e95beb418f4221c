"""What is timed, and how: in turns, so that a machine's noise and its changes of speed fall on everything alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from adaptrt.backends.base import Peaks


@dataclass
class Work:
    """`run` does the work once and returns its seconds; `rounds` collects those of `runs` of them per round.

    `tokens` come out of one run; `floor_bytes` and `operations` are what it must at least read and compute
    (a multiply and an add are two operations). `without` is the same work without its adapters, `shared_bytes` of the
    bytes those of factors that their targets share.
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

    def predicted_seconds(self, peaks: Peaks) -> float | None:
        """The time without adapters, that of reading shared factors, and the slower of own bytes and all operations.

        Shared factors, which every layer reads again, take the time that was probed or, where none could be, that of
        reading them once. Operations go at the peak. None where there is nothing to predict or the memory's speed is
        not known.
        """
        if self.without is None or not peaks.bytes_per_second:
            return None
        own_bytes = self.floor_bytes - self.without.floor_bytes - self.shared_bytes
        operations = self.operations - self.without.operations
        compute = operations / peaks.operations_per_second if peaks.operations_per_second else 0.0
        read = own_bytes / self.without.reading_speed(peaks)
        shared = peaks.shared_seconds if self.shared_bytes else 0.0
        shared = shared or self.shared_bytes / peaks.bytes_per_second
        return self.without.median_seconds + shared + max(read, compute)

    def reading_speed(self, peaks: Peaks) -> float:
        """Bytes a second at which bytes that are added to this work should be read: as fast as its own.

        One stream waits for its weights, and its steps take turns with those that are compared with it, which the probe
        does not. More streams may wait for arithmetic and say nothing of the memory, so there the probe does.
        """
        return self.floor_bytes / self.median_seconds if self.tokens == 1 else peaks.bytes_per_second

    def ratio_to(self, other: Work) -> tuple[float, float, float]:
        """This work's time over another's, round by round: min, median, max."""
        ratios = [_ratio(mine, theirs) for mine, theirs in zip(self.rounds, other.rounds, strict=True)]
        return min(ratios), statistics.median(ratios), max(ratios)


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Of a round; turn by turn where both had as many, since a machine changes its speed within a round."""
    if len(mine) != len(theirs):
        return statistics.median(mine) / statistics.median(theirs)
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def measure(works: Sequence[Work], rounds: int, progress: Callable[[str], None]) -> None:
    """Run every work `runs` times a round, all works in turn; a first round, dropped, warms caches and page tables.

    A work's runs lie among the others' ones, so that steps that are compared follow each other within a second.
    """
    for number in range(rounds + 1):
        taken: list[list[float]] = [[] for _ in works]
        for turn in range(max(work.runs for work in works)):
            for work, seconds in zip(works, taken, strict=True):
                if turn == 0:
                    progress(f"round {number} of {rounds}: {work.name}")
                if turn < work.runs:
                    seconds.append(work.run())
        for work, seconds in zip(works, taken, strict=True):
            if number:
                work.rounds.append(seconds)
