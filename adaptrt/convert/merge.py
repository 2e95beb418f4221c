"""A base with a stack of adapters folded in: as an `.adrt` file in the base's dtypes, or as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.base import SECTION, BaseTarget, BaseView, open_base
from adaptrt.adapters.invocation import invocation_tokens
from adaptrt.adapters.merge import changes_weight, merged_bias, merged_norm, merged_rows
from adaptrt.adapters.normal import Lowered, LoweredAdapter
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.stack import lower
from adaptrt.adapters.storage import KIND
from adaptrt.adapters.variant import Adapter, Variant, no_progress
from adaptrt.adapters.variant import Progress as TargetsDone
from adaptrt.backends.native_quant import best_kernels
from adaptrt.convert.base import Progress
from adaptrt.errors import ConvertError
from adaptrt.format import File, Writer, open_file
from adaptrt.model.architecture import Architecture, TensorSpec
from adaptrt.quant.encode import Encoder
from adaptrt.quant.finite import require_finite
from adaptrt.quant.plain import rows_to_float32, to_float32

CHUNK_ELEMENTS = 1 << 22

Stack = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class MergedModel:
    """The model that a base and a stack of adapters make: its metadata, tensors and their values, made as asked for."""

    file: File
    base: BaseView
    metadata: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    stack: tuple[LoweredAdapter, ...]

    def source(self, spec: TensorSpec) -> str:
        """The base's tensor that this one comes from: the embedding for a head that was tied to it."""
        target = self.base.targets.get(spec.target)
        return spec.name if target is None else target.weight_name

    def changed(self, spec: TensorSpec) -> bool:
        """Whether its values are other ones than the base's."""
        if spec.role == "bias":
            return any(one.c is not None or one.scales_bias for one in self._acting(spec))
        acting = self._acting(spec)
        constant = spec.role == "embedding" and any(one.c is not None for one in acting)
        return constant or changes_weight(acting)

    def chunks(self, spec: TensorSpec) -> Iterator[NDArray[np.float32]]:
        """Its values in row-major order, in runs of whole rows. Raises ConvertError for one that is not finite."""
        for chunk in self._merged(spec):
            with naming_tensor(spec):
                require_finite(chunk)
            yield chunk

    def _merged(self, spec: TensorSpec) -> Iterator[NDArray[np.float32]]:
        if not self.changed(spec) or spec.role in ("bias", "norm"):
            yield from self._whole(spec) if len(spec.shape) == 1 else self._unchanged(spec)
            return
        target, acting = self._target(spec), self._acting(spec)
        for start, stop in row_runs(spec.shape):
            yield merged_rows(target, acting, start, stop)

    def _whole(self, spec: TensorSpec) -> Iterator[NDArray[np.float32]]:
        values, acting = to_float32(self.file.tensor(SECTION, spec.name)), self._acting(spec)
        if spec.role == "bias":
            yield np.asarray(merged_bias(values, acting, len(values)))
        else:
            yield merged_norm(values, acting)

    def _unchanged(self, spec: TensorSpec) -> Iterator[NDArray[np.float32]]:
        tensor = self.file.tensor(SECTION, self.source(spec))
        for start, stop in row_runs(spec.shape):
            yield rows_to_float32(tensor, start, stop)

    def _target(self, spec: TensorSpec) -> BaseTarget:
        return self.base.targets[spec.target.removesuffix(".bias")]

    def _acting(self, spec: TensorSpec) -> list[Lowered]:
        name = spec.target.removesuffix(".bias")
        return [adapter[name] for adapter in self.stack if name in adapter]


@contextmanager
def naming_tensor(spec: TensorSpec) -> Iterator[None]:
    """Turn a quantizer's ValueError into a ConvertError that names the tensor."""
    try:
        yield
    except ValueError as error:
        raise ConvertError(f"merged tensor {spec.hf_name}: {error}") from error


def row_runs(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """A matrix's rows in runs (start, stop) of about CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // shape[1])
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def merge_model(
    file: File,
    architecture: Architecture,
    base: BaseView,
    stack: Stack,
    variants: Mapping[str, Variant],
    progress: TargetsDone = no_progress,
) -> MergedModel:
    """The merged model. Raises AdapterError naming every adapter and target that cannot be merged."""
    problems = Problems()
    for adapter, _ in stack:
        if invocation_tokens(adapter):
            problems.add(f"adapter {adapter.name!r} acts only after its invocation tokens")
    problems.raise_for("cannot merge", ConvertError)
    lowered = tuple(lower(adapter, variants, base, scale, progress) for adapter, scale in stack)
    for name, target in base.targets.items():
        acting = [one[name] for one in lowered if name in one]
        if (
            target.kind in ("linear", "head")
            and target.bias_name is None
            and any(one.c is not None for one in acting)
        ):
            problems.add(f"{name} would get a bias, which the base has not")
    problems.raise_for("cannot merge", ConvertError)
    metadata = file.metadata
    ends = [target for target in base.targets.values() if target.kind in ("embedding", "head")]
    if len({end.weight_name for end in ends}) == 1 and any(
        end.target in one for end in ends for one in lowered
    ):
        metadata = architecture.untied(metadata)
    return MergedModel(file, base, metadata, architecture.tensors(metadata), lowered)


def write_merged(model: MergedModel, out: Path, progress: Progress) -> None:
    """Write `out`, its tensors in the dtypes of the base's; what no adapter changes is copied as it is."""
    dtypes = {
        spec.name: model.file.sections[SECTION].tensors[model.source(spec)].dtype for spec in model.specs
    }
    total, done, kernels = sum(prod(spec.shape) for spec in model.specs), 0, best_kernels()
    with Writer(out, model.metadata) as writer:
        with writer.section(SECTION, kind="base") as section:
            for spec in model.specs:
                with section.stream(spec.name, dtypes[spec.name], spec.shape) as to:
                    if model.changed(spec):
                        encoder = Encoder(dtypes[spec.name], spec.shape, kernels)
                        with naming_tensor(spec):
                            for chunk in model.chunks(spec):
                                to.write(encoder.feed(chunk))
                            to.write(encoder.finish())
                    else:
                        to.write(model.file.tensor(SECTION, model.source(spec)).data)
                done += prod(spec.shape)
                progress(done, total, spec.name)
        for name, other in model.file.sections.items():
            if other.kind not in ("base", KIND):
                writer.copy_section(model.file, name)


def quantization_error(
    model: MergedModel, out: Path, architecture: Architecture, progress: Progress
) -> float:
    """‖stored - merged‖ / ‖merged‖ over all changed weights: `out` read back beside what it was made from."""
    changed = [spec for spec in model.specs if model.changed(spec) and len(spec.shape) == 2]
    difference, size, total, done = 0.0, 0.0, sum(prod(spec.shape) for spec in changed), 0
    with open_file(out) as file:
        open_base(file, {architecture.name: architecture})
        for spec in changed:
            stored = file.tensor(SECTION, spec.name)
            for (start, stop), chunk in zip(row_runs(spec.shape), model.chunks(spec), strict=True):
                lost = rows_to_float32(stored, start, stop) - chunk
                # In float64: float32 ends at squares of 2e19.
                difference += float(np.sum(np.square(lost, dtype=np.float64)))
                size += float(np.sum(np.square(chunk, dtype=np.float64)))
                done += chunk.size
                progress(done, total, spec.name)
    return float(np.sqrt(difference / size)) if size else 0.0
