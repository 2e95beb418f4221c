"""Continuous batching: which tokens of which sequences go into the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np

from adaptrt.backends.base import Batch
from adaptrt.engine.pages import PagePool
from adaptrt.errors import BackendError

LOOK_AHEAD = 4  # waiting sequences whose adapters are brought near


@dataclass(eq=False)
class Sequence:
    """One request under way: its ids so far, how many of them are in the KV cache, its pages and adapter stack.

    `starts`, beside `stack`, are the positions from which each handle acts; empty, all act everywhere.
    """

    index: int
    ids: list[int]
    stack: tuple[int, ...]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    starts: tuple[int, ...] = ()

    @property
    def pending(self) -> int:
        """Tokens not yet run: the prompt's rest while prefilling, one while decoding."""
        return len(self.ids) - self.computed

    def stack_at(self, position: int) -> tuple[int, ...]:
        """The handles that act on the token at a position."""
        starts = self.starts or (0,) * len(self.stack)
        return tuple(handle for handle, at in zip(self.stack, starts, strict=True) if at <= position)


@dataclass(frozen=True)
class Slice:
    """`count` pending tokens of a sequence, chosen for a step."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's last token is in, so that its logits give the next one."""
        return self.count == self.sequence.pending

    def runs(self) -> Iterator[tuple[int, int]]:
        """Its positions (start, stop), cut where the stack changes."""
        start, stop = self.sequence.computed, self.sequence.computed + self.count
        return pairwise(sorted({start, stop, *(at for at in self.sequence.starts if start < at < stop)}))


class Scheduler:
    """Admits sequences while room lasts; decodes first, prompts fill the rest of the token budget in chunks.

    When the page budget is full the youngest running sequence gives its pages back and is recomputed later.
    """

    def __init__(self, pool: PagePool, max_batch_tokens: int, max_sequences: int, max_pages: int) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_pages = max_pages
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Drop a running sequence and free its pages."""
        self._running.remove(sequence)
        self._release(sequence)

    def close(self) -> None:
        """Free everything, whatever is still under way."""
        for sequence in self._running:
            self._release(sequence)
        self._running.clear()
        self._waiting.clear()

    def schedule(self) -> list[Slice]:
        """The next step's slices; empty when nothing is left. Pages for them are allocated."""
        while self._waiting and len(self._running) < self._max_sequences:
            self._running.append(self._waiting.popleft())
        slices: list[Slice] = []
        budget = self._max_batch_tokens
        for sequence in sorted(self._running, key=lambda s: s.pending > 1):
            count = min(sequence.pending, budget)
            if count and sequence in self._running and self._make_room(sequence, sequence.computed + count):
                slices.append(Slice(sequence, count))
                budget -= count
        return [piece for piece in slices if piece.sequence in self._running]

    def upcoming(self) -> list[int]:
        """The adapters of the sequences that come next, once others end."""
        return [handle for sequence in islice(self._waiting, LOOK_AHEAD) for handle in sequence.stack]

    def _make_room(self, sequence: Sequence, n_tokens: int) -> bool:
        """Give the sequence pages for n_tokens, preempting younger ones; False when it was itself the youngest."""
        missing = max(0, self._pool.needed(n_tokens) - len(sequence.pages))
        while not self._take(sequence, missing):
            youngest = self._running[-1]
            if youngest is sequence and len(self._running) == 1:
                sequence.pages += self._pool.take(missing)  # alone it fits: the budget holds a whole context
                return True
            self._running.pop()
            self._release(youngest)
            youngest.computed = 0
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _take(self, sequence: Sequence, count: int) -> bool:
        """Give the sequence pages, if the budget and the memory have them. What memory lacks, the budget loses."""
        used = sum(len(s.pages) for s in self._running)
        if used + count > self._max_pages:
            return False
        try:
            sequence.pages += self._pool.take(count)
        except BackendError:
            self._max_pages = used
            return False
        return True

    def _release(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.pages)
        sequence.pages = []


def build_batch(slices: SequenceOf[Slice], logit_rows: SequenceOf[int]) -> Batch:
    """Lay slices out as the backend's ragged batch, in runs of one stack each; logit_rows are rows of that batch."""
    runs = [(piece.sequence, start, stop) for piece in slices for start, stop in piece.runs()]
    stacks = [sequence.stack_at(start) for sequence, start, _ in runs]
    return Batch(
        tokens=_int32([t for s, start, stop in runs for t in s.ids[start:stop]]),
        positions=_int32([p for _, start, stop in runs for p in range(start, stop)]),
        run_start=_offsets([stop - start for _, start, stop in runs]),
        page_start=_offsets([len(s.pages) for s, _, _ in runs]),
        pages=_int32([page for s, _, _ in runs for page in s.pages]),
        stack_start=_offsets([len(stack) for stack in stacks]),
        stacks=_int32([handle for stack in stacks for handle in stack]),
        logit_rows=_int32(logit_rows),
    )


def last_rows(slices: SequenceOf[Slice]) -> list[int]:
    """Batch rows of the slices' last tokens, for those that complete their sequence."""
    ends = np.cumsum([piece.count for piece in slices])
    return [int(end) - 1 for end, piece in zip(ends, slices, strict=True) if piece.completes]


def _int32(values: SequenceOf[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.asarray(values, np.int32)


def _offsets(counts: SequenceOf[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
