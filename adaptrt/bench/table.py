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


def prompt_lengths(context_length: int) -> list[int]:
    """Prompt lengths that fit; a short context is measured whole."""
    return [n for n in PREFILLS if n <= context_length] or [context_length]


def model_works(
    subject: Subject, program: Program, adapters: Sequence[LoweredAdapter], steps: int, lengths: Sequence[int]
) -> list[Work]:
    """Streams alone, one with adapters, as many as there are adapters with one each, and prompts."""
    handles = [subject.executable.attach(adapter) for adapter in adapters]
    alone = {count: subject.decode(_streams(count), [()] * count, steps) for count in STREAMS}
    works = list(alone.values())
    for count in sorted({1, min(4, len(handles))}):
        name = "decode 1 stream, " + ("1 adapter" if count == 1 else f"{count} stacked")
        added = Added.by(program, [adapters[:count]])
        works.append(subject.decode(name, [tuple(handles[:count])], steps, added=added, without=alone[1]))
    if len(handles) > 1:
        name = f"decode {len(handles)} streams, {len(handles)} adapters"
        added, without = Added.by(program, [[adapter] for adapter in adapters]), alone.get(len(handles))
        stacks = [(handle,) for handle in handles]
        works.append(subject.decode(name, stacks, steps, added=added, without=without))
    works += [subject.prefill(f"prefill {n}", (), n) for n in lengths]
    added = Added.by(program, [adapters[:1]])
    works.append(subject.prefill(f"prefill {lengths[0]}, 1 adapter", (handles[0],), lengths[0], added))
    return works


def crowd_works(subject: Subject, base: BaseView, streams: int, steps: int) -> list[Work]:
    """Streams in the middle of long texts, without adapters and each with one of its own, of every kind."""
    context = min(CROWD_CONTEXT, base.program.context_length - steps)
    name = f"{_streams(streams)} at {context}"
    alone = subject.decode(name, [()] * streams, steps, context)
    works = [alone]
    for kind, adapters in crowds(base.specs, streams):
        stacks = [(subject.executable.attach(adapter),) for adapter in adapters]
        added = Added.by(base.program, [[adapter] for adapter in adapters])
        works.append(subject.decode(f"… {kind}", stacks, steps, context, added, alone))
    return works


def _streams(count: int) -> str:
    return "decode 1 stream" if count == 1 else f"decode {count} streams"
