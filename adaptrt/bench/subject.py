"""Our own work: decode steps and prefills of an executable, for any number of streams and adapter stacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import prod

import numpy as np

from adaptrt.backends.base import Batch, Executable, Reads
from adaptrt.bench.added import Added
from adaptrt.bench.work import Work
from adaptrt.program import Attention, Linear, Logits, Program
from adaptrt.tensor import Tensor

Stack = tuple[int, ...]  # adapter handles
NOTHING = Added()


@dataclass(frozen=True)
class Cost:
    """Bytes a step must read, and operations each token and each row of logits must do.

    `context_bytes` are the keys and values (float16) that a stream's token must read for each token before it.
    """

    step_bytes: int
    context_bytes: int
    token_operations: int
    logit_operations: int

    @classmethod
    def of(cls, program: Program, tensors: dict[str, Tensor]) -> Cost:
        """The cost of a base model: every linear layer and the head; an embedding table only gives rows."""
        linear = {op.weight for op in program.ops if isinstance(op, Linear)}
        head = {op.weight for op in program.ops if isinstance(op, Logits)}
        return cls(
            step_bytes=sum(tensors[name].data.nbytes for name in linear | head),
            context_bytes=sum(
                4 * op.kv_heads * op.head_dim for op in program.ops if isinstance(op, Attention)
            ),
            token_operations=2 * sum(prod(tensors[name].shape) for name in linear),
            logit_operations=2 * sum(prod(tensors[name].shape) for name in head),
        )


@dataclass(frozen=True)
class Subject:
    """An executable to be timed."""

    executable: Executable
    cost: Cost
    page_tokens: int
    vocab_size: int

    def decode(
        self,
        name: str,
        stacks: Sequence[Stack],
        steps: int,
        context: int = 0,
        added: Added = NOTHING,
        without: Work | None = None,
        repeats: int = 1,
        steady: bool = False,
    ) -> Work:
        """One token for each stack's stream, after `context` others, `repeats` times for each of `steps` in a round.

        `added` is by the stacks, `without` the same work without them, which is `steady` as this one then is.
        """
        streams, pages = len(stacks), self._pages(context + steps)
        self.executable.reserve(streams * pages)
        positions = cycle(range(context, context + steps))

        def run() -> float:
            return self._step(stacks, next(positions), 1, pages)

        cost = self.cost
        n_bytes = cost.step_bytes + streams * (context + steps // 2) * cost.context_bytes
        operations = (cost.token_operations + cost.logit_operations) * streams + added.operations
        return Work(
            name,
            streams,
            run,
            n_bytes + added.own_bytes + added.shared_bytes,
            operations,
            steps * repeats,
            without=without,
            shared_bytes=added.shared_bytes,
            probe=self._probe(stacks) if without else None,
            steady=steady or without is not None,
        )

    def _probe(self, stacks: Sequence[Stack]) -> Callable[[], Reads] | None:
        """Of the reads of a step, where the backend has one."""
        read_step = getattr(self.executable, "read_step", None)
        handles = sorted({handle for stack in stacks for handle in stack})
        return (lambda: read_step(handles)) if read_step else None

    def prefill(self, name: str, stack: Stack, n_tokens: int, added: Added = NOTHING) -> Work:
        """A prompt of n_tokens, in steps of 512 as the engine cuts it."""
        pages = self._pages(n_tokens)
        self.executable.reserve(pages)

        def run() -> float:
            pieces = range(0, n_tokens, 512)
            return sum(self._step([stack], start, min(512, n_tokens - start), pages) for start in pieces)

        cost = self.cost
        n_bytes = cost.step_bytes + added.own_bytes + added.shared_bytes
        operations = (cost.token_operations + added.operations) * n_tokens + cost.logit_operations
        return Work(name, n_tokens, run, n_bytes, operations)

    def _pages(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_tokens)

    def _step(self, stacks: Sequence[Stack], position: int, n_tokens: int, pages_each: int) -> float:
        batch = self._batch(stacks, position, n_tokens, pages_each)
        start = time.perf_counter()
        self.executable.step(batch)
        return time.perf_counter() - start

    def _batch(self, stacks: Sequence[Stack], position: int, n_tokens: int, pages_each: int) -> Batch:
        streams = len(stacks)
        ids = (np.arange(streams * n_tokens) * 7919 + position) % self.vocab_size
        edges = np.arange(streams + 1)
        return Batch(
            tokens=ids.astype(np.int32),
            positions=np.tile(np.arange(position, position + n_tokens), streams).astype(np.int32),
            run_start=(edges * n_tokens).astype(np.int32),
            page_start=(edges * pages_each).astype(np.int32),
            pages=np.arange(streams * pages_each, dtype=np.int32),
            stack_start=np.cumsum([0, *(len(stack) for stack in stacks)]).astype(np.int32),
            stacks=np.asarray([handle for stack in stacks for handle in stack], np.int32),
            logit_rows=(edges[1:] * n_tokens - 1).astype(np.int32),
        )
