"""The seam for foreign formats: an Importer turns a file or folder into one `.adrt` file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

from adaptrt.errors import ConvertError
from adaptrt.model.llama import LlamaArchitecture

if TYPE_CHECKING:
    from adaptrt.adapters.stored import AdapterDtype
    from adaptrt.adapters.variant import Variant
    from adaptrt.model.architecture import Architecture

WeightDtype = Literal["nf4", "int8", "bf16", "f16", "f32"]

Progress = Callable[[int, int, str], None]  # bytes of input done, bytes in all, what was just done


@dataclass(frozen=True)
class ConvertOptions:
    """What the user may choose. `dtype` is for linear layers, `head` for the embedding and the head.

    None means the default: nf4, and what `head_dtype` says. `base` is the `.adrt` file an adapter belongs to,
    `adapter_dtype` what its large tensors are stored in, `initial` the folder of the adapter as it was initialised.
    `architectures` and `variants` are the installed ones by name, handed down by whoever built the plugin registry.
    """

    dtype: WeightDtype | None = None
    head: WeightDtype | None = None
    name: str | None = None
    base: Path | None = None
    adapter_dtype: AdapterDtype | None = None
    initial: Path | None = None
    architectures: Mapping[str, Architecture] = field(default_factory=lambda: {"llama": LlamaArchitecture()})
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, dtype in (("dtype", self.linear_dtype), ("head", self.head_dtype)):
            if dtype not in get_args(WeightDtype):
                expected = ", ".join(get_args(WeightDtype))
                raise ConvertError(f"option {key} is {dtype!r}, expected one of {expected}")

    @property
    def linear_dtype(self) -> WeightDtype:
        """The dtype of linear layers."""
        return self.dtype or "nf4"

    @property
    def head_dtype(self) -> WeightDtype:
        """The dtype of embedding and head: int8 beside quantized layers, else theirs."""
        return self.head or ("int8" if self.linear_dtype in ("nf4", "int8") else self.linear_dtype)


@runtime_checkable
class Importer(Protocol):
    """Reads one foreign format. Stateless: one instance serves every conversion."""

    name: str

    def claims(self, path: Path) -> bool:
        """Whether `path` looks like this format. Cheap, and never raises: it may be anything."""

    def convert(self, src: Path, out: Path, options: ConvertOptions, progress: Progress) -> None:
        """Write `out` whole or leave nothing behind. Raises ConvertError naming what is wrong with `src`."""
