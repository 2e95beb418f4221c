"""`adaptrt bench`: decode and prefill beside the machine's own peaks and, if wished, beside other runtimes."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from adaptrt.adapters.base import BaseView, open_base
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.adapters.stack import lower
from adaptrt.api import choose_backend, find_adapter
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cpu import available_cores, int8_peak, read_bandwidth
from adaptrt.bench.peers import Setup
from adaptrt.bench.shapes import SHAPES, VARIANTS, cached_model, random_adapters
from adaptrt.bench.subject import Cost, Subject, adapter_bytes
from adaptrt.bench.work import Work, measure
from adaptrt.cli.notes import Progress, note
from adaptrt.cli.options import AdapterChoice, Loading, adapter_option, as_json, loading_options, model_path
from adaptrt.errors import BackendError
from adaptrt.format import File, open_file
from adaptrt.plugins import Registry, load_registry

PEERS = {"llama.cpp": "llama_cpp", "peft": "peft"}  # → file in adaptrt/bench/peers
STREAMS = (1, 2, 4, 8, 16)
PREFILLS = (128, 512, 2048)
PROBE_BYTES = 1 << 29  # far more than any cache


@dataclass(frozen=True)
class Settings:
    """The numbers of the command line."""

    variant: str
    rank: int
    rounds: int
    steps: int


@click.command()
@click.argument("model", required=False)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights.  [default: tinyllama]")
@adapter_option
@click.option(
    "--variant",
    type=click.Choice(list(VARIANTS)),
    default="lora",
    show_default=True,
    help="Of random adapters.",
)
@click.option(
    "--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="Of random adapters."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repetitions."
)
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="Decode steps a round.")
@click.option(
    "--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, help="Also time another runtime."
)
@loading_options
@as_json
def command(
    model: str | None,
    shape: str | None,
    adapters: list[AdapterChoice],
    peers: tuple[str, ...],
    loading: Loading,
    as_json: bool,
    **settings_by_name: Any,
) -> None:
    """Measure MODEL, or random weights of a well-known shape.

    Adapters are random ones on every linear layer unless -a names some. The floor is what the read bandwidth and the
    int8 arithmetic of this machine, probed in the same run, allow.
    """
    if model and (shape or peers):
        raise click.UsageError("--shape and --peer go without MODEL")
    settings, registry = Settings(**settings_by_name), load_registry()
    path = model_path(model) if model else _made(shape or "tinyllama", registry)
    threads = loading.threads or available_cores()
    with _subject(path, registry, adapters, loading, threads, settings) as (subject, ours, first_tokens):
        theirs = {name: _peer(name, path, registry, threads, settings.steps) for name in peers}
        bandwidth, peak = read_bandwidth(PROBE_BYTES, threads), int8_peak(threads)
        measure([*ours, *(work for works in theirs.values() for work in works)], settings.rounds, _progress)
        bandwidth = max(bandwidth, read_bandwidth(PROBE_BYTES, threads))
        report = {
            "model": model or shape or "tinyllama",
            "backend": subject.executable.describe(),
            "read_bandwidth": bandwidth,
            "int8_peak": peak,
            "first_token_seconds": first_tokens,
            "peak_memory_bytes": None if peers else _peak_memory(),  # a peer's would be in it
            "rows": [_row(work, ours[0], bandwidth, peak) for work in ours],
            "peers": {name: _compare(works, ours) for name, works in theirs.items()},
        }
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)


def _progress(line: str) -> None:
    """Rounds take seconds each: one line that is rewritten on a terminal, else only the first work of a round."""
    if sys.stderr.isatty():
        click.echo(f"\r{line:70}", nl=False, err=True)
    elif line.endswith(": decode 1 stream"):
        note(line.split(":")[0])


def _made(shape: str, registry: Registry) -> Path:
    with Progress(f"random weights of shape {shape}") as progress:
        return cached_model(shape, registry.architectures["llama"], progress)


@contextmanager
def _subject(
    path: str | Path,
    registry: Registry,
    choices: list[AdapterChoice],
    loading: Loading,
    threads: int,
    settings: Settings,
) -> Iterator[tuple[Subject, list[Work], tuple[float, float, float]]]:
    """The loaded model, what to time on it, and the seconds from opening its file to a first token."""
    seconds = [_first_token(path, registry, loading, threads) for _ in range(settings.rounds)]
    with ExitStack() as cleanup:
        file = cleanup.enter_context(open_file(path))
        base = open_base(file, registry.architectures)
        lengths = _lengths(base.program.context_length)
        tokens = max(settings.steps, *lengths)
        subject = _load(base, registry, loading, threads, loading.precision, tokens, cleanup)
        subject.reserve(max(STREAMS))
        lowered = _adapters(choices, file, base, registry, settings, cleanup)
        handles = [subject.executable.attach(adapter) for adapter in lowered]
        works = _works(subject, handles, lowered, settings.steps, lengths)
        if loading.precision == "fast":
            with suppress(BackendError):  # a backend may offer `fast` alone
                exact = _load(base, registry, loading, threads, "exact", settings.steps, cleanup)
                exact.reserve(1)
                works.append(exact.decode("decode 1 stream, exact", [()], 0, settings.steps))
        yield subject, works, (min(seconds), statistics.median(seconds), max(seconds))


def _load(
    base: BaseView,
    registry: Registry,
    loading: Loading,
    threads: int,
    precision: str,
    tokens: int,
    cleanup: ExitStack,
) -> Subject:
    backend, device = choose_backend(registry, loading.backend)
    options = LoadOptions(threads=threads, precision=precision, device=device)  # type: ignore[arg-type]
    weights = base.weights()
    executable = backend.load(base.program, weights, options)
    cleanup.callback(executable.close)
    cost = Cost.of(base.program, weights)
    return Subject(executable, cost, options.page_tokens, tokens, base.program.vocab_size)


def _first_token(path: str | Path, registry: Registry, loading: Loading, threads: int) -> float:
    started = time.perf_counter()
    with ExitStack() as cleanup:
        file = cleanup.enter_context(open_file(path))
        base = open_base(file, registry.architectures)
        subject = _load(base, registry, loading, threads, loading.precision, 1, cleanup)
        subject.reserve(1)
        subject.decode("first token", [()], 0, 1).run()
        return time.perf_counter() - started


def _lengths(context_length: int) -> list[int]:
    """Prompt lengths that fit; a short context is measured whole."""
    return [n for n in PREFILLS if n <= context_length] or [context_length]


def _adapters(
    choices: list[AdapterChoice],
    file: File,
    base: BaseView,
    registry: Registry,
    settings: Settings,
    cleanup: ExitStack,
) -> list[LoweredAdapter]:
    """The adapters named, or eight random ones."""
    if not choices:
        return random_adapters(settings.variant, base.specs, settings.rank, count=8)
    variants = registry.variants
    return [
        lower(find_adapter(choice.source, file, base, variants, cleanup), variants, base, choice.scale)
        for choice in choices
    ]


def _works(
    subject: Subject, handles: list[int], adapters: list[LoweredAdapter], steps: int, lengths: list[int]
) -> list[Work]:
    """Ours: the table of rows."""
    sizes = [adapter_bytes(adapter) for adapter in adapters]
    works = [subject.decode(_streams(count), [()] * count, 0, steps) for count in STREAMS]
    for count in sorted({1, min(4, len(handles))}):
        name = "decode 1 stream, " + ("1 adapter" if count == 1 else f"{count} stacked")
        works.append(subject.decode(name, [tuple(handles[:count])], sum(sizes[:count]), steps))
    if len(handles) > 1:
        name = f"decode {len(handles)} streams, {len(handles)} adapters"
        works.append(subject.decode(name, [(handle,) for handle in handles], sum(sizes), steps))
    works += [subject.prefill(f"prefill {n}", (), 0, n) for n in lengths]
    works.append(subject.prefill(f"prefill {lengths[0]}, 1 adapter", (handles[0],), sizes[0], lengths[0]))
    return works


def _streams(count: int) -> str:
    return "decode 1 stream" if count == 1 else f"decode {count} streams"


def _peer(name: str, path: str | Path, registry: Registry, threads: int, steps: int) -> list[Work]:
    """Another runtime's works on random weights of the same shape. Raises BackendError when it is not installed."""
    peer = import_module(f"adaptrt.bench.peers.{PEERS[name]}")
    if find_spec(peer.PACKAGE) is None:
        raise BackendError(f"peer {name}: the Python package {peer.PACKAGE} is not installed")
    note(f"preparing peer {name} …")
    with open_file(path) as file:
        specs = open_base(file, registry.architectures).specs
        lengths = _lengths(file.metadata["llama.context_length"])[:2]
        works: list[Work] = peer.works(Setup(file.metadata, specs, Path(path), threads, steps, lengths))
    return works


