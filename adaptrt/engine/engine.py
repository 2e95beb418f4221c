"""The engine: drives an executable with batches from the scheduler and turns logits into answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adaptrt.backends.base import Executable, prefetch
from adaptrt.engine.pages import PagePool
from adaptrt.engine.request import Chunk, FinishReason, Sampling
from adaptrt.engine.sampler import Sampler
from adaptrt.engine.scheduler import Scheduler, Slice, build_batch, last_rows
from adaptrt.engine.scheduler import Sequence as Running
from adaptrt.engine.text import Detokenizer, StopMatcher, Tokenizer
from adaptrt.errors import ContextError, ModelError, RequestError

MAX_BATCH_TOKENS = (
    512  # a step's tokens: large enough for prefill to be efficient, small enough to stay responsive
)
MAX_SEQUENCES = 64
MIN_KV_TOKENS = 65536  # KV budget of one call when the context is shorter
LOGITS_BYTES = 64 << 20  # at most this many bytes of logits at once while scoring


@dataclass(frozen=True)
class Job:
    """A request made concrete: token ids, adapter handles in stacking order and where each acts from, sampling."""

    index: int
    prompt_ids: Sequence[int]
    stack: tuple[int, ...]
    starts: tuple[int, ...]
    sampling: Sampling


class Answer:
    """One job's progress: samples, detokenizes and decides when it ends."""

    def __init__(
        self,
        job: Job,
        sequence: Running,
        tokenizer: Tokenizer | None,
        end_ids: frozenset[int],
        context_length: int,
    ) -> None:
        self.job = job
        self.sequence = sequence
        room = context_length - len(job.prompt_ids) + 1  # the last token is never run, so it needs no room
        self._limit = room if job.sampling.max_tokens is None else min(job.sampling.max_tokens, room)
        self._end_ids = end_ids
        self._sampler = Sampler(job.sampling)
        self._detokenizer = Detokenizer(tokenizer, job.prompt_ids) if tokenizer else None
        self._stop = StopMatcher(job.sampling.stop)

    def push(self, logits: NDArray[np.float32]) -> Chunk:
        """Choose the next token from logits [vocabulary] and say what became readable."""
        try:
            token = self._sampler.pick(logits, self.sequence.ids)
        except ModelError as error:
            return replace(self._chunk(self._rest(), (), "error"), error=str(error))
        if token in self._end_ids:
            return self._chunk(self._rest(), (), "stop")
        self.sequence.ids.append(token)
        text = self._stop.push(self._detokenizer.push(token)) if self._detokenizer else ""
        if self._stop.stopped:
            return self._chunk(text, (token,), "stop")
        if self._count >= self._limit:
            return self._chunk(text + self._rest(), (token,), "length")
        return self._chunk(text, (token,), None)

    def reading(self) -> Chunk:
        """What to show while a long prompt goes through in pieces."""
        read = min(self.sequence.computed, len(self.job.prompt_ids))
        return Chunk(self.job.index, "", (), read, self._count)

    @property
    def _count(self) -> int:
        return len(self.sequence.ids) - len(self.job.prompt_ids)

    def _rest(self) -> str:
        tail = self._stop.push(self._detokenizer.flush()) if self._detokenizer else ""
        return tail + self._stop.flush()

    def _chunk(self, text: str, token_ids: tuple[int, ...], reason: FinishReason | None) -> Chunk:
        return Chunk(self.job.index, text, token_ids, len(self.job.prompt_ids), self._count, reason)


class Engine:
    """Runs jobs on one executable; over a GuardedExecutable it is safe from several threads, step by step."""

    def __init__(
        self,
        executable: Executable,
        vocab_size: int,
        context_length: int,
        page_tokens: int,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.executable = executable
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.end_ids = end_ids
        self._pool = PagePool(executable.reserve, page_tokens)

    def check(self, prompt_ids: Sequence[int]) -> None:
        """Raise RequestError or ContextError unless these ids can be run."""
        if not prompt_ids:
            raise RequestError("prompt: found no tokens, expected at least one")
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise RequestError(f"prompt: found token id {bad}, expected 0 to {self.vocab_size - 1}")
        if len(prompt_ids) > self.context_length:
            raise ContextError(
                f"prompt: found {len(prompt_ids)} tokens, expected at most {self.context_length}, the context length"
            )

    def generate(self, jobs: Sequence[Job], tokenizer: Tokenizer | None) -> Iterator[Chunk]:
        """Run all jobs as one continuously batched group, yielding a chunk per new token or piece of prompt of each.

        Without a tokenizer chunks carry ids and no text.
        """
        kv_tokens = max(self.context_length, MIN_KV_TOKENS)
        scheduler = Scheduler(self._pool, MAX_BATCH_TOKENS, MAX_SEQUENCES, self._pool.needed(kv_tokens))
        answers: dict[Running, Answer] = {}
        for job in jobs:
            self.check(job.prompt_ids)
            if job.sampling.max_tokens == 0:
                yield Chunk(job.index, "", (), len(job.prompt_ids), 0, "length")
                continue
            sequence = Running(job.index, list(job.prompt_ids), job.stack, starts=job.starts)
            answers[sequence] = Answer(job, sequence, tokenizer, self.end_ids, self.context_length)
            scheduler.add(sequence)
        try:
            while slices := scheduler.schedule():
                prefetch(self.executable, scheduler.upcoming())
                yield from self._advance(slices, answers, scheduler)
        finally:
            scheduler.close()

    def _advance(
        self, slices: list[Slice], answers: dict[Running, Answer], scheduler: Scheduler
    ) -> list[Chunk]:
        """One step for the chosen slices."""
        logits = self.executable.step(build_batch(slices, last_rows(slices)))
        done = [piece.sequence for piece in slices if piece.completes]
        partial = [piece.sequence for piece in slices if not piece.completes]
        for piece in slices:
            piece.sequence.computed += piece.count
        chunks = [answers[sequence].reading() for sequence in partial]
        for sequence, row in zip(done, logits, strict=True):
            chunks.append(answers[sequence].push(row))
            if chunks[-1].finish_reason:
                scheduler.finish(sequence)
        return chunks

    def logits(
        self, ids: Sequence[int], stack: tuple[int, ...], starts: tuple[int, ...] = ()
    ) -> Iterator[NDArray[np.float32]]:
        """Logits of every position of `ids`, in pieces [tokens, vocabulary] of bounded size."""
        self.check(ids)
        sequence = Running(0, list(ids), stack, starts=starts)
        rows = min(MAX_BATCH_TOKENS, max(1, LOGITS_BYTES // (4 * self.vocab_size)))
        try:
            sequence.pages = self._pool.take(self._pool.needed(len(ids)))
            while sequence.pending:
                piece = Slice(sequence, min(sequence.pending, rows))
                yield self.executable.step(build_batch([piece], range(piece.count)))
                sequence.computed += piece.count
        finally:
            self._pool.give_back(sequence.pages)
