"""The seam for hardware: Backend.load(program, tensors) -> Executable; Executable.step(batch) -> logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.program import Embed, Linear, Logits, Norm, Program
from adaptrt.tensor import Tensor, rows_cols

Int32s = NDArray[np.int32]
Precision = Literal["exact", "fast"]


@dataclass(frozen=True)
class LoadOptions:
    """How to run a model. `threads` 0 means one per available core; `isa` forces a CPU kernel set (tests).

    `device` is what the user wrote after the backend's name and a colon (`cuda:1` → "1"), or empty: the backend
    picks. Only a backend that sets `takes_device` is ever given one. `gpu_memory` is how many bytes of the device's
    memory may be used, 0 all there is; only a backend that sets `takes_gpu_memory` is ever given a limit.
    """

    threads: int = 0
    precision: Precision = "fast"
    kv_dtype: Literal["f16", "f32"] = "f16"
    page_tokens: int = 32
    isa: Literal["auto", "portable", "avx2", "avx512", "avx512_vnni", "neon", "neon_dot", "avx_vnni"] = "auto"
    device: str = ""
    gpu_memory: int = 0


@dataclass(frozen=True)
class Batch:
    """One step's ragged batch. A run is consecutive tokens of one sequence that share an adapter stack.

    All arrays are int32: tokens, positions [n_tokens]; run_start, page_start, stack_start [n_runs + 1]; pages and
    stacks are indexed by page_start and stack_start; logit_rows picks the tokens whose logits are wanted.
    Position p of a run lives in its page p // page_tokens at slot p % page_tokens.
    """

    tokens: Int32s
    positions: Int32s
    run_start: Int32s
    page_start: Int32s
    pages: Int32s
    stack_start: Int32s
    stacks: Int32s
    logit_rows: Int32s


@dataclass(frozen=True)
class Peaks:
    """What the hardware does at best, 0 where that is not known; `device_bytes` of its own memory are in use.

    `streamed_bytes` of weights come over the bus in every step.
    """

    bytes_per_second: float = 0.0
    operations_per_second: float = 0.0
    device_bytes: int = 0
    bus_bytes_per_second: float = 0.0
    streamed_bytes: int = 0

    @property
    def bus_seconds(self) -> float:
        """Of a step."""
        return self.streamed_bytes / self.bus_bytes_per_second if self.streamed_bytes else 0.0


@dataclass(frozen=True)
class Reads:
    """What the reads of a step take at this moment, without its arithmetic; 0 where that is not known.

    `bytes_per_second` are those of the weights; `shared_seconds` it takes to read what targets of an adapter share,
    each in its place between the weights.
    """

    bytes_per_second: float = 0.0
    shared_seconds: float = 0.0


class Executable(Protocol):
    """A loaded model. Used by one thread at a time.

    One that knows its hardware has `peaks() -> Peaks`, which `adaptrt bench` compares with, and may have
    `read_step(handles) -> Reads`, which does the reads of a step with the adapters of these handles.
    One that moves idle adapters out of its device's memory has `prefetch(handles)`: the adapters of these handles will
    be named soon, so they come back while the next step runs.
    """

    def reserve(self, n_pages: int) -> None:
        """Make KV pages 0 … n_pages-1 exist. Raises BackendError when memory is short; what existed stays."""

    def attach(self, adapter: LoweredAdapter) -> int:
        """Take a lowered adapter; returns a handle for Batch.stacks. Raises BackendError when a shape does not fit."""

    def detach(self, handle: int) -> None:
        """Release an adapter."""

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run every token, store its keys and values, return logits [n_logits, vocabulary]."""

    def describe(self) -> str:
        """One line for the user: device, kernels, threads."""

    def close(self) -> None:
        """Free everything; safe to call twice."""


def prefetch(executable: Executable, handles: Sequence[int]) -> None:
    """Say that adapters will be named soon, where that means anything."""
    if handles and (bring := getattr(executable, "prefetch", None)):
        bring(handles)


@runtime_checkable
class Backend(Protocol):
    """Something that runs Programs. Registered through the `adaptrt_backends` hook.

    A backend for several devices has `takes_device = True` and reads LoadOptions.device; one that keeps within a limit
    of device memory has `takes_gpu_memory = True` and reads LoadOptions.gpu_memory.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, or None."""

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> Executable:
        """Prepare a program. `tensors` holds every name in program.weights and stays valid until close()."""


_KINDS = {Embed: "embedding", Norm: "norm", Linear: "linear", Logits: "head"}


def attach_points(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, AttachPoint]:
    """The attach points of a program by target name, in the order of `program.targets`."""
    points = {}
    for op in program.ops:
        if isinstance(op, Embed | Norm | Linear | Logits) and op.target is not None:
            rows, cols = rows_cols(tensors[op.weight].shape)
            if isinstance(op, Embed | Norm):  # an embedding's rows are its input; a norm is a diagonal
                rows, cols = cols, rows if isinstance(op, Embed) else cols
            points[op.target] = AttachPoint(_KINDS[type(op)], rows, cols)
    return points
