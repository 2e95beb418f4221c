"""What adapters add to a step: bytes and operations, from which its time is predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adaptrt.adapters.normal import Lowered, LoweredAdapter, LowRank, Sparse, Term
from adaptrt.program import Linear, Logits, Program
from adaptrt.tensor import Tensor


@dataclass(frozen=True)
class Added:
    """Bytes that a step must read beside the base's, and operations that it must do, a multiply and an add being two.

    `shared_bytes` are of factors that several attach points share, as VeRA's do, each counted once; `own_bytes` all
    the others.
    """

    own_bytes: int = 0
    shared_bytes: int = 0
    operations: int = 0

    @classmethod
    def by(cls, program: Program, stacks: Sequence[Sequence[LoweredAdapter]]) -> Added:
        """By the adapters of some tokens, a stack for each."""
        adapters = {id(adapter): adapter for stack in stacks for adapter in stack}.values()
        lowered = [low for adapter in adapters for low in adapter.values()]
        factors = [factor for low in lowered for factor in _factors(low)]
        uses, sizes = Counter(map(id, factors)), {id(factor): factor.data.nbytes for factor in factors}
        shared = sum(size for factor, size in sizes.items() if uses[factor] > 1)
        own = sum(size for factor, size in sizes.items() if uses[factor] == 1)
        own += sum(map(_other_bytes, lowered))
        return cls(own, shared, sum(_operations(program, stack) for stack in stacks))


def _factors(lowered: Lowered) -> Iterator[Tensor]:
    for term in lowered.terms:
        if isinstance(term, LowRank):
            yield from (factor for factor in (term.u, term.v) if factor is not None)


def _other_bytes(lowered: Lowered) -> int:
    vectors = (lowered.g_in, lowered.rotation, lowered.g_out, lowered.c)
    terms = sum(term.nbytes for term in lowered.terms) - sum(
        factor.data.nbytes for factor in _factors(lowered)
    )
    return terms + sum(vector.nbytes for vector in vectors if vector is not None)


def _operations(program: Program, stack: Sequence[LoweredAdapter]) -> int:
    """Of one token at the layers and the head. The product of a V with an input counts once, whoever asks for it."""
    total, writes, done = 0, Counter[str](), set[tuple[int, str, int]]()
    for op in program.ops:
        if isinstance(op, Linear | Logits):
            rows = program.vocab_size if isinstance(op, Logits) else program.registers[op.out]
            terms = [term for adapter in stack if op.target in adapter for term in adapter[op.target].terms]
            for term in terms:
                shrink, expand = _products(term, rows, program.registers[op.src])
                key = (id(term.v) if isinstance(term, LowRank) else id(term), op.src, writes[op.src])
                total += 2 * (expand + (0 if key in done else shrink))
                done.add(key)
        writes[getattr(op, "out", "")] += 1
    return total


def _products(term: Term, rows: int, cols: int) -> tuple[int, int]:
    """How many: of what reads the input, and of what writes the output."""
    if isinstance(term, LowRank):
        return term.rank * cols, 0 if term.u is None else rows * term.rank
    if isinstance(term, Sparse):
        return 0, len(term.values)
    (a, b), (c, d) = term.w1.shape, term.w2.shape
    return b * c * d, a * b * c
