"""What is timed of a model: the rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence

from adaptrt.adapters.base import BaseView
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.bench.added import Added
from adaptrt.bench.crowd import crowds
from adaptrt.bench.subject import Subject
from adaptrt.bench.work import Work
from adaptrt.program import Program

STREAMS = (1, 2, 4, 8, 16)
PREFILLS = (128, 512, 2048)
CROWD_CONTEXT = 1024
ONE_ADAPTER_REPEATS = 4


def prompt_lengths(context_length: int) -> list[int]:
    """Prompt lengths that fit; a short context is measured whole."""
    return [n for n in PREFILLS if n <= context_length] or [context_length]


def model_works(
    subject: Subject, program: Program, adapters: Sequence[LoweredAdapter], steps: int, lengths: Sequence[int]
) -> list[Work]:
    """Streams alone, one with adapters, as many as there are adapters with one each, and prompts.

    What has adapters follows what it is compared with. One adapter costs less than two steps differ by, so it and one
    stream alone are run more often.
    """
    handles = [subject.executable.attach(adapter) for adapter in adapters]
    stacks, works = _stacks(len(adapters)), []
    for streams in sorted({*STREAMS, *stacks}):
        often = ONE_ADAPTER_REPEATS if streams == 1 else 1
        alone = subject.decode(
            _streams(streams), [()] * streams, steps, repeats=often, steady=streams in stacks
        )
        works.append(alone)
        for what, numbers in stacks.get(streams, {}).items():
            added = Added.by(program, [[adapters[i] for i in stack] for stack in numbers])
            given = [tuple(handles[i] for i in stack) for stack in numbers]
            repeats = often if what == "1 adapter" else 1
            works.append(subject.decode(f"{alone.name}, {what}", given, steps, 0, added, alone, repeats))
    works += [subject.prefill(f"prefill {n}", (), n) for n in lengths]
    added = Added.by(program, [adapters[:1]])
    works.append(subject.prefill(f"prefill {lengths[0]}, 1 adapter", (handles[0],), lengths[0], added))
    return works


def _stacks(adapters: int) -> dict[int, dict[str, list[tuple[int, ...]]]]:
    """By the number of streams and a name: for each stream the numbers of its adapters."""
    one: dict[str, list[tuple[int, ...]]] = {"1 adapter": [(0,)]}
    if adapters == 1:
        return {1: one}
    stacked = min(4, adapters)
    each: list[tuple[int, ...]] = [(number,) for number in range(adapters)]
    return {
        1: {**one, f"{stacked} stacked": [tuple(range(stacked))]},
        adapters: {f"{adapters} adapters": each},
    }


def crowd_works(subject: Subject, base: BaseView, streams: int, steps: int) -> list[Work]:
    """Streams in the middle of long texts, without adapters and each with one of its own, of every kind."""
    context = min(CROWD_CONTEXT, base.program.context_length - steps)
    name = f"{_streams(streams)} at {context}"
    alone = subject.decode(name, [()] * streams, steps, context, steady=True)
    works = [alone]
    for kind, adapters in crowds(base.specs, streams):
        stacks = [(subject.executable.attach(adapter),) for adapter in adapters]
        added = Added.by(base.program, [[adapter] for adapter in adapters])
        works.append(subject.decode(f"… {kind}", stacks, steps, context, added, alone))
    return works


def _streams(count: int) -> str:
    return "decode 1 stream" if count == 1 else f"decode {count} streams"
