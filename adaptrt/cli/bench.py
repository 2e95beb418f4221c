"""`adaptrt bench`: decode and prefill, with and without adapters, beside the read bandwidth probed in the same run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from adaptrt.adapters.base import open_base
from adaptrt.api import choose_backend
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cpu import read_bandwidth
from adaptrt.bench.measure import Bench, Scenario, adapter_bytes, weight_bytes
from adaptrt.bench.shapes import SHAPES, random_lora, random_tensor
from adaptrt.cli.notes import note
from adaptrt.cli.options import Loading, as_json, loading_options
from adaptrt.format import open_file
from adaptrt.model.architecture import TensorSpec
from adaptrt.plugins import load_registry
from adaptrt.program import Program
from adaptrt.tensor import Tensor

PREFILL_TOKENS = 512
PROBE_BYTES = 1 << 29  # far more than any cache


@dataclass(frozen=True)
class Subject:
    """The model to measure."""

    name: str
    program: Program
    specs: tuple[TensorSpec, ...]
    tensors: dict[str, Tensor]


@click.command()
@click.argument("model", required=False)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tinyllama", show_default=True)
@click.option(
    "--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="Rank of the adapters."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repetitions."
)
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="Decode steps a round.")
@loading_options
@as_json
def command(
    model: str | None, shape: str, rank: int, rounds: int, steps: int, loading: Loading, as_json: bool
) -> None:
    """Measure MODEL, or random weights of a well-known shape, with random LoRA adapters on every linear layer."""
    rng = np.random.default_rng(0)
    subject = _from_file(model) if model else _random(shape, rng)
    threads = loading.threads or len(os.sched_getaffinity(0))
    options = LoadOptions(threads=threads, precision=loading.precision)  # type: ignore[arg-type]
    backend = choose_backend(load_registry(), loading.backend)
    executable = backend.load(subject.program, subject.tensors, options)
    try:
        adapters = [random_lora(subject.specs, rank, rng) for _ in range(8)]
        handles = [executable.attach(adapter) for adapter in adapters]
        scenarios = _scenarios(
            handles,
            weight_bytes(subject.program, subject.tensors),
            adapter_bytes(adapters[0]),
            subject.program,
        )
        tokens = max(steps, *(s.n_tokens for s in scenarios))
        bench = Bench(executable, options.page_tokens, tokens, subject.program.vocab_size)
        note(f"{subject.name}: {executable.describe()}")
        bandwidth = read_bandwidth(PROBE_BYTES, threads)
        bench.run(scenarios, rounds, steps, note)
        bandwidth = max(bandwidth, read_bandwidth(PROBE_BYTES, threads))
    finally:
        executable.close()
    rows = [_row(scenario, scenarios[0], bandwidth) for scenario in scenarios]
    _print(subject.name, bandwidth, rows, as_json)


def _from_file(path: str) -> Subject:
    base = open_base(open_file(path), load_registry().architectures)  # stays mapped until the process ends
    return Subject(path, base.program, base.specs, base.weights())


def _random(shape: str, rng: np.random.Generator) -> Subject:
    architecture = load_registry().architectures["llama"]
    metadata = architecture.metadata(SHAPES[shape])
    specs = architecture.tensors(metadata)
    note(f"making random weights of shape {shape}")
    return Subject(
        shape, architecture.program(metadata), specs, {spec.name: random_tensor(spec, rng) for spec in specs}
    )


def _scenarios(handles: list[int], weights: int, adapter: int, program: Program) -> list[Scenario]:
    one, four = (handles[0],), tuple(handles[:4])
    prefill = min(PREFILL_TOKENS, program.context_length)
    return [
        Scenario("decode 1 stream", [()], 1, weights),
        Scenario("decode 1 stream, 1 adapter", [one], 1, weights + adapter),
        Scenario("decode 1 stream, 4 stacked", [four], 1, weights + 4 * adapter),
        Scenario("decode 8 streams", [()] * 8, 1, weights),
        Scenario("decode 8 streams, 8 adapters", [(h,) for h in handles], 1, weights + 8 * adapter),
        Scenario(f"prefill {prefill}", [()], prefill, weights),
        Scenario(f"prefill {prefill}, 1 adapter", [one], prefill, weights + adapter),
    ]


def _row(scenario: Scenario, base: Scenario, bandwidth: float) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "tokens_per_second": scenario.tokens_per_second,
        "gigabytes_per_second": scenario.bytes_per_second / 1e9,
        "percent_of_bandwidth": 100 * scenario.bytes_per_second / bandwidth,
        "time_over_base": scenario.ratio_to(base),
    }


def _print(name: str, bandwidth: float, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"model": name, "read_bandwidth": bandwidth, "rows": rows}))
        return
    click.echo(f"{name}: read bandwidth {bandwidth / 1e9:.1f} GB/s")
    click.echo(
        f"{'':32}{'tokens/s':>10}{'GB/s':>8}{'% floor':>9}   step time over decode 1 stream (min median max)"
    )
    for row in rows:
        ratios = " ".join(f"{ratio:.2f}" for ratio in row["time_over_base"])
        click.echo(
            f"{row['name']:32}{row['tokens_per_second']:10.1f}{row['gigabytes_per_second']:8.2f}"
            f"{row['percent_of_bandwidth']:9.1f}   {ratios}"
        )