def _compare(theirs: list[Work], ours: list[Work]) -> list[dict[str, Any]]:
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


def _row(work: Work, base: Work, bandwidth: float, peak: float) -> dict[str, Any]:
    return {
        "name": work.name,
        "tokens_per_second": work.tokens_per_second,
        "gigabytes_per_second": work.floor_bytes / work.median_seconds / 1e9,
        "gigaoperations_per_second": work.operations / work.median_seconds / 1e9,
        "percent_of_floor": 100 * work.floor_seconds(bandwidth, peak) / work.median_seconds,
        "time_over_base": work.ratio_to(base),
    }


def _peak_memory() -> int:
    """Bytes; ru_maxrss counts kilobytes, on macOS bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _print(report: dict[str, Any]) -> None:
    peak = f", int8 peak {report['int8_peak'] / 1e9:.0f} GOP/s" if report["int8_peak"] else ""
    click.echo(f"{report['model']} on {report['backend']}")
    click.echo(f"read bandwidth {report['read_bandwidth'] / 1e9:.1f} GB/s{peak}")
    peak_bytes = report["peak_memory_bytes"]
    memory = f", peak memory {peak_bytes / 1e6:.0f} MB" if peak_bytes else ""
    milliseconds = " ".join(f"{1000 * seconds:.0f}" for seconds in report["first_token_seconds"])
    click.echo(f"file to first token {milliseconds} ms (min median max){memory}\n")
    click.echo(
        f"{'':30}{'tokens/s':>9}{'GB/s':>7}{'GOP/s':>7}{'% of floor':>11}   time of a step over decode 1 stream"
    )
    for row in report["rows"]:
        click.echo(
            f"{row['name']:30}{row['tokens_per_second']:9.1f}{row['gigabytes_per_second']:7.1f}"
            f"{row['gigaoperations_per_second']:7.0f}{row['percent_of_floor']:11.1f}   {_ratios(row['time_over_base'])}"
        )
    for name, rows in report["peers"].items():
        click.echo(f"\n{name:30}{'tokens/s':>9}   ours is faster by (min median max)")
        for row in rows:
            click.echo(
                f"{row['name']:30}{row['tokens_per_second']:9.1f}   {_ratios(row['ours_over_theirs'])}"
            )


def _ratios(ratios: tuple[float, float, float]) -> str:
    return " ".join(f"{ratio:.2f}" for ratio in ratios)
