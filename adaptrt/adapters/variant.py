"""The seam for adapter methods: a Variant reads one module's tensors once and lowers them to the normal form.

A new method is one subclass, published through the `adaptrt_variants` hook; it needs no C. What it declares
(`options`, `params`, `roles`) is checked for it, at import and again when a stored adapter is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import COMMON_OPTIONS, Rule, check_options
from adaptrt.adapters.problems import Problems
from adaptrt.tensor import Tensor

Floats = NDArray[np.float32]
# Weights that `over_rows` dequantizes at a time, about. Arrays above 128 KiB are mapped anew at every use, and their
# page faults cost more than the arithmetic.
BLOCK_VALUES = 1 << 15

Progress = Callable[[int, int], None]  # targets done, in all


def no_progress(done: int, total: int) -> None:
    """For whoever shows none."""


Params = Mapping[str, float | int | str | bool]
Roles = Mapping[str, str]


class BaseWeight(Protocol):
    """The base tensor an adapter changes, dequantized only when asked."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight; (vocabulary, width) for an embedding, (width, width) for a norm."""

    @property
    def kind(self) -> str:
        """`linear`, `embedding`, `head` or `norm`."""

    def weight(self) -> NDArray[np.float32]:
        """The weight as the kernels see it: dequantized, float32, of `shape`; a norm's is its diagonal [width]."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start … stop - 1 of the weight, the others left alone; not for a norm."""

    def stored(self) -> Tensor:
        """The weight as the base's file holds it, not copied; not for a norm."""

    def bias(self) -> NDArray[np.float32] | None:
        """The base bias [out], if it has one."""


def over_rows(base: BaseWeight, work: Callable[[slice, Floats], Floats]) -> Iterator[Floats]:
    """What `work` makes of every few rows of the weight in turn, given which they are and their values; not for a norm.

    The whole dequantized weight never exists at once.
    """
    rows, cols = base.shape
    step = max(1, BLOCK_VALUES // cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield work(slice(start, stop), base.rows(start, stop))


@dataclass(frozen=True)
class Target:
    """One adapted tensor with its resolved semantics: nothing is left to recompute from a config.

    `target` is the file's name for it (`blk.0.attn_q`), `params` holds JSON scalars such as rank and scale,
    and `tensors` maps a role (`A`, `B`, `bias`, …) to the PEFT tensor name in `Adapter.tensors`. Besides the
    variant's own there are the roles that any target may carry (adapters/carried.py).
    """

    target: str
    params: Params
    tensors: Roles


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: its variant's name, its targets and its tensors under their original PEFT names.

    `config_text` is the verbatim adapter_config.json; `base` says which base it was converted for (empty when
    it came straight from a PEFT folder); `notes` tell what of the folder was left out, and why that is sound.
    """

    name: str
    variant: str
    targets: tuple[Target, ...]
    tensors: Mapping[str, Tensor]
    config_text: str
    base: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class Module:
    """One adapted module of a PEFT folder, as the importer shows it to a variant.

    `path` is the Hugging Face module path (`model.layers.0.self_attn.q_proj`), `tensors` maps a suffix
    (`lora_A.weight`) to its tensor, `shared` maps the keys that belong to no module (`base_model.vera_A`).
    Both load a tensor when it is indexed.
    """

    path: str
    base: BaseWeight
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    discarded: dict[str, str] = field(default_factory=dict)

    def discard(self, suffix: str, reason: str) -> None:
        """Leave out a tensor that changes nothing at inference; the reason is noted in the adapter."""
        self.discarded[suffix] = reason


class Variant(ABC):
    """An adapter method. Stateless: one instance serves every adapter.

    `params` gives the type of every parameter of a Target. `roles` gives the shape of every tensor: `out` and
    `in` are the base's (an embedding maps `in` = vocabulary to `out` = width), a name in `params` is that
    number, any other name must be the same size wherever the target uses it. Roles in `optional` may be
    absent, those in `integers` hold whole numbers, those in `derived` come from `derive`. `options` adds to the options
    that every PEFT method has. `adds` says that the method only adds to the weight, the same whatever that holds, so
    that it goes with replaced rows of a head.
    """

    name: str  # as stored in files and shown to users: "lora"
    options: ClassVar[Mapping[str, Rule]] = {}
    params: ClassVar[Mapping[str, type]] = {}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]]
    optional: ClassVar[frozenset[str]] = frozenset()
    integers: ClassVar[frozenset[str]] = frozenset()
    derived: ClassVar[frozenset[str]] = frozenset()
    adds: ClassVar[bool] = False

    @abstractmethod
    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a PEFT adapter_config.json belongs to this variant. Two claims are refused."""

    def check_config(self, config: Mapping[str, Any], problems: Problems) -> None:
        """Honour or refuse, by name, every option of the config; one that no rule knows must be at rest."""
        check_options(config, {**COMMON_OPTIONS, **self.options}, problems)

    def complete(
        self, config: Mapping[str, Any], modules: Sequence[Module], problems: Problems
    ) -> Mapping[str, Tensor]:
        """Shared tensors that the folder leaves out, computed from the config and all its modules.

        Called once, before `resolve`; what it returns is used, checked and stored as if the folder had held it.
        """
        return {}

    @abstractmethod
    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """Turn one module into a Target's params and roles; called only for a config without problems.

        Roles map to a suffix of `module.tensors` or to a key of `module.shared`. The importer refuses a role
        whose tensor is missing, and every tensor that no role names and `module.discard` did not leave out.
        """

    def derive(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Mapping[str, Tensor]:
        """The roles in `derived`: what `lower` needs of the whole base weight, computed and stored once, at import.

        For a method whose `lower` would otherwise go over the base at every load and every scale. An adapter may still
        come without them.
        """
        return {}

    @abstractmethod
    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """The normal form of one target, as trained; `tensors` by role.

        Called once per adapter, at load, with params and tensors already checked. Raises AdapterError for what their
        types and shapes cannot show.
        """

    def at_scale(
        self,
        lowered: Lowered,
        params: Params,
        tensors: Mapping[str, Tensor],
        base: BaseWeight,
        scale: float,
    ) -> Lowered:
        """What `lower` gave, at the user's `scale` (1 = as trained, never 0): called for 1 too, once per scale.

        The scale multiplies the change. Override it for a method of which that is not so (DoRA), and keep the terms'
        tensors, which backends then hold once for all scales.
        """
        return lowered.scaled(scale)
