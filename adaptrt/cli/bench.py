"""`adaptrt bench`: decode and prefill beside the machine's own peaks and, if wished, beside other runtimes."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from adaptrt.adapters.base import BaseView, open_base
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.adapters.stack import lower
from adaptrt.api import find_adapter
from adaptrt.backends.base import Executable, LoadOptions, Peaks
from adaptrt.backends.choose import choose_backend
from adaptrt.backends.cpu import available_cores
from adaptrt.bench.loader import PAGE_TOKENS, Loader
from adaptrt.bench.peers import Setup
from adaptrt.bench.products import layers, product_works, products
from adaptrt.bench.report import comparison, cost_rows, geometric_means, lines, product_rows, rows
from adaptrt.bench.shapes import SHAPES, VARIANTS, cached_model, random_adapters
from adaptrt.bench.table import crowd_works, model_works, prompt_lengths
from adaptrt.bench.work import Work, measure
from adaptrt.cli.notes import Progress, note
from adaptrt.cli.options import AdapterChoice, Loading, adapter_option, as_json, loading_options, model_path
from adaptrt.errors import BackendError
from adaptrt.format import File, open_file
from adaptrt.plugins import Registry, load_registry

PEERS = {"llama.cpp": "llama_cpp", "peft": "peft", "bnb": "bnb"}  # → file in adaptrt/bench/peers
OF_PRODUCTS = "bnb"  # the peer that does single products, not models
OF_RANDOM_ADAPTERS = ("variant", "rank")  # options
OF_MODELS = ("adapters", *OF_RANDOM_ADAPTERS, "steps", "streams")


@dataclass(frozen=True)
class Settings:
    """The numbers of the command line."""

    variant: str
    rank: int
    streams: int | None
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
    "--streams", type=click.IntRange(1, 1000), metavar="N", help="Also N streams, each with its own adapter."
)
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

    Adapters are random ones on every linear layer unless -a names some. The floor is what the memory's bandwidth and
    the arithmetic of this machine, probed in the same run, allow. --peer bnb alone times the shape's single products
    beside those of bitsandbytes and cuBLAS, on a GPU.
    """
    if model and (shape or peers):
        raise click.UsageError("--shape and --peer go without MODEL")
    if adapters:
        _refuse(OF_RANDOM_ADAPTERS, "-a")
    if set(peers) == {OF_PRODUCTS}:
        _refuse(OF_MODELS, f"--peer {OF_PRODUCTS} alone")
    settings, registry = Settings(**settings_by_name), load_registry()
    shape = shape or "tinyllama"
    threads = loading.threads or available_cores()
    options = LoadOptions(threads, loading.precision, gpu_memory=loading.gpu_memory or 0)  # type: ignore[arg-type]
    loader = Loader(registry.backends, loading.backend, options)
    if loading.backend != "auto":
        choose_backend(registry.backends, loading.backend)  # before minutes go into random weights
    report: dict[str, Any] = {"model": model or shape}
    if set(peers) != {OF_PRODUCTS}:
        path = model_path(model) if model else _made(shape, registry)
        report |= _bench_model(path, registry, adapters, peers, loader, settings)
    if OF_PRODUCTS in peers:
        report |= _bench_products(shape, loader, settings)
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report)))


