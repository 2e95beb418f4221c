"""The scheduler and page pool under random load: nothing shared, nothing lost, no budget exceeded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptrt.engine.pages import PagePool
from adaptrt.engine.scheduler import Scheduler, Sequence, build_batch, last_rows
from adaptrt.errors import BackendError

PAGE = 4


@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    budget=st.integers(1, 24),
    max_sequences=st.integers(1, 6),
    spare_pages=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_computed_in_order_whatever_the_budgets(
    prompts: list[tuple[int, int]], budget: int, max_sequences: int, spare_pages: int
) -> None:
    context = max(size + new for size, new in prompts)
    max_pages = -(-context // PAGE) + spare_pages
    pool = PagePool(lambda _: None, PAGE)
    scheduler = Scheduler(pool, budget, max_sequences, max_pages)
    # the "KV cache": what each page slot holds, as (sequence, position, token)
    cache: dict[tuple[int, int], tuple[int, int, int]] = {}
    goals = {}
    for index, (size, new) in enumerate(prompts):
        goals[index] = size + new
        scheduler.add(Sequence(index, [index * 1000 + i for i in range(size)], ()))
    finished = []
    for _ in range(20_000):
        slices = scheduler.schedule()
        if not slices:
            break
        batch = build_batch(slices, last_rows(slices))
        assert len(batch.tokens) <= budget and len(slices) <= max_sequences
        held = [page for piece in slices for page in piece.sequence.pages]
        assert len(held) == len(set(held)) <= max_pages
        for run, piece in enumerate(slices):
            pages = batch.pages[batch.page_start[run] : batch.page_start[run + 1]]
            rows = range(batch.run_start[run], batch.run_start[run + 1])
            for row in rows:
                position = int(batch.positions[row])
                cache[int(pages[position // PAGE]), position % PAGE] = (
                    piece.sequence.index,
                    position,
                    int(batch.tokens[row]),
                )
            last = int(batch.positions[rows[-1]])
            seen = [cache[int(pages[p // PAGE]), p % PAGE] for p in range(last + 1)]
            assert seen == [(piece.sequence.index, p, piece.sequence.ids[p]) for p in range(last + 1)]
        done = [piece.sequence for piece in slices if piece.completes]
        assert len(done) == len(batch.logit_rows)
        for piece in slices:
            piece.sequence.computed += piece.count
        for sequence in done:
            if len(sequence.ids) == goals[sequence.index]:
                finished.append(sequence.index)
                scheduler.finish(sequence)
            else:
                sequence.ids.append(len(sequence.ids))
    assert sorted(finished) == list(range(len(prompts)))


def test_pool_takes_nothing_when_memory_is_short() -> None:
    def reserve(n_pages: int) -> None:
        if n_pages > 10:
            raise BackendError("no memory")

    pool = PagePool(reserve, PAGE)
    first = pool.take(3)
    with pytest.raises(BackendError):
        pool.take(20)
    pool.give_back(first)
    again = pool.take(3)
    assert len(set(again)) == 3


def test_sequences_wait_for_one_another_when_memory_is_shorter_than_the_budget() -> None:
    def reserve(n_pages: int) -> None:
        if n_pages > 12:
            raise BackendError("no memory")

    scheduler = Scheduler(PagePool(reserve, PAGE), 64, 8, 1000)
    waiting = [Sequence(index, list(range(20)), ()) for index in range(5)]  # 5 pages each
    for sequence in waiting:
        scheduler.add(sequence)
    done = []
    while slices := scheduler.schedule():
        assert sum(len(piece.sequence.pages) for piece in slices) <= 12
        for piece in slices:
            piece.sequence.computed += piece.count
            if not piece.sequence.pending:
                done.append(piece.sequence.index)
                scheduler.finish(piece.sequence)
    assert sorted(done) == list(range(5))
    scheduler.add(Sequence(9, list(range(200)), ()))
    with pytest.raises(BackendError, match="no memory"):
        scheduler.schedule()


def test_the_adapters_of_waiting_sequences_are_upcoming() -> None:
    scheduler = Scheduler(PagePool(lambda _: None, PAGE), 64, 2, 1000)
    for index in range(9):
        scheduler.add(Sequence(index, [1, 2], (index, 10 + index)[: 1 + index % 2]))
    scheduler.schedule()
    assert scheduler.upcoming() == [2, 3, 13, 4, 5, 15]


def test_batch_arrays_are_int32_and_ragged() -> None:
    pool = PagePool(lambda _: None, PAGE)
    scheduler = Scheduler(pool, 16, 4, 100)
    for index, size in enumerate((5, 1, 9)):
        scheduler.add(Sequence(index, list(range(size)), tuple(range(index))))
    slices = scheduler.schedule()
    batch = build_batch(slices, last_rows(slices))
    order = [piece.sequence.index for piece in slices]
    assert {getattr(batch, name).dtype for name in vars(batch)} == {np.dtype(np.int32)}
    assert np.diff(batch.run_start).tolist() == [(5, 1, 9)[i] for i in order]
    assert np.diff(batch.stack_start).tolist() == order
