"""A Program on torch tensors, one operation at a time over the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import gelu, silu

from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.backends.base import Batch, LoadOptions, attach_points
from adaptrt.backends.checks import check_adapter, check_batch
from adaptrt.errors import BackendError, ClosedError
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Logits, Norm, Op, Program, Rope, Scale
from adaptrt.tensor import Tensor
from adaptrt_torch.adapters import Effect
from adaptrt_torch.attention import Cache, Places, attend
from adaptrt_torch.matrices import Matrix, matrix, to_device
from adaptrt_torch.placement import Handles, Level, Placement

DEVICES = ("cpu", "cuda", "mps", "xpu")
KEPT = 8  # compositions of adapters whose stacked matrices stay on the device between steps
Registers = dict[str, torch.Tensor]
Effects = list[tuple[Effect, Level]]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """torch's errors (memory, a device it lacks) as BackendError with their first line."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackendError(f"backend torch: {what}: {line}") from error


def find_device(name: str) -> torch.device:
    """The named device, or the best there is. Raises BackendError when torch lacks it."""
    if not name:
        found = {
            "cuda": torch.cuda.is_available(),
            "xpu": torch.xpu.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        return torch.device(next((kind for kind, there in found.items() if there), "cpu"))
    with translated(f"device {name!r}"):
        device = torch.device(name)
        if device.type not in DEVICES:
            raise BackendError(f"backend torch: device {name!r}: expected one of {', '.join(DEVICES)}")
        torch.empty(1, device=device)
    return device


class TorchExecutable:
    """A loaded model. Registers are float32 [tokens, width]; weights keep their dtype until they are used."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> None:
        self._program, self._device = program, find_device(options.device)
        self._threads = options.threads if self._device.type == "cpu" else 0
        fast = options.precision == "fast" and self._device.type == "cuda"
        self._dtype = torch.bfloat16 if fast else torch.float32  # of products with the weights
        self._points = attach_points(program, tensors)
        self._n_ids = min(point.inner for point in self._points.values() if point.kind == "embedding")
        self._adapters: dict[int, LoweredAdapter] = {}
        self._next_handle = 0
        self._uploaded: WeakKeyDictionary[Tensor, Matrix] = WeakKeyDictionary()
        self._effects: dict[Handles, dict[str, Effect | None]] = {}
        self._closed = False
        with translated("the model"):
            self._weights = {name: self._upload(tensors[name]) for name in program.weights}
            self._constants = {
                name: to_device(value, self._device) for name, value in program.constants.items()
            }
            self._cache = Cache(program, options.page_tokens, options.kv_dtype, self._device)

    def reserve(self, n_pages: int) -> None:
        """Make KV pages 0 … n_pages-1 exist. Raises BackendError when memory is short; what existed stays."""
        self._check_open()
        with translated(f"{n_pages} KV pages"):
            self._cache.reserve(n_pages)

    def attach(self, adapter: LoweredAdapter) -> int:
        """Keep a lowered adapter; its matrices go to the device when first used.

        Raises BackendError for an unknown attach point or a shape that does not fit.
        """
        self._check_open()
        check_adapter(adapter, self._points)
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._adapters[handle] = adapter
        return handle

    def detach(self, handle: int) -> None:
        """Release an adapter. Raises BackendError for an unknown handle."""
        self._check_open()
        if handle not in self._adapters:
            raise BackendError(f"no adapter with handle {handle}")
        del self._adapters[handle]
        self._effects = {handles: kept for handles, kept in self._effects.items() if handle not in handles}

    def describe(self) -> str:
        """One line for the user: device and precision."""
        name = f" ({torch.cuda.get_device_name(self._device)})" if self._device.type == "cuda" else ""
        return f"torch {torch.__version__}: {self._device}{name}, {str(self._dtype).removeprefix('torch.')}"

    def close(self) -> None:
        """Drop everything; safe to call twice."""
        if not self._closed:
            self._closed = True
            del self._weights, self._constants, self._cache, self._effects, self._adapters, self._uploaded

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run every token, store its keys and values, return logits [n_logits, vocabulary].

        Raises BackendError for an impossible batch.
        """
        self._check_open()
        cache = self._cache
        batch = check_batch(batch, self._n_ids, cache.n_pages, cache.page_tokens, self._adapters)
        with translated("a step"), torch.inference_mode(), self._limited_threads():
            logits: NDArray[np.float32] = self._run(batch).cpu().numpy()
            return logits

    @contextmanager
    def _limited_threads(self) -> Iterator[None]:
        """The number of threads that was asked for; torch keeps one number for the whole process."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the executable was used after close()")

    def _run(self, batch: Batch) -> torch.Tensor:
        step = Step(batch, self._cache.page_tokens, self._device)
        registers: Registers = {}
        for op in self._program.ops:
            if isinstance(op, Logits):
                rows = torch.from_numpy(batch.logit_rows.astype(np.int64)).to(self._device)
                return self._linear(op, registers[op.src][rows], step.placement.take(batch.logit_rows))
            self._execute(op, registers, step)
        raise BackendError("the program has no Logits operation")

    def _execute(self, op: Op, registers: Registers, step: Step) -> None:
        if isinstance(op, Embed):
            registers[op.out] = self._embed(op, step)
        elif isinstance(op, Norm):
            registers[op.out] = self._norm(op, registers[op.src], step.placement)
        elif isinstance(op, Linear):
            registers[op.out] = self._linear(op, registers[op.src], step.placement)
        elif isinstance(op, Rope):
            registers[op.reg] = rope(op, registers[op.reg], step.positions, self._constants[op.inv_freq])
        elif isinstance(op, Attention):
            self._cache.store(op, step.places, registers[op.k], registers[op.v])
            registers[op.out] = attend(op, registers[op.q], self._cache, step.places)
        elif isinstance(op, Gated):
            gate = registers[op.gate]
            gate = silu(gate) if op.activation == "silu" else gelu(gate, approximate="tanh")
            registers[op.out] = gate * registers[op.up]
        elif isinstance(op, Add):
            registers[op.out] = registers[op.a] + registers[op.b]
        elif isinstance(op, Scale):
            scaled = registers[op.src] * op.factor
            capped = op.softcap * torch.tanh(scaled / op.softcap) if op.softcap > 0 else scaled
            registers[op.out] = capped

    def _norm(self, op: Norm, x: torch.Tensor, placement: Placement) -> torch.Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + op.eps).sqrt()
        y = y * self._weights[op.weight].dense().flatten()
        for effect, level in self._effects_of(op.target, placement):
            if effect.g_out is not None:
                y = y * effect.g_out[level.members[:-1]]
        return y

    def _embed(self, op: Embed, step: Step) -> torch.Tensor:
        y = self._weights[op.weight].rows(step.tokens)
        effects = self._effects_of(op.target, step.placement)
        for effect, level in effects:
            if effect.g_in is not None:  # the input is one-hot: one of its gains acts
                y = y * effect.g_in[level.members[:-1], step.tokens, None]
        return accumulate(y, torch.zeros_like(y), step.tokens, effects)

    def _linear(self, op: Linear | Logits, x: torch.Tensor, placement: Placement) -> torch.Tensor:
        effects, seen = self._effects_of(op.target, placement), x
        for effect, level in effects:
            seen = effect.map_input(seen, level)
        weight = self._weights[op.weight].dense().to(self._dtype)
        y = (seen.to(self._dtype) @ weight.T).float()
        bias = torch.zeros_like(y)
        if op.bias is not None:
            bias = bias + self._weights[op.bias].dense().flatten()
        return accumulate(y, bias, x, effects)

    def _effects_of(self, target: str | None, placement: Placement) -> Effects:
        """What acts at an attach point, in stacking order."""
        if target is None:
            return []
        found = [(self._effect(target, level.handles), level) for level in placement.levels]
        return [(effect, level) for effect, level in found if effect is not None]

    def _effect(self, target: str, handles: Handles) -> Effect | None:
        """One level's adapters at an attach point, kept for the next step while the composition recurs."""
        kept = self._effects.pop(handles, {})
        self._effects[handles] = kept  # now the most recent
        if len(self._effects) > KEPT:
            del self._effects[next(iter(self._effects))]
        if target not in kept:
            members = [*(self._adapters[handle].get(target) for handle in handles), None]
            acts = any(member is not None for member in members)
            kept[target] = Effect(members, self._points[target], self._upload, self._device) if acts else None
        return kept[target]

    def _upload(self, tensor: Tensor) -> Matrix:
        """A tensor of an adapter on the device; one that several share is there once."""
        if tensor not in self._uploaded:
            self._uploaded[tensor] = matrix(tensor, self._device)
        return self._uploaded[tensor]


class Step:
    """A batch's arrays on the device."""

    def __init__(self, batch: Batch, page_tokens: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(batch.tokens.astype(np.int64)).to(device)
        self.positions = torch.from_numpy(batch.positions.astype(np.float32)).to(device)
        self.places = Places(batch, page_tokens, device)
        self.placement = Placement.of(batch, device)


def accumulate(y: torch.Tensor, constant: torch.Tensor, x: torch.Tensor, effects: Effects) -> torch.Tensor:
    """The normal form over a base product y and bias [tokens, out]; x as the terms see it."""
    for effect, level in effects:
        y, constant = effect.map_output(y, constant, x, level)
    return y + constant


def rope(op: Rope, x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads · head_dim] rotated to its positions."""
    angles = (positions[:, None] * inv_freq)[:, None]
    cos, sin = torch.cos(angles) * op.factor, torch.sin(angles) * op.factor
    first, second = x.unflatten(1, (op.heads, op.head_dim)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(1)
