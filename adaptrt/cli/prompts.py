"""`adaptrt run --prompts`: each line has its own prompt, adapters and sampling; one engine runs them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptrt.cli.notes import note
from adaptrt.cli.options import AdapterChoice, Attached, Stack, parse_adapter, read_text
from adaptrt.engine.request import Chunk, Request, Sampling
from adaptrt.errors import AdaptrtError, RequestError

if TYPE_CHECKING:
    from adaptrt.api import Model

SAMPLING = tuple(field.name for field in fields(Sampling))
KEYS = ("prompt", "adapters", *SAMPLING)


@dataclass(frozen=True)
class Task:
    """One line of the file."""

    prompt: str
    adapters: Sequence[AdapterChoice]
    sampling: Sampling


def read_prompts(path: Path, adapters: Sequence[AdapterChoice], sampling: Sampling) -> list[Task]:
    """Parse the whole file before anything runs. Raises RequestError naming the line and what is wrong."""
    tasks = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            tasks.append(_task(json.loads(line), adapters, sampling))
        except json.JSONDecodeError as error:
            raise RequestError(
                f"{path}, line {number}: is not JSON: {error.msg}, column {error.colno}"
            ) from None
        except (AdaptrtError, ValueError, RecursionError) as error:  # a number too long, nested too deep
            raise RequestError(f"{path}, line {number}: {error}") from None
    if not tasks:
        raise RequestError(f"{path}: holds no prompts; expected one JSON object a line")
    return tasks


def _task(entry: Any, adapters: Sequence[AdapterChoice], sampling: Sampling) -> Task:
    if not isinstance(entry, dict):
        raise RequestError(f"found {type(entry).__name__}, expected an object with a prompt")
    for key in entry:
        if key not in KEYS:
            raise RequestError(f"unknown key {key!r}, expected one of {', '.join(KEYS)}")
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(f"prompt: found {prompt!r}, expected text")
    overrides = {key: entry[key] for key in SAMPLING if key in entry}
    chosen = _adapters(entry["adapters"]) if "adapters" in entry else adapters
    return Task(prompt, chosen, replace(sampling, **overrides))


def _adapters(value: Any) -> list[AdapterChoice]:
    """["a", "b:0.5"], {"a": 1, "b": 0.5} or "b:0.5"; [] or null for the plain base."""
    if isinstance(value, dict) and all(_is_number(scale) for scale in value.values()):
        return [parse_adapter(f"{source}:{scale}") for source, scale in value.items()]
    texts = [value] if isinstance(value, str) else value or []
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return [parse_adapter(text) for text in texts]
    raise RequestError(f"adapters: found {value!r}, expected a list of names or an object of scales by name")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_prompts(model: Model, attached: Attached, tasks: Sequence[Task]) -> None:
    """Print one JSON line for each task as it finishes; exit with 1 at the end if any could not be run."""
    stacks: dict[int, Stack] = {}
    failed = False
    for index, task in enumerate(tasks):
        try:
            stacks[index] = attached.stack(task.adapters)
        except AdaptrtError as error:
            failed = True
            _print({"index": index, "error": str(error)})
    indices = list(stacks)
    requests = [Request(tasks[index].prompt, stacks[index], tasks[index].sampling) for index in indices]
    texts = [""] * len(requests)
    note(f"running {len(requests)} prompts as one batch …")
    for chunk in model.generate_batch(requests):
        texts[chunk.index] += chunk.text
        if chunk.finish_reason is None:
            continue
        index = indices[chunk.index]
        failed = failed or chunk.error is not None
        _print(_line(index, chunk, texts[chunk.index], requests[chunk.index]))
    if failed:
        click.get_current_context().exit(1)


def _line(index: int, last: Chunk, text: str, request: Request) -> dict[str, Any]:
    if last.error is not None:
        return {"index": index, "error": last.error}
    return {
        "index": index,
        "prompt": request.prompt,
        "text": text,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.n_prompt_tokens,
        "tokens": last.n_tokens,
        "adapters": request.adapters,
    }


def _print(line: dict[str, Any]) -> None:
    click.echo(json.dumps(line, ensure_ascii=False))
