"""Options that several commands share, each group handed to the command as one object."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from adaptrt.cli.notes import SOON, Progress, show_adapter_notes
from adaptrt.engine.request import Sampling
from adaptrt.errors import AdapterError, AdaptrtError

if TYPE_CHECKING:
    from adaptrt.api import Model

Command = TypeVar("Command", bound=Callable[..., Any])
Stack = list[tuple[str, float]]  # (adapter name, scale) in stacking order

TEXT_LIMIT = 1 << 30  # bytes

PATH = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def grouped(name: str, build: Callable[..., Any], *options: Callable[[Any], Any]) -> Callable[[Command], Any]:
    """Declare `options` on a command and pass their values to it as one argument: `name=build(**values)`."""

    def decorate(command: Command) -> Any:
        declared = functools.reduce(lambda declaring, option: option(declaring), options, lambda: None)
        keys = [parameter.name for parameter in declared.__click_params__]  # type: ignore[attr-defined]

        @functools.wraps(command)
        def call(**values: Any) -> Any:
            group = {key: values.pop(key) for key in keys}
            return command(**values, **{name: build(**group)})

        return functools.reduce(lambda declaring, option: option(declaring), reversed(options), call)

    return decorate


@dataclass(frozen=True)
class AdapterChoice:
    """`-a SOURCE[:SCALE]`: a name inside the model's file, an `.adrt` file or a PEFT folder; its strength."""

    source: str
    scale: float = 1.0


