"""What was timed, as plain data for --json and as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaptrt.backends.base import Peaks
from adaptrt.bench.adapter_cost import adapter_cost
from adaptrt.bench.work import Work

Row = dict[str, Any]


def rows(works: Sequence[Work], peaks: Peaks) -> list[Row]:
    """A table whose first work is what the others are compared with."""
    return [
        {
            "name": work.name,
            "tokens_per_second": work.tokens_per_second,
            "milliseconds": 1000 * work.median_seconds,
            "gigabytes_per_second": work.floor_bytes / work.median_seconds / 1e9,
            "gigaoperations_per_second": work.operations / work.median_seconds / 1e9,
            "percent_of_floor": _percent(work, peaks),
            "time_over_base": work.ratio_to(works[0]),
        }
        for work in works
    ]


def cost_rows(works: Sequence[Work], peaks: Peaks) -> list[Row]:
    """What adapters add to the same work without them, as shares of it; one row for each work with adapters."""
    found = ((work.name, adapter_cost(work, peaks)) for work in works)
    return [{"name": name, **asdict(adds)} for name, adds in found if adds]


def comparison(theirs: Sequence[Work], ours: Sequence[Work]) -> list[Row]:
    """How many times faster ours is, for each work that both did."""
    by_name = {work.name: work for work in ours}
    return [
        {
            "name": work.name,
            "tokens_per_second": work.tokens_per_second,
            "ours_over_theirs": work.ratio_to(by_name[work.name]),
        }
        for work in theirs
        if work.name in by_name
    ]


def product_rows(ours: Sequence[Work], peers: Mapping[str, Sequence[Work]], peaks: Peaks) -> list[Row]:
    """One for each product and number of tokens; `faster` is by how much than each library, (min, median, max)."""
    return [
        {
            "name": work.name,
            "tokens": work.tokens,
            "microseconds": 1e6 * work.median_seconds,
            "percent_of_floor": _percent(work, peaks),
            "peer_microseconds": {name: 1e6 * theirs[i].median_seconds for name, theirs in peers.items()},
            "faster": {name: theirs[i].ratio_to(work) for name, theirs in peers.items()},
        }
        for i, work in enumerate(ours)
    ]


def geometric_means(table: Sequence[Row]) -> list[Row]:
    """For each number of tokens, over its products: how much faster than each library."""
    means = []
    for tokens in sorted({row["tokens"] for row in table}):
        group = [row["faster"] for row in table if row["tokens"] == tokens]
        faster = {name: _geometric_mean([one[name][1] for one in group]) for name in group[0]}
        means.append({"tokens": tokens, "faster": faster})
    return means


def _percent(work: Work, peaks: Peaks) -> float | None:
    """None where the hardware's peaks are not known."""
    floor = work.floor_seconds(peaks.bytes_per_second, peaks.operations_per_second)
    floor = max(floor, peaks.bus_seconds)
    return 100 * floor / work.median_seconds if floor else None


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The whole report as text."""
    yield f"{report['model']} on {report['backend']}"
    if report["bandwidth"]:
        operations = report["operations_peak"]
        peak = f", arithmetic peak {operations / 1e9:.0f} GOP/s" if operations else ""
        yield f"memory bandwidth {report['bandwidth'] / 1e9:.1f} GB/s{peak}"
    if streamed := report.get("streamed_bytes"):
        bus = report["bus_bandwidth"]
        yield f"bus bandwidth {bus / 1e9:.1f} GB/s, {streamed / 1e9:.3f} GB of weights over it each step"
    if "rows" in report:
        yield from _model_lines(report)
    if "products" in report:
        yield from _product_lines(report["products"], report["geometric_means"])


def _model_lines(report: Mapping[str, Any]) -> Iterator[str]:
    milliseconds = " ".join(f"{1000 * seconds:.0f}" for seconds in report["first_token_seconds"])
    memory = [
        f", {name} {report[key] / 1e6:.0f} MB"
        for name, key in (("peak memory", "peak_memory_bytes"), ("GPU memory", "device_memory_bytes"))
        if report[key]
    ]
    yield f"file to first token {milliseconds} ms (min median max){''.join(memory)}"
    yield from _table_lines(report["rows"])
    if report["crowd"]:
        yield from _table_lines(report["crowd"])
    if report["costs"]:
        yield from _cost_lines(report["costs"])
    for name, compared in report["peers"].items():
        yield f"\n{name:36}{'tokens/s':>9}   ours is faster by (min median max)"
        for row in compared:
            yield f"{row['name']:36}{row['tokens_per_second']:9.1f}   {_ratios(row['ours_over_theirs'])}"


def _table_lines(table: Sequence[Row]) -> Iterator[str]:
    title = f"\n{'':36}{'tokens/s':>9}{'ms':>9}{'GB/s':>7}{'GOP/s':>8}{'% of floor':>11}"
    yield f"{title}   time over {table[0]['name']} (min median max)"
    for row in table:
        numbers = (
            f"{row['tokens_per_second']:9.1f}{row['milliseconds']:9.2f}{row['gigabytes_per_second']:7.1f}"
            f"{row['gigaoperations_per_second']:8.0f}{_percent_text(row)}"
        )
        yield f"{row['name']:36}{numbers}   {_ratios(row['time_over_base'])}"


def _cost_lines(table: Sequence[Row]) -> Iterator[str]:
    title = f"\n{'adapters add to the step without':36}{'turns':>9}{'measured':>10}{'predicted':>11}"
    yield f"{title}   beyond that, in points (quartiles)"
    for row in table:
        adds = "".join(
            f"{100 * row[name][1]:+{width}.1f}%" for name, width in (("measured", 9), ("predicted", 10))
        )
        points = " ".join(f"{100 * share:+.1f}" for share in row["excess"])
        yield f"{row['name']:36}{row['turns']:9}{adds}   {points}"


def _product_lines(table: Sequence[Row], means: Sequence[Row]) -> Iterator[str]:
    peers = list(table[0]["faster"])
    names = "".join(f"   {name + ' us':>16}  (min median max)" for name in peers)
    yield f"\n{'':36}{'us':>9}{'% of floor':>11}{names}"
    for row in table:
        theirs = "".join(
            f"   {row['peer_microseconds'][name]:16.1f}  ({_ratios(row['faster'][name])})" for name in peers
        )
        yield f"{row['name']:36}{row['microseconds']:9.2f}{_percent_text(row)}{theirs}"
    for mean in means:
        faster = ", ".join(f"{ratio:.2f} times {name}" for name, ratio in mean["faster"].items())
        yield f"geometric mean, M = {mean['tokens']}: {faster}"


def _percent_text(row: Row) -> str:
    percent = row["percent_of_floor"]
    return f"{'-':>11}" if percent is None else f"{percent:11.1f}"


def _ratios(ratios: Sequence[float]) -> str:
    return " ".join(f"{ratio:.2f}" for ratio in ratios)
