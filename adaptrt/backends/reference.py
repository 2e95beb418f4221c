"""The reference backend: numpy, slow and obvious. It defines what every operation and the normal form mean.

It trusts its batch (the engine builds it) and checks only what a user can get wrong: adapter shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.fit import FLOAT_DTYPES, AttachPoint
from adaptrt.adapters.normal import Kronecker, Lowered, LoweredAdapter, Sparse, Term
from adaptrt.backends.base import Batch, LoadOptions, attach_points
from adaptrt.backends.checks import check_adapter
from adaptrt.errors import BackendError
from adaptrt.program import (
    Add,
    Attention,
    Embed,
    Gated,
    Linear,
    Logits,
    Norm,
    Op,
    Program,
    Rope,
    Scale,
)
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

Floats = NDArray[np.float32]
Product = Callable[[Floats], Floats]
KV_DTYPES = {"f16": np.float16, "f32": np.float32}


class ReferenceBackend:
    """Runs anywhere numpy runs."""

    name = "reference"

    def unavailable(self) -> str | None:
        """Always available."""
        return None

    def load(
        self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions
    ) -> ReferenceExecutable:
        """Dequantize every weight to float32 and get ready to step; `precision` and `threads` have no effect."""
        return ReferenceExecutable(program, tensors, options)


@dataclass(frozen=True)
class Run:
    """A run of the batch, unpacked: its token rows, their positions, its pages and its adapter stack."""

    rows: slice
    positions: NDArray[np.int32]
    pages: NDArray[np.int32]
    stack: tuple[LoweredAdapter, ...]


class ReferenceExecutable:
    """A Program over float32 arrays; registers are [tokens, width]."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> None:
        self.program = program
        self.page_tokens = options.page_tokens
        self.kv_dtype = KV_DTYPES[options.kv_dtype]
        self.weights = {name: to_float32(tensors[name]) for name in program.weights}
        self.points = attach_points(program, tensors)
        self.pages: dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any]]] = {}  # (page, layer) -> k, v
        self.n_pages = 0
        self.adapters: dict[int, LoweredAdapter] = {}
        self.next_handle = 0

    def reserve(self, n_pages: int) -> None:
        """Allow pages 0 … n_pages-1; each is allocated when first written."""
        self.n_pages = max(self.n_pages, n_pages)

    def attach(self, adapter: LoweredAdapter) -> int:
        """Keep the adapter; raises BackendError for an unknown target or a shape that does not fit."""
        check_adapter(adapter, self.points)
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.adapters[handle] = adapter
        return handle

    def detach(self, handle: int) -> None:
        """Forget an adapter."""
        del self.adapters[handle]

    def describe(self) -> str:
        """One line for the user."""
        return "reference: numpy float32"

    def close(self) -> None:
        """Drop the weights and the KV pages."""
        self.weights, self.pages = {}, {}

    def step(self, batch: Batch) -> Floats:
        """Run every op in order over the whole batch."""
        registers: dict[str, Floats] = {}
        runs = list(self._runs(batch))
        with np.errstate(invalid="ignore"):  # BLAS may raise the flag for what it reads past a row's end
            for op in self.program.ops:
                if isinstance(op, Logits):
                    return self._logits(op, registers[op.src], runs, batch.logit_rows)
                self._execute(op, registers, runs, batch)
        raise BackendError("the program has no Logits operation")

    def _runs(self, batch: Batch) -> Iterator[Run]:
        for i in range(len(batch.run_start) - 1):
            rows = slice(batch.run_start[i], batch.run_start[i + 1])
            pages = batch.pages[batch.page_start[i] : batch.page_start[i + 1]]
            handles = batch.stacks[batch.stack_start[i] : batch.stack_start[i + 1]]
            yield Run(rows, batch.positions[rows], pages, tuple(self.adapters[int(h)] for h in handles))

    def _execute(self, op: Op, registers: dict[str, Floats], runs: list[Run], batch: Batch) -> None:
        if isinstance(op, Embed):
            registers[op.out] = self._embed(op, runs, batch.tokens)
        elif isinstance(op, Norm):
            registers[op.out] = self._norm(op, registers[op.src], runs)
        elif isinstance(op, Linear):
            registers[op.out] = self._linear(op, registers[op.src], runs)
        elif isinstance(op, Rope):
            registers[op.reg] = self._rope(op, registers[op.reg], batch.positions)
        elif isinstance(op, Attention):
            registers[op.out] = self._attention(op, registers, runs)
        elif isinstance(op, Gated):
            registers[op.out] = activate(registers[op.gate], op.activation) * registers[op.up]
        elif isinstance(op, Add):
            registers[op.out] = registers[op.a] + registers[op.b]
        elif isinstance(op, Scale):
            registers[op.out] = softcap(registers[op.src] * np.float32(op.factor), op.softcap)

    def _norm(self, op: Norm, x: Floats, runs: list[Run]) -> Floats:
        size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(op.eps))
        y = np.asarray(x / size * self.weights[op.weight].reshape(-1))
        for run in runs:
            for lowered in acting(run.stack, op.target):
                if lowered.g_out is not None:
                    y[run.rows] *= lowered.g_out
        return y

    def _embed(self, op: Embed, runs: list[Run], tokens: NDArray[np.int32]) -> Floats:
        table = self.weights[op.weight]
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        for run in runs:  # x is one-hot: W and V give a column, g_in one value
            columns = tokens[run.rows]
            lowered = acting(run.stack, op.target)
            gains = map_input(np.ones((1, len(table)), np.float32), lowered)
            base = table[columns] * gains[0, columns, None]
            out[run.rows] = apply_stack(base, lowered, self.points[op.target], partial(pick_columns, columns))
        return out

    def _linear(self, op: Linear | Logits, x: Floats, runs: list[Run]) -> Floats:
        weight = self.weights[op.weight]
        bias = None if op.bias is None else self.weights[op.bias].reshape(-1)
        out = np.empty((len(x), weight.shape[0]), np.float32)
        for run in runs:
            rows, lowered = x[run.rows], acting(run.stack, op.target)
            base = map_input(rows, lowered) @ weight.T
            product = partial(multiply, rows)
            out[run.rows] = apply_stack(base, lowered, self.points[op.target], product, bias)
        return out

    def _logits(self, op: Logits, x: Floats, runs: list[Run], logit_rows: NDArray[np.int32]) -> Floats:
        return self._linear(op, x, runs)[logit_rows]

    def _rope(self, op: Rope, x: Floats, positions: NDArray[np.int32]) -> Floats:
        angles = positions.astype(np.float32)[:, None] * self.program.constants[op.inv_freq]
        factor = np.float32(op.factor)
        cos, sin = np.cos(angles)[:, None] * factor, np.sin(angles)[:, None] * factor
        first, second = np.split(x.reshape(len(x), op.heads, op.head_dim), 2, axis=-1)
        rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.reshape(x.shape)

    def _attention(self, op: Attention, registers: dict[str, Floats], runs: list[Run]) -> Floats:
        q = registers[op.q]
        out = np.empty_like(q)
        for run in runs:
            self._store(op, run, registers[op.k][run.rows], registers[op.v][run.rows])
        for run in runs:
            keys, values = self._gather(op, run)
            for row, position in zip(range(run.rows.start, run.rows.stop), run.positions, strict=True):
                heads = q[row].reshape(op.kv_heads, op.heads // op.kv_heads, op.head_dim)
                seen = slice(0, position + 1)
                scores = np.einsum("ghd,tgd->ght", heads, keys[seen]) * np.float32(op.scale)
                weights = softmax(softcap(scores, op.softcap))
                out[row] = np.einsum("ght,tgd->ghd", weights, values[seen]).reshape(-1)
        return out

    def _store(self, op: Attention, run: Run, k: Floats, v: Floats) -> None:
        for position, key, value in zip(run.positions, k, v, strict=True):
            page = int(run.pages[position // self.page_tokens])
            if not 0 <= page < self.n_pages:
                raise BackendError(f"KV page {page} is not reserved: {self.n_pages} pages exist")
            shape = (self.page_tokens, op.kv_heads, op.head_dim)
            if (page, op.layer) not in self.pages:
                self.pages[page, op.layer] = (np.zeros(shape, self.kv_dtype), np.zeros(shape, self.kv_dtype))
            keys, values = self.pages[page, op.layer]
            keys[position % self.page_tokens] = key.reshape(shape[1:])
            values[position % self.page_tokens] = value.reshape(shape[1:])

    def _gather(self, op: Attention, run: Run) -> tuple[Floats, Floats]:
        used = run.pages[: int(run.positions[-1]) // self.page_tokens + 1]
        pairs = [self.pages[int(page), op.layer] for page in used]
        keys, values = (np.concatenate(part).astype(np.float32) for part in zip(*pairs, strict=True))
        return keys, values


def acting(stack: Sequence[LoweredAdapter], target: str | None) -> list[Lowered]:
    """What the adapters of a stack do to one target, in stacking order."""
    return [adapter[target] for adapter in stack if target is not None and target in adapter]


def multiply(x: Floats, m: Floats) -> Floats:
    """M x for inputs x [T, in]: [T, rows of M]."""
    return np.asarray(x @ m.T)


def pick_columns(tokens: NDArray[np.int32], m: Floats) -> Floats:
    """M x for one-hot inputs given as token ids: [T, rows of M]."""
    return np.asarray(m[:, tokens].T)


def map_input(x: Floats, stack: Sequence[Lowered]) -> Floats:
    """The input that W sees: x [T, in] after every g_in and rotation, in order."""
    for lowered in stack:
        if lowered.g_in is not None:
            x = x * lowered.g_in
        if lowered.rotation is not None:
            blocks, b, _ = lowered.rotation.shape
            x = np.einsum("tnb,ncb->tnc", x.reshape(len(x), blocks, b), lowered.rotation).reshape(x.shape)
    return x


def apply_stack(
    y: Floats, stack: Sequence[Lowered], point: AttachPoint, product: Product, bias: Floats | None = None
) -> Floats:
    """The normal form over a base product y [T, out] and bias [out]; product(M) gives M x, M [rows, in]."""
    constant = np.zeros(point.out, np.float32) if bias is None else bias
    for lowered in stack:
        for term in lowered.terms:
            y = y + np.float32(term.scale) * term_change(term, point, product)
        if lowered.g_out is not None:
            y = y * lowered.g_out
            constant = constant * lowered.g_out if lowered.scales_bias else constant
        if lowered.c is not None:
            constant = constant + lowered.c
    return np.asarray(y + constant, np.float32)


def term_change(term: Term, point: AttachPoint, product: Product) -> Floats:
    """What a term adds before its scale, [T, out]."""
    if isinstance(term, Kronecker):
        return product(np.kron(to_float32(term.w1), to_float32(term.w2)))
    if isinstance(term, Sparse):
        change = np.zeros(point.weight_shape, np.float32)
        change[np.repeat(np.arange(len(change)), np.diff(term.row_start)), term.columns] = term.values
        return product(change.T if point.kind == "embedding" else change)
    hidden = product(to_float32(term.v)[:, : point.inner])
    if term.d is not None:
        hidden = hidden * term.d
    if term.u is not None:
        u = to_float32(term.u)
        hidden = hidden @ (u.T if term.u.dtype in FLOAT_DTYPES else u)[:, : point.out]
    return hidden if term.e is None else hidden * term.e


def activate(x: Floats, activation: str) -> Floats:
    """SiLU, or GELU in its tanh approximation."""
    if activation == "silu":
        return np.asarray(
            np.float32(0.5) * x * (1 + np.tanh(np.float32(0.5) * x))
        )  # x · sigmoid(x), without overflow
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)))


def softcap(x: Floats, cap: float) -> Floats:
    """Cap · tanh(x / cap), or x when cap is 0."""
    return np.asarray(np.float32(cap) * np.tanh(x / np.float32(cap))) if cap > 0 else x


def softmax(scores: Floats) -> Floats:
    """Softmax over the last axis."""
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), np.float32)