def parse_adapter(text: str) -> AdapterChoice:
    """Split SOURCE[:SCALE] at the last colon, if a number follows it. Raises AdapterError for a bad scale."""
    source, colon, tail = text.rpartition(":")
    scale = _as_number(tail) if colon else None
    if scale is None:
        source, scale = text, 1.0
    if not source or source.endswith(":") or "\0" in source:
        raise AdapterError(f"adapter {text!r}: expected NAME or PATH, then perhaps ':' and a scale")
    if not math.isfinite(scale):
        raise AdapterError(f"adapter {source!r}: scale is {tail!r}, expected a finite number")
    return AdapterChoice(source, scale)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parse_adapters(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[AdapterChoice]:
    return [parse_adapter(value) for value in values]


adapter_option = click.option(
    "-a",
    "--adapter",
    "adapters",
    metavar="ADAPTER[:SCALE]",
    multiple=True,
    callback=_parse_adapters,
    help="A name inside the file, an .adrt file or a PEFT folder; repeat to stack, in that order.",
)


def _build_sampling(max_tokens: int, **values: Any) -> Sampling:
    return Sampling(max_tokens=None if max_tokens == -1 else max_tokens, **values)


def _number(flags: str, field: str, kind: Any, text: str) -> Callable[[Any], Any]:
    """An option for a field of Sampling, with its default."""
    default = getattr(Sampling, field)
    return click.option(*flags.split(), field, type=kind, default=default, show_default=True, help=text)


sampling_options = grouped(
    "sampling",
    _build_sampling,
    _number(
        "-n --max-tokens", "max_tokens", int, "Tokens to generate at most; -1: to the end of the context."
    ),
    _number("--temp", "temperature", float, "0 always takes the likeliest token."),
    _number("--top-k", "top_k", int, "Keep the K likeliest tokens; 0: all."),
    _number("--top-p", "top_p", float, "Keep the likeliest tokens that sum to P; 1: all."),
    _number("--min-p", "min_p", float, "Drop tokens less likely than P times the likeliest; 0: none."),
    _number("--repeat-penalty", "repeat_penalty", float, "Above 1, tokens already seen become less likely."),
    click.option("--seed", type=int, help="Repeat a run exactly.  [default: random]"),
    click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; repeat for several."),
)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    backend: str
    threads: int | None
    precision: str
    gpu_memory: int | None

    @contextmanager
    def open(self, path: str) -> Iterator[tuple[Model, Attached]]:
        """Load the model, ready to take adapters, and close it at the end of the block."""
        from adaptrt.api import load

        with load(
            path,
            self.backend,
            self.threads,
            self.precision,  # type: ignore[arg-type]
            gpu_memory=self.gpu_memory,
        ) as model:
            yield model, Attached(model)


class Attached:
    """Loads each adapter source once, however often and at whatever scales it is named."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names: dict[str, str] = {}

    def stack(self, choices: Sequence[AdapterChoice]) -> Stack:
        """Load what is new and name everything. Raises AdapterError for one that cannot be loaded."""
        return [(self._name(choice), choice.scale) for choice in choices]

    def _name(self, choice: AdapterChoice) -> str:
        source = choice.source
        if source not in self._names:
            usual = Path(os.path.realpath(source)).name.removesuffix(".adrt")
            name = source if usual in self._model.adapters else None  # run1/final beside run2/final
            with Progress(f"loading adapter {source}", after=SOON) as progress:
                self._names[source] = self._model.load_adapter(source, name, choice.scale, progress)
            show_adapter_notes(self._model.adapters[self._names[source]])
        return self._names[source]


def parse_size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Bytes: 6GiB or 6G, 512MiB, or 6GB in powers of 1000. Raises BadParameter for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(iB|B)?|B)?", text, re.IGNORECASE)
    number, prefix, unit = found.groups() if found else ("0", None, None)
    factor = 1000 if (unit or "").upper() == "B" else 1024
    n_bytes = int(float(number) * factor ** " KMGT".index((prefix or " ").upper()))
    if not 1 <= n_bytes < 2**63:
        raise click.BadParameter(f"{text!r}, expected a size like 6GiB, 6G, 800M or 6GB")
    return n_bytes


loading_options = grouped(
    "loading",
    Loading,
    click.option(
        "--backend",
        default="auto",
        show_default=True,
        metavar="NAME[:DEVICE]",
        help="What runs the model, and where.",
    ),
    click.option(
        "--threads", type=int, metavar="N", help="CPU threads, for cpu and torch.  [default: every core]"
    ),
    click.option(
        "--precision",
        type=click.Choice(["fast", "exact"]),
        default="fast",
        show_default=True,
        help="exact computes in float32.",
    ),
    click.option(
        "--gpu-memory",
        callback=parse_size,
        metavar="SIZE",
        help="Of a GPU, e.g. 6GiB; weights beyond it are streamed from the host.  [default: all]",
    ),
)


def model_path(text: str) -> Path:
    """The file that MODEL names; "demo" is the built-in one."""
    from adaptrt.api import DEMO

    return DEMO if text == "demo" else Path(text)


def check_new(out: Path, sources: Sequence[Path], force: bool) -> None:
    """Refuse to write over a file that exists, unless forced, and over a source in any case."""
    if not out.exists():
        return
    place = Path(os.path.realpath(out))
    for source in sources:
        if Path(os.path.realpath(source)) in (place, *place.parents):
            raise AdaptrtError(f"{out}: is part of the input {source} and will not be replaced")
    if out.is_dir():
        raise AdaptrtError(f"{out}: is a folder, expected a file name")
    if not force:
        raise AdaptrtError(f"{out}: exists; --force replaces it")


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises AdaptrtError naming the byte that is not UTF-8."""
    with path.open("rb") as file:
        return read_stream(file, str(path))


def read_stream(stream: BinaryIO, name: str) -> str:
    """UTF-8 text up to the end, which a device may not have. Raises AdaptrtError naming what is wrong."""
    data = bytearray()
    while piece := stream.read(1 << 20):
        data += piece
        if len(data) > TEXT_LIMIT:
            raise AdaptrtError(f"{name}: more than {TEXT_LIMIT >> 20} MiB, expected a text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdaptrtError(f"{name}: byte {error.start} is not UTF-8 text") from None
