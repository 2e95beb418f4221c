"""Logits of one step and the next: the memory is the same unless somebody looks."""

from __future__ import annotations

import numpy as np

from adaptrt.backends.reuse import ReusedMemory


def test_memory_is_lent_again_once_nobody_looks() -> None:
    memory = ReusedMemory()
    first = memory.lend(3, 4)
    address = first.ctypes.data
    del first
    assert memory.lend(2, 4).ctypes.data == address


def test_what_somebody_looks_at_keeps_its_values() -> None:
    memory = ReusedMemory()
    first = memory.lend(3, 4)
    first[:] = 1
    second = memory.lend(3, 4)
    second[:] = 2
    row, flat = second[1], second.reshape(-1)[2:]
    del second
    memory.lend(3, 4)[:] = 3
    memory.lend(5, 4)[:] = 4
    assert (first == 1).all() and (row == 2).all() and (flat == 2).all()


def test_no_rows_and_more_rows_than_before() -> None:
    memory = ReusedMemory()
    assert memory.lend(0, 4).shape == (0, 4)
    more = memory.lend(7, 5)
    assert more.shape == (7, 5) and more.dtype == np.float32 and more.flags.writeable
