"""Which tokens of a batch carry which adapters, one level of the stacks at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from adaptrt.backends.base import Batch

Handles = tuple[int, ...]
NONE = -1


@dataclass
class Level:
    """One depth of the stacks: the distinct adapters there, and each token's member number in `handles`.

    A token without an adapter at this depth has the number after the last, and so has the token after the last, which
    stands for every place of a padded group that is empty.
    """

    handles: Handles
    member: NDArray[np.int64]  # [tokens + 1]
    device: torch.device
    _grouped: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members = torch.from_numpy(self.member).to(self.device)

    def grouped(self, element_of: NDArray[np.int64]) -> torch.Tensor:
        """Tokens by element, [elements, most tokens of one], padded with the token after the last.

        `element_of` maps a member to one of the matrices of a group, or to NONE.
        """
        key = element_of.tobytes()
        if key not in self._grouped:
            self._grouped[key] = torch.from_numpy(padded(element_of[self.member[:-1]])).to(self.device)
        return self._grouped[key]


def padded(element: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element 0 … the indices where it occurs, padded with the length; NONE is left out."""
    order = np.argsort(element, kind="stable")
    order = order[np.searchsorted(element[order], 0) :]
    counts = np.bincount(element[order])
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), counts.max(initial=0)), len(element), np.int64)
    table[element[order], place] = order
    return table


class Placement:
    """The levels of a batch's tokens, or of some of them."""

    def __init__(self, stacks: NDArray[np.int64], device: torch.device) -> None:
        """`stacks` [tokens, depth] holds handles, NONE where a stack is shorter."""
        self.stacks, self.device = stacks, device
        self.levels = [self._level(column) for column in stacks.T]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Placement:
        """Every token of a batch."""
        depths, lengths = np.diff(batch.stack_start), np.diff(batch.run_start)
        stacks = np.full((len(depths), depths.max(initial=0)), NONE, np.int64)
        stacks[np.arange(stacks.shape[1]) < depths[:, None]] = batch.stacks
        return cls(np.repeat(stacks, lengths, axis=0), device)

    def take(self, rows: NDArray[np.int32]) -> Placement:
        """These tokens, in this order."""
        return Placement(self.stacks[rows], self.device)

    def _level(self, column: NDArray[np.int64]) -> Level:
        handles = np.unique(column[column != NONE])
        member = np.where(column == NONE, len(handles), np.searchsorted(handles, column))
        return Level(tuple(handles.tolist()), np.append(member, len(handles)), self.device)
