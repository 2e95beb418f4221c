"""What adapters cost a step beside what their bytes and operations predict, both in the same turns.

A machine that others share changes its bandwidth by a factor of two within seconds. So a turn is the step without
adapters, the step with them and the reads of a step, one after the other, and says by how much the cost was more than
predicted; what is reported are medians over all turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adaptrt.backends.base import Peaks, Reads
from adaptrt.bench.work import Work

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class AdapterCost:
    """Quartiles over the turns, as shares of the step without adapters; `excess` is measured less predicted."""

    turns: int
    measured: Quartiles
    predicted: Quartiles
    excess: Quartiles


def adapter_cost(work: Work, peaks: Peaks) -> AdapterCost | None:
    """None where there is nothing to predict, or where the memory's speed is not known."""
    turns = list(_turns(work, peaks))
    if not turns:
        return None
    measured, predicted = zip(*turns, strict=True)
    excess = [mine - theirs for mine, theirs in turns]
    return AdapterCost(len(turns), quartiles(measured), quartiles(predicted), quartiles(excess))


def _turns(work: Work, peaks: Peaks) -> Iterator[tuple[float, float]]:
    """(measured, predicted) of each turn that the work and the one without adapters took together."""
    if work.without is None:
        return
    for rounds in zip(work.rounds, work.without.rounds, work.reads, strict=True):
        for mine, base, reads in zip(*rounds, strict=False):
            seconds = predicted_seconds(work, peaks, reads)
            if seconds is not None:
                yield (mine - base) / base, seconds / base


def predicted_seconds(work: Work, peaks: Peaks, reads: Reads) -> float | None:
    """What adapters should add: reading what targets share, and the slower of their own bytes and all operations.

    Bytes come at the bandwidth that was probed in this turn or, where a backend does not, once a round; shared ones
    take the time that was probed or, where none was, that of reading them once. Operations go at the peak.
    """
    speed = reads.bytes_per_second or peaks.bytes_per_second
    if work.without is None or not speed:
        return None
    own_bytes = work.floor_bytes - work.without.floor_bytes - work.shared_bytes
    operations = work.operations - work.without.operations
    compute = operations / peaks.operations_per_second if peaks.operations_per_second else 0.0
    shared = (reads.shared_seconds or work.shared_bytes / speed) if work.shared_bytes else 0.0
    return shared + max(own_bytes / speed, compute)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
