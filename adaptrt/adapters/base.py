"""The base model as adapters see it: attach points by name and by module, and a record to know it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.problems import brief
from adaptrt.errors import ModelError
from adaptrt.format import File
from adaptrt.model.architecture import Architecture, TensorSpec
from adaptrt.program import Embed, Linear, Logits, Norm, Program
from adaptrt.quant.plain import rows_to_float32, to_float32
from adaptrt.tensor import Tensor

SECTION = "base"
DIGEST_DIGITS = 16  # of a tensor's SHA-256, in the record an adapter keeps of its base

_KINDS = {Embed: "embedding", Norm: "norm", Linear: "linear", Logits: "head"}


@dataclass(frozen=True)
class BaseTarget:
    """One attach point of the base; a BaseWeight. `module` is its Hugging Face path."""

    target: str
    module: str
    kind: str
    shape: tuple[int, int]
    weight_name: str
    bias_name: str | None
    file: File

    def weight(self) -> NDArray[np.float32]:
        """The dequantized weight, computed at every call; a norm's is its diagonal [width]."""
        return to_float32(self.stored())

    def stored(self) -> Tensor:
        """The weight as it lies in the file."""
        return self.file.tensor(SECTION, self.weight_name)

    def bias(self) -> NDArray[np.float32] | None:
        """The bias [out], if the base has one."""
        return None if self.bias_name is None else to_float32(self.file.tensor(SECTION, self.bias_name))

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start … stop - 1 of the weight."""
        return rows_to_float32(self.stored(), start, stop)


class BaseView:
    """A model file's base: its program and tensor specs, `targets` by attach point, `modules` by Hugging Face path.

    Raises ModelError unless the file holds exactly the tensors that its metadata promises.
    """

    def __init__(self, file: File, architecture: Architecture) -> None:
        self._file = file
        self.architecture = architecture.name
        self.program = architecture.program(file.metadata)
        self.specs = architecture.tensors(file.metadata)
        check_tensors(file, self.specs)
        found = _targets(file, architecture, self.program)
        self.targets: Mapping[str, BaseTarget] = {target.target: target for target in found}
        self.modules: Mapping[str, BaseTarget] = {target.module: target for target in found}

    @property
    def name(self) -> str:
        """What the base calls itself."""
        return str(self._file.metadata.get("general.name", ""))

    @property
    def fingerprint(self) -> str:
        """The digest of the base's section: names, dtypes, shapes and contents of all its tensors."""
        return self._file.sections[SECTION].digest

    @property
    def tensors(self) -> Mapping[str, list[Any]]:
        """Every tensor's dtype, shape and the start of its SHA-256."""
        entries = self._file.sections[SECTION].tensors.values()
        return {e.name: [e.dtype, list(e.shape), e.sha256[:DIGEST_DIGITS]] for e in entries}

    def weights(self) -> dict[str, Tensor]:
        """What the program reads, by name, straight from the map."""
        return {name: self._file.tensor(SECTION, name) for name in self.program.weights}

    def record(self) -> dict[str, Any]:
        """What an adapter stores of its base."""
        return {
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "name": self.name,
            "tensors": dict(self.tensors),
        }


def open_base(file: File, architectures: Mapping[str, Architecture]) -> BaseView:
    """The base of an open model file. Raises ModelError when there is none or its architecture is unknown."""
    if SECTION not in file.sections:
        raise ModelError(f"{file.path}: holds no base model, expected a model file")
    name = str(file.metadata.get("general.architecture"))
    if name not in architectures:
        known = ", ".join(sorted(architectures))
        raise ModelError(f"{file.path}: architecture {brief(name)} is not supported; installed: {known}")
    return BaseView(file, architectures[name])


def check_tensors(file: File, specs: Sequence[TensorSpec]) -> None:
    """Raise ModelError naming the first few tensors that are missing, unknown or of another shape."""
    found, wanted = file.sections[SECTION].tensors, {spec.name: spec for spec in specs}
    problems = [
        f"{name}: missing, expected {list(wanted[name].shape)}" for name in wanted if name not in found
    ]
    problems += [f"{name}: unknown" for name in found if name not in wanted]
    for name, spec in wanted.items():
        if name in found and tuple(found[name].shape) != spec.shape:
            problems.append(f"{name}: found {list(found[name].shape)}, expected {list(spec.shape)}")
        if name in found and found[name].dtype in ("u8", "i32"):
            problems.append(f"{name}: found {found[name].dtype}, expected a type of weights")
    if problems:
        raise ModelError(
            f"{file.path}: {len(problems)} tensors do not fit the metadata: {'; '.join(problems[:3])}"
        )


def _targets(file: File, architecture: Architecture, program: Program) -> list[BaseTarget]:
    specs = {spec.name: spec for spec in architecture.tensors(file.metadata)}
    found = []
    for op in program.ops:
        if isinstance(op, Embed | Norm | Linear | Logits) and op.target is not None:
            spec = specs[op.weight]
            tied = isinstance(op, Logits) and spec.role == "embedding"
            module = architecture.hf_head if tied else spec.hf_name.removesuffix(".weight")
            rows, cols = spec.shape[0], spec.shape[-1]  # a norm's weight is the diagonal of a square
            bias = op.bias if isinstance(op, Linear | Logits) else None
            found.append(BaseTarget(op.target, module, _KINDS[type(op)], (rows, cols), op.weight, bias, file))
    return found
