"""What is timed of a model: the rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence

from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.bench.crowd import crowds
from adaptrt.bench.shapes import Specs
from adaptrt.bench.subject import Subject, adapter_bytes
from adaptrt.bench.work import Work

STREAMS = (1, 2, 4, 8, 16)
PREFILLS = (128, 512, 2048)
CROWD_CONTEXT = 1024


def prompt_lengths(context_length: int) -> list[int]:
    """Prompt lengths that fit; a short context is measured whole."""
    return [n for n in PREFILLS if n <= context_length] or [context_length]


def model_works(
    subject: Subject, adapters: Sequence[LoweredAdapter], steps: int, lengths: Sequence[int]
) -> list[Work]:
    """Streams alone, one with adapters, as many as there are adapters with one each, and prompts."""
    handles = [subject.executable.attach(adapter) for adapter in adapters]
    sizes = [adapter_bytes(adapter) for adapter in adapters]
    works = [subject.decode(_streams(count), [()] * count, 0, steps) for count in STREAMS]
    for count in sorted({1, min(4, len(handles))}):
        name = "decode 1 stream, " + ("1 adapter" if count == 1 else f"{count} stacked")
        works.append(subject.decode(name, [tuple(handles[:count])], sum(sizes[:count]), steps))
    if len(handles) > 1:
        name = f"decode {len(handles)} streams, {len(handles)} adapters"
        works.append(subject.decode(name, [(handle,) for handle in handles], sum(sizes), steps))
    works += [subject.prefill(f"prefill {n}", (), 0, n) for n in lengths]
    works.append(subject.prefill(f"prefill {lengths[0]}, 1 adapter", (handles[0],), sizes[0], lengths[0]))
    return works


def crowd_works(subject: Subject, specs: Specs, streams: int, steps: int, context_length: int) -> list[Work]:
    """Streams in the middle of long texts, without adapters and each with one of its own, of every kind."""
    context = min(CROWD_CONTEXT, context_length - steps)
    name = f"{_streams(streams)} at {context}"
    works = [subject.decode(name, [()] * streams, 0, steps, context)]
    for kind, adapters in crowds(specs, streams):
        stacks = [(subject.executable.attach(adapter),) for adapter in adapters]
        # what all of a kind share is counted once
        n_bytes = adapter_bytes({f"{i} {t}": low for i, a in enumerate(adapters) for t, low in a.items()})
        works.append(subject.decode(f"… {kind}", stacks, n_bytes, steps, context))
    return works


def _streams(count: int) -> str:
    return "decode 1 stream" if count == 1 else f"decode {count} streams"