def _refuse(names: Collection[str], beside: str) -> None:
    """Raise UsageError if an option of these is given."""
    ctx = click.get_current_context()
    given = [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = [parameter.opts[-1] for parameter in ctx.command.params if parameter.name in given]
        raise click.UsageError(f"{', '.join(options)}: no effect beside {beside}")


def _bench_model(
    path: str | Path,
    registry: Registry,
    choices: list[AdapterChoice],
    peers: tuple[str, ...],
    loader: Loader,
    settings: Settings,
) -> dict[str, Any]:
    """The tables of a whole model."""
    seconds = [_first_token(path, registry, loader) for _ in range(settings.rounds)]
    with loader.cleanup as cleanup:
        file = cleanup.enter_context(open_file(path))
        base = open_base(file, registry.architectures)
        lowered = _adapters(choices, file, base, registry, settings, cleanup)
        subject, length = loader.subject(base), base.program.context_length
        ours = model_works(subject, base.program, lowered, settings.steps, prompt_lengths(length))
        if loader.options.precision == "fast":
            with suppress(BackendError):  # a backend may offer `fast` alone
                exact = loader.subject(base, "exact")
                ours.append(exact.decode("decode 1 stream, exact", [()], settings.steps))
        crowd = []
        if settings.streams:
            note(f"preparing {settings.streams} adapters of every kind …")
            crowd = crowd_works(subject, base, settings.streams, settings.steps)
        models = [name for name in peers if name != OF_PRODUCTS]
        theirs = {name: _peer(name, path, base, loader, settings.steps) for name in models}
        peaks = _measured([*ours, *crowd, *chain(*theirs.values())], settings.rounds, subject.executable)
        return {
            "backend": subject.executable.describe(),
            "bandwidth": peaks.bytes_per_second,
            "operations_peak": peaks.operations_per_second,
            "bus_bandwidth": peaks.bus_bytes_per_second,
            "streamed_bytes": peaks.streamed_bytes,
            "first_token_seconds": (min(seconds), statistics.median(seconds), max(seconds)),
            "peak_memory_bytes": None if peers else _peak_memory(),  # a peer's would be in it
            "device_memory_bytes": None if peers else peaks.device_bytes,
            "rows": rows(ours, peaks),
            "crowd": rows(crowd, peaks),
            "costs": cost_rows([*ours, *crowd], peaks),
            "peers": {name: comparison(works, ours) for name, works in theirs.items()},
        }


def _bench_products(shape: str, loader: Loader, settings: Settings) -> dict[str, Any]:
    """The table of single products."""
    peer = _import_peer(OF_PRODUCTS)
    ours: list[Work] = []
    theirs: dict[str, list[Work]] = {}
    with loader.cleanup:
        probed = loader.load(*layers(products(shape)[0], 0))
        if not loader.torch_device.startswith("cuda"):
            raise BackendError(
                f"peer {OF_PRODUCTS}: compares products on a GPU, found backend {loader.choice}"
            )
        for product in products(shape):
            note(f"preparing product {product.name} …")
            ours += product_works(product, loader.load, PAGE_TOKENS)
            for name, made in peer.works(product, loader.torch_device).items():
                theirs.setdefault(name, []).extend(made)
        peaks = _measured([*ours, *chain(*theirs.values())], settings.rounds, probed)
        table = product_rows(ours, theirs, peaks)
        return {
            "backend": probed.describe(),
            "bandwidth": peaks.bytes_per_second,
            "operations_peak": peaks.operations_per_second,
            "products": table,
            "geometric_means": geometric_means(table),
        }


def _measured(works: list[Work], rounds: int, executable: Executable) -> Peaks:
    """Time everything; returns the medians of the hardware's peaks, which meet it in the same state: once a round."""
    taken: list[Peaks] = []

    def probe() -> float:
        with suppress(BackendError):  # no memory for it: percentages are left out
            taken.append(getattr(executable, "peaks", Peaks)())
        return 0.0

    measure([Work("peaks", 0, probe), *works], rounds, _Rounds())
    columns = zip(*(astuple(peaks) for peaks in taken[1:] or [Peaks()]), strict=True)
    return Peaks(*(statistics.median(column) for column in columns))


class _Rounds:
    """Rounds take seconds each: one line that is rewritten on a terminal, else one for each round."""

    def __init__(self) -> None:
        self._noted = ""

    def __call__(self, line: str) -> None:
        number = line.partition(":")[0]
        if sys.stderr.isatty():
            click.echo(f"\r{line:70}", nl=False, err=True)
        elif number != self._noted:
            note(number)
            self._noted = number


def _made(shape: str, registry: Registry) -> Path:
    with Progress(f"random weights of shape {shape}") as progress:
        return cached_model(shape, registry.architectures["llama"], progress)


def _first_token(path: str | Path, registry: Registry, loader: Loader) -> float:
    """Seconds from opening the file to the first logits."""
    started = time.perf_counter()
    with loader.cleanup as cleanup:
        base = open_base(cleanup.enter_context(open_file(path)), registry.architectures)
        loader.subject(base).decode("first token", [()], 1).run()
        return time.perf_counter() - started


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


def _peer(name: str, path: str | Path, base: BaseView, loader: Loader, steps: int) -> list[Work]:
    """Another runtime's works on random weights of the same shape."""
    peer = _import_peer(name)
    note(f"preparing peer {name} …")
    with open_file(path) as file:
        lengths = prompt_lengths(base.program.context_length)[:2]
        setup = Setup(
            file.metadata, base.specs, Path(path), loader.options.threads, loader.torch_device, steps, lengths
        )
        works: list[Work] = peer.works(setup)
    return works


def _import_peer(name: str) -> Any:
    """Raises BackendError when it is not installed."""
    peer = import_module(f"adaptrt.bench.peers.{PEERS[name]}")
    if find_spec(peer.PACKAGE) is None:
        raise BackendError(f"peer {name}: the Python package {peer.PACKAGE} is not installed")
    return peer


def _peak_memory() -> int:
    """Bytes; ru_maxrss counts kilobytes, on macOS bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
