"""What `import adaptrt` offers: `load()` and Model. File → architecture → program → backend → engine, in that order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.algebra import Combination, Recipe, SignMethod, combine
from adaptrt.adapters.base import BaseView, open_base
from adaptrt.adapters.storage import PREFIX, check_base, check_name, list_adapters, only_adapter, read_adapter
from adaptrt.adapters.variant import Adapter, Progress, Variant, no_progress
from adaptrt.backends.base import LoadOptions, Precision
from adaptrt.backends.choose import load_executable
from adaptrt.convert.peft import import_peft
from adaptrt.engine.adapters import AdapterSet, Stack
from adaptrt.engine.chat import render
from adaptrt.engine.engine import Engine, Job
from adaptrt.engine.guard import GuardedExecutable
from adaptrt.engine.lock import ForkableLock
from adaptrt.engine.request import AdapterSpec, Chunk, Request, Sampling, as_ids, as_scale, as_stack
from adaptrt.engine.sampler import require_finite
from adaptrt.engine.text import Tokenizer, check_text_metadata
from adaptrt.errors import (
    AdapterError,
    AdaptrtError,
    ModelError,
    RequestError,
    UnknownAdapterError,
)
from adaptrt.format import File, open_file
from adaptrt.plugins import Registry, load_registry

__all__ = ["Chunk", "Model", "Request", "Sampling", "load"]

MAX_MEAN = 700.0  # nats a token; exp of more does not fit into float64
DEMO = Path(__file__).parent / "demo" / "demo.adrt"


def load(
    path: str | Path,
    backend: str = "auto",
    threads: int | None = None,
    precision: Precision = "fast",
    kv_dtype: Literal["f16", "f32"] = "f16",
    registry: Registry | None = None,
    gpu_memory: int | None = None,
) -> Model:
    """Open a model for inference; use it as a context manager or call `close()`.

    `path` is an `.adrt` file or "demo", the built-in model; `backend` is a name, a name and a device (`torch:cuda`,
    `cuda:1`), or "auto": a GPU that does what is asked and has room, else the CPU; `threads` None takes every core
    this process may use. `gpu_memory` is how many bytes of a GPU's memory may be used, None all there is; what does not
    fit stays on the host and is streamed (spec/backend.md).
    Raises FormatError, ModelError or BackendError, each in one line.
    """
    if not isinstance(backend, str):
        raise RequestError(f"backend: found {backend!r}, expected a name")
    if threads is not None and not (type(threads) is int and 1 <= threads <= 1024):
        raise RequestError(f"threads: found {threads!r}, expected 1 to 1024")
    for name, value, known in (
        ("precision", precision, ("exact", "fast")),
        ("kv_dtype", kv_dtype, ("f16", "f32")),
    ):
        if value not in known:
            raise RequestError(f"{name}: found {value!r}, expected {' or '.join(known)}")
    if gpu_memory is not None and not (isinstance(gpu_memory, int) and 1 <= gpu_memory < 2**63):
        raise RequestError(f"gpu_memory: found {gpu_memory!r}, expected a number of bytes")
    options = LoadOptions(threads or 0, precision, kv_dtype, gpu_memory=gpu_memory or 0)
    registry = registry or load_registry()
    file = open_file(DEMO if str(path) == "demo" else Path(path))
    try:
        return Model(file, registry, backend, options)
    except BaseException:
        file.close()
        raise


def find_adapter(
    source: str | Path,
    file: File,
    base: BaseView,
    variants: Mapping[str, Variant],
    cleanup: ExitStack,
    progress: Progress = no_progress,
) -> Adapter:
    """The adapter inside `file` of that name, or of an `.adrt` file (which `cleanup` closes), or of a PEFT folder.

    Raises UnknownAdapterError when there is none, AdapterError and BaseMismatchError when it cannot be used.
    """
    stored = list_adapters(file)
    if str(source) in stored:
        return read_adapter(file, f"{PREFIX}{source}")
    path = Path(source)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise UnknownAdapterError(
            f"adapter {str(source)!r}: no such file or folder, and not inside {file.path} "
            f"(which has: {', '.join(stored) or 'none'})"
        )
    if path.is_dir():
        return import_peft(path, variants, base, progress=progress)
    other = cleanup.enter_context(open_file(path))
    adapter = read_adapter(other, PREFIX + only_adapter(other))
    check_base(adapter, base)
    return adapter


class Model:
    """A loaded base model and its adapters. Safe to use from several threads; calls interleave step by step."""

    def __init__(self, file: File, registry: Registry, backend: str, options: LoadOptions) -> None:
        base = open_base(file, registry.architectures)
        check_text_metadata(file.metadata, file.path)
        program = base.program
        self.metadata: Mapping[str, Any] = file.metadata
        self.context_length = program.context_length
        self.vocab_size = program.vocab_size
        self._file = file
        self._registry = registry
        self._base = base
        loaded, _ = load_executable(registry.backends, backend, program, base.weights(), options)
        executable = GuardedExecutable(loaded)
        end_ids = frozenset(file.metadata.get("tokenizer.eos_token_ids", ()))
        self._executable = executable
        self._engine = Engine(executable, self.vocab_size, self.context_length, options.page_tokens, end_ids)
        self._adapters = AdapterSet(executable, registry.variants, base)
        self._active: Stack = ()
        self._naming = ForkableLock()
        self._cleanup = ExitStack()
        self._cleanup.callback(self._adapters.close)
        self._cleanup.callback(file.close)
        self._cleanup.callback(executable.close)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights' mapping, the KV cache and every adapter; calls after it raise ClosedError."""
        self._cleanup.close()

    def describe(self) -> str:
        """One line: the backend, its kernels and threads."""
        return self._executable.describe()

    # Adapters

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Loaded adapters by name."""
        return self._adapters.loaded

    @property
    def stored_adapters(self) -> list[str]:
        """Names of the adapters inside the model's own file; naming one loads it."""
        return list_adapters(self._file)

    def load_adapter(
        self,
        path: str | Path,
        name: str | None = None,
        scale: float = 1.0,
        progress: Progress = no_progress,
    ) -> str:
        """Load an adapter and return its name; it acts once a call or `set_adapter` names it.

        `path` is the name of an adapter inside the model's file, an `.adrt` adapter file, or a PEFT folder. It is made
        ready for `scale`; for any other it is when that is first used. `progress` is called with (targets done, targets
        in all), more than once over. Raises AdapterError naming everything in it that cannot be honoured, or
        BaseMismatchError saying what differs.
        """
        adapter = find_adapter(path, self._file, self._base, self._registry.variants, self._cleanup, progress)
        name = adapter.name if name is None else name
        if not isinstance(name, str) or not name:
            raise AdapterError(f"adapter name {name!r}: expected text")
        self._adapters.add(name, adapter, as_scale(name, scale), progress)
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UnknownAdapterError, or AdapterError while a generation uses it."""
        self._adapters.remove(name)
        self._active = [(known, scale) for known, scale in self._active if known != name]

    def set_adapter(self, adapters: AdapterSpec) -> None:
        """Choose what acts when a call names no adapters: {"name": scale, …} in stacking order, a name, or None."""
        stack = self._resolve({} if adapters is None else adapters)
        with self._adapters.use(stack):  # lowers each at its scale now, so that errors show here
            self._active = stack

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The plain base model inside the block."""
        active, self._active = self._active, ()
        try:
            yield
        finally:
            self._active = active

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Combination = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
        seed: int = 0,
    ) -> str:
        """Load a new LoRA made of loaded ones, as PEFT's method of this name does; returns its name.

        `density` is the share of values that ties, dare_… and magnitude_prune keep; `seed` draws what dare_… drops.
        Raises AdapterError naming an adapter that is no LoRA or rsLoRA, or ranks that do not go together.
        """
        check_name(adapter_name)
        recipe = Recipe(combination_type, svd_rank, density, majority_sign_method, seed)
        self._resolve(list(adapters))
        loaded = self._adapters.loaded
        for name in adapters:
            if name not in loaded:
                known = ", ".join(sorted(loaded)) or "none"
                raise UnknownAdapterError(f"adapter {name!r}: not loaded; loaded: {known}")
        combined = combine([loaded[name] for name in adapters], weights, adapter_name, recipe)
        self._adapters.add(adapter_name, combined)
        return adapter_name

    def _resolve(self, adapters: AdapterSpec) -> Stack:
        """A stack of loaded adapters; one that is stored in the model's file is loaded when first named."""
        if adapters is None:
            return self._active
        stack = as_stack(adapters)
        with self._naming:  # two threads may be the first to name one
            for name, scale in stack:
                if name not in self._adapters.loaded and name in self.stored_adapters:
                    self.load_adapter(name, scale=scale)
        return stack

    # Text

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the file. Raises ModelError when there is none."""
        if "tokenizer" not in self._file.sections:
            raise ModelError(f"{self._file.path}: has no tokenizer; expected token ids instead of text")
        return Tokenizer(self._file.tensor("tokenizer", "tokenizer.json").data.tobytes())

    @property
    def chat_template(self) -> str | None:
        """The model's own jinja2 chat template, if it has one."""
        return self.metadata.get("tokenizer.chat_template")

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a conversation of {"role", "content"} messages. Tokenize it without special tokens."""
        if self.chat_template is None:
            raise ModelError(f"{self._file.path}: has no chat template")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        stored = {name: self.metadata.get(f"tokenizer.{name}") for name in names}
        special = {name: str(text) for name, text in stored.items() if text is not None}
        return render(self.chat_template, messages, special)

    # Generation

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int | None = ...,
        adapters: AdapterSpec = ...,
        stream: Literal[False] = ...,
        **sampling: Any,
    ) -> str | list[str]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int | None = ...,
        adapters: AdapterSpec = ...,
        *,
        stream: Literal[True],
        **sampling: Any,
    ) -> Iterator[Chunk]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int | None = 256,
        adapters: AdapterSpec = None,
        stream: bool = False,
        **sampling: Any,
    ) -> str | list[str] | Iterator[Chunk]:
        """Continue a prompt, or several as one batch.

        A prompt is text or a list of token ids. Returns text for one prompt and a list for a list; with `stream` an
        iterator of Chunk as tokens come. `adapters` None uses `set_adapter`'s, {} the plain base. `sampling` takes
        the fields of Sampling (temperature, top_k, top_p, min_p, repeat_penalty, seed, stop).
        """
        options = Sampling.from_dict({"max_tokens": max_tokens, **sampling})
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence | np.ndarray):
            raise RequestError(
                f"prompt: found a {type(prompt).__name__}, expected text, token ids or a list of them"
            )
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer))
        prompts = [prompt] if single else list(prompt)
        requests = [Request(cast("str | Sequence[int]", p), adapters, options) for p in prompts]
        chunks = _raising(self._run([self._concrete(request) for request in requests]))
        if stream:
            return chunks
        texts = [""] * len(requests)
        for chunk in chunks:
            texts[chunk.index] += chunk.text
        return texts[0] if single else texts

    def generate_batch(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Run requests with their own adapters and sampling in one engine, yielding chunks as they come.

        A request that cannot be run gives one chunk with finish_reason "error"; the others go on.
        """
        runnable, failed = [], []
        for index, request in enumerate(requests):
            try:
                runnable.append((index, *self._concrete(request)))
            except AdaptrtError as error:
                failed.append(Chunk(index, "", (), 0, 0, "error", str(error)))
        yield from failed
        indices = [index for index, *_ in runnable]
        for chunk in self._run([(ids, stack, sampling) for _, ids, stack, sampling in runnable]):
            yield replace(chunk, index=indices[chunk.index])

    def _concrete(self, request: Request) -> tuple[list[int], Stack, Sampling]:
        """Token ids and resolved stack of a request, checked."""
        if not isinstance(request, Request):
            raise RequestError(f"found {request!r:.80}, expected a Request")
        text = isinstance(request.prompt, str)
        ids = self.tokenize(cast(str, request.prompt)) if text else as_ids(request.prompt)
        self._engine.check(ids)
        stack = self._resolve(request.adapters)
        with self._adapters.use(stack):  # attach now: an adapter that does not fit fails this request alone
            return ids, stack, request.sampling

    def _run(self, concrete: Sequence[tuple[list[int], Stack, Sampling]]) -> Iterator[Chunk]:
        tokenizer = self.tokenizer if "tokenizer" in self._file.sections else None
        with ExitStack() as pins:
            jobs = [
                Job(
                    index,
                    ids,
                    *self._adapters.place(pins.enter_context(self._adapters.use(stack)), ids),
                    sampling,
                )
                for index, (ids, stack, sampling) in enumerate(concrete)
            ]
            yield from self._engine.generate(jobs, tokenizer)

    # Measuring

    def logits(self, token_ids: Sequence[int], adapters: AdapterSpec = None) -> NDArray[np.float32]:
        """Logits after every token of one sequence: float32 [tokens, vocab]."""
        with self._adapters.use(self._resolve(adapters)) as handles:
            ids = as_ids(token_ids)
            return np.concatenate(list(self._engine.logits(ids, *self._adapters.place(handles, ids))))

    def perplexity(
        self,
        text: str,
        adapters: AdapterSpec = None,
        ctx: int | None = None,
        progress: Progress | None = None,
    ) -> float:
        """exp of the mean negative log-likelihood over consecutive windows of `ctx` tokens.

        `ctx` is by default the context length, at most 2048. The whole text is tokenized once; each window is run
        alone and every token but its first is scored.
        `progress` is called with (tokens done, tokens in all). Raises RequestError when nothing can be scored.
        """
        ids = self.tokenize(text)
        window = min(self.context_length, 2048) if ctx is None else ctx
        if not isinstance(window, int) or not 2 <= window <= self.context_length:
            raise RequestError(f"ctx: found {window!r}, expected 2 to {self.context_length}")
        if len(ids) < 2:
            raise RequestError(f"text: found {len(ids)} tokens, expected at least 2")
        total, scored = 0.0, 0
        with self._adapters.use(self._resolve(adapters)) as handles:
            for start in range(0, len(ids) - 1, window):
                piece = ids[start : start + window]
                total += self._negative_log_likelihood(piece, handles)
                scored += len(piece) - 1
                if progress:
                    progress(start + len(piece), len(ids))
        mean = total / scored
        if mean > MAX_MEAN:
            raise ModelError(f"perplexity: found {mean:g} nats a token, expected at most {MAX_MEAN}")
        return math.exp(mean)

    def _negative_log_likelihood(self, ids: list[int], handles: tuple[int, ...]) -> float:
        """Summed over ids[1:], in nats."""
        total, done = 0.0, 0
        for logits in self._engine.logits(ids, *self._adapters.place(handles, ids)):
            require_finite(logits.max())
            targets = ids[done + 1 : done + 1 + len(logits)]
            rows = logits[: len(targets)].astype(np.float64)
            top = rows.max(axis=1)
            log_sum = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
            total += float((log_sum - rows[np.arange(len(targets)), targets]).sum())
            done += len(logits)
        return total


def _raising(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks of a call that fails as a whole. Raises ModelError for the first with an error."""
    for chunk in chunks:
        if chunk.error is not None:
            raise ModelError(chunk.error)
        yield chunk
