"""The Python API: adapters by name, streaming, threads, closing, and refusals."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.oracle import llama_folder, peft_folder

import adaptrt
from adaptrt.adapters.normal import LoweredAdapter
from adaptrt.api import find_adapter
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.convert.base import ConvertOptions
from adaptrt.engine.adapters import IDLE_SCALES
from adaptrt.errors import (
    AdapterError,
    BackendError,
    ClosedError,
    ContextError,
    ModelError,
    RequestError,
    UnknownAdapterError,
)
from adaptrt.format import Writer, open_file
from adaptrt.plugins import load_registry
from adaptrt.program import Program
from adaptrt.tensor import Tensor

CONTEXT = 128
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("api")
    folder = llama_folder(path / "hf", max_position_embeddings=CONTEXT)
    registry = load_registry()
    registry.importers["hf"].convert(folder, path / "base.adrt", ConvertOptions(), lambda *_: None)
    return {
        "base": path / "base.adrt",
        "a": peft_folder(path / "a", folder, 1),
        "b": peft_folder(path / "b", folder, 2, use_rslora=True),
    }


@pytest.fixture
def model(files: dict[str, Path]) -> Iterator[adaptrt.Model]:
    with adaptrt.load(files["base"], precision="exact", threads=2) as model:
        model.load_adapter(files["a"])
        model.load_adapter(files["b"], name="bee")
        yield model


def greedy(model: adaptrt.Model, prompt: list[int], **options: object) -> list[int]:
    chunks = model.generate(prompt, stream=True, temperature=0, **options)
    return [token for chunk in chunks for token in chunk.token_ids]


def test_greedy_generation_follows_the_logits(model: adaptrt.Model) -> None:
    ids = greedy(model, PROMPT, max_tokens=10)
    logits = model.logits(PROMPT + ids)
    assert logits.dtype == np.float32 and logits.shape == (14, model.vocab_size)
    assert logits[len(PROMPT) - 1 : -1].argmax(1).tolist() == ids


def test_set_and_disable_adapter(model: adaptrt.Model) -> None:
    base, stacked = model.logits(PROMPT), model.logits(PROMPT, {"bee": 0.5, "a": 1.0})
    assert not np.allclose(base, stacked)
    model.set_adapter({"bee": 0.5, "a": 1.0})
    assert np.array_equal(model.logits(PROMPT), stacked)
    assert np.array_equal(model.logits(PROMPT, {}), base)
    with model.disable_adapter():
        assert np.array_equal(model.logits(PROMPT), base)
    assert np.array_equal(model.logits(PROMPT), stacked)
    model.unload_adapter("a")
    assert np.array_equal(model.logits(PROMPT), model.logits(PROMPT, {"bee": 0.5}))
    model.set_adapter(None)
    assert np.array_equal(model.logits(PROMPT), base)
    assert np.array_equal(model.logits(PROMPT, {"bee": 0.0}), base)


def test_generation_stops_where_the_context_ends(model: adaptrt.Model) -> None:
    prompt = list(range(100))
    chunks = list(model.generate(prompt, max_tokens=None, stream=True, temperature=0))
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].n_tokens == CONTEXT - len(prompt) + 1  # the last token is never run
    with pytest.raises(ContextError, match=r"129 tokens.*at most 128"):
        model.generate([1] * (CONTEXT + 1))


def test_requests_of_one_batch_fail_alone(model: adaptrt.Model) -> None:
    good = adaptrt.Request(PROMPT, {"a": 1.0}, adaptrt.Sampling(max_tokens=3, temperature=0))
    bad = [
        adaptrt.Request([1] * 500),
        adaptrt.Request([]),
        adaptrt.Request([131]),
        adaptrt.Request(PROMPT, {"nobody": 1.0}),
        adaptrt.Request(PROMPT, {"a": math.nan}),
        adaptrt.Request("text, but the model has no tokenizer"),
        "no request",
    ]
    chunks = list(model.generate_batch([*bad, good]))
    errors = {chunk.index: chunk.error for chunk in chunks if chunk.finish_reason == "error"}
    assert sorted(errors) == list(range(len(bad))) and all(errors.values())
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert {chunk.index for chunk in chunks if chunk.token_ids} == {len(bad)}
    assert tokens == greedy(model, PROMPT, adapters={"a": 1.0}, max_tokens=3)


def test_an_overflow_is_an_error_of_its_request_alone(model: adaptrt.Model) -> None:
    greedily = adaptrt.Sampling(max_tokens=3, temperature=0)
    requests = [adaptrt.Request(PROMPT, {"a": 1e38}, greedily), adaptrt.Request(PROMPT, {"a": 1.0}, greedily)]
    chunks = list(model.generate_batch(requests))
    last = {chunk.index: chunk for chunk in chunks if chunk.finish_reason}
    assert last[0].finish_reason == "error" and str(last[0].error).startswith("logits: the largest is nan")
    assert (last[1].finish_reason, last[1].n_tokens) == ("length", 3)
    for temperature in (0, 0.8):
        with pytest.raises(ModelError, match="logits: the largest is nan, expected a finite number"):
            model.generate(PROMPT, adapters={"a": 1e38}, temperature=temperature)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.eos_token_ids", "12", "'12', expected a list of token ids"),
        ("tokenizer.eos_token_ids", [True], r"\[True\], expected a list of token ids"),
        ("tokenizer.chat_template", 5, "5, expected text"),
    ],
)
def test_metadata_of_another_type_is_refused(
    files: dict[str, Path], tmp_path: Path, key: str, value: object, words: str
) -> None:
    with (
        open_file(files["base"]) as file,
        Writer(tmp_path / "x.adrt", {**file.metadata, key: value}) as writer,
    ):
        writer.copy_section(file, "base")
    with pytest.raises(ModelError, match=rf"x\.adrt: metadata {key} is {words}"):
        adaptrt.load(tmp_path / "x.adrt")


def test_threads_share_a_model(model: adaptrt.Model) -> None:
    prompts = [[seed, seed + 1, 3] * (seed + 1) for seed in range(6)]
    stacks = [{}, {"a": 1.0}, {"bee": 0.5}] * 2
    expected = [greedy(model, p, adapters=s, max_tokens=20) for p, s in zip(prompts, stacks, strict=True)]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = greedy(model, prompts[i], adapters=stacks[i], max_tokens=20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_loads_an_adapter_is_refused_and_does_not_wait(
    files: dict[str, Path], model: adaptrt.Model
) -> None:
    loading, forked = threading.Event(), threading.Event()

    def wait_for_fork(done: int, total: int) -> None:
        loading.set()
        assert forked.wait(30)

    thread = threading.Thread(
        target=model.load_adapter, args=(files["b"],), kwargs={"progress": wait_for_fork}
    )
    thread.start()
    assert loading.wait(30)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            model.generate(PROMPT, max_tokens=2)
        except BackendError as error:
            model.close()
            os._exit(7 if "forked process" in str(error) else 1)
        os._exit(2)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert {"a", "b"} <= set(model.adapters)


def test_two_models_live_side_by_side(files: dict[str, Path], model: adaptrt.Model) -> None:
    with adaptrt.load(files["base"], precision="exact") as other:
        assert np.array_equal(other.logits(PROMPT), model.logits(PROMPT))
    assert model.logits(PROMPT).shape[0] == len(PROMPT)


def test_closing_and_unloading_under_a_stream(model: adaptrt.Model) -> None:
    stream = model.generate(PROMPT, max_tokens=50, adapters="a", stream=True)
    next(stream)
    with pytest.raises(AdapterError, match="in use"):
        model.unload_adapter("a")
    stream.close()
    model.unload_adapter("a")
    stream = model.generate(PROMPT, max_tokens=50, stream=True)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(ClosedError):
        next(stream)
    with pytest.raises(ClosedError):
        model.logits(PROMPT)


def test_closing_lets_go_of_the_adapters(model: adaptrt.Model) -> None:
    tensors = [weakref.ref(tensor) for tensor in model.adapters["a"].tensors.values()]
    model.close()
    gc.collect()
    assert not any(tensor() for tensor in tensors)
    with pytest.raises(ClosedError):
        model.logits(PROMPT, "a")
    with pytest.raises(ClosedError):
        model.unload_adapter("a")


def test_threads_may_be_the_first_to_name_a_stored_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def find(*args: Any) -> Any:
        with suppress(threading.BrokenBarrierError):  # which it is when the other thread is kept waiting
            both.wait(0.3)
        return find_adapter(*args)

    monkeypatch.setattr("adaptrt.api.find_adapter", find)
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(model.logits(PROMPT, "bard"))
        except AdapterError as error:
            found.append(error)

    with adaptrt.load("demo", "cpu", precision="exact") as model:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, f: m.load_adapter(f["a"]), AdapterError, "already loaded"),
        (lambda m, f: m.load_adapter("nowhere"), UnknownAdapterError, "nowhere"),
        (lambda m, f: m.load_adapter(f["base"]), AdapterError, "0 adapters"),
        (lambda m, f: m.unload_adapter("nobody"), UnknownAdapterError, "nobody.*loaded: a, bee"),
        (lambda m, f: m.set_adapter({"a": math.inf}), AdapterError, "inf.*finite"),
        (lambda m, f: m.set_adapter({"a": "1"}), AdapterError, "'1'"),
        (lambda m, f: m.set_adapter({"a": 10**400}), AdapterError, "'a': scale is 10.*finite"),
        (lambda m, f: m.set_adapter(5), AdapterError, "adapters: found 5, expected a name"),
        (lambda m, f: m.set_adapter([("a",)]), AdapterError, "adapters: found .*expected a name"),
        (lambda m, f: m.set_adapter([("a", 1, 2)]), AdapterError, "adapters: found .*expected a name"),
        (lambda m, f: m.set_adapter([{}]), AdapterError, "adapters: found .*expected a name"),
        (lambda m, f: m.set_adapter({5: 1}), AdapterError, "adapters: found {5: 1}, expected a name"),
        (lambda m, f: m.load_adapter(f["b"], name=5), AdapterError, "adapter name 5: expected text"),
        (lambda m, f: m.load_adapter(f["b"], scale="1"), AdapterError, "scale is '1', expected a finite"),
        (lambda m, f: m.load_adapter(f["b"], scale=None), AdapterError, "scale is None, expected a finite"),
        (lambda m, f: m.add_weighted_adapter(["a"], [1], None), AdapterError, "adapter name None: expected"),
        (lambda m, f: adaptrt.Request("x", sampling={}), RequestError, "found {}, expected a Sampling"),
        (lambda m, f: m.generate(PROMPT, temperature=-1), RequestError, "temperature"),
        (lambda m, f: m.generate(PROMPT, temperature=10**400), RequestError, "temperature: found 10.*to 100"),
        (lambda m, f: m.generate(5), RequestError, "prompt: found a int, expected text"),
        (lambda m, f: m.generate([[1.5]]), RequestError, r"prompt: found \[1.5\], expected token ids"),
        (lambda m, f: m.logits([1.0]), RequestError, r"prompt: found \[1.0\], expected token ids"),
        (lambda m, f: m.logits("12"), RequestError, "prompt: found '12', expected token ids"),
        (lambda m, f: m.generate(PROMPT, tempo=1), RequestError, "tempo"),
        (lambda m, f: m.generate("hello"), ModelError, "no tokenizer"),
        (lambda m, f: m.logits([1, 9999]), RequestError, "9999"),
        (lambda m, f: m.apply_chat_template([]), ModelError, "no chat template"),
        (lambda m, f: adaptrt.load(f["base"], backend="tpu"), BackendError, "tpu.*installed"),
        (
            lambda m, f: adaptrt.load(f["base"], backend="cpu:0"),
            BackendError,
            "'cpu': takes no device, .*'0'",
        ),
        (
            lambda m, f: adaptrt.load(f["base"], backend="cpu:"),
            BackendError,
            "'cpu': no device after the colon",
        ),
        (
            lambda m, f: adaptrt.load(f["base"], backend="cpu", gpu_memory=1 << 30),
            BackendError,
            "'cpu': has no GPU memory to limit, found a limit of 1073741824 bytes",
        ),
        (lambda m, f: adaptrt.load(f["base"], gpu_memory=0), RequestError, "gpu_memory: found 0"),
        (lambda m, f: adaptrt.load(f["base"], gpu_memory="6GiB"), RequestError, "gpu_memory: found '6GiB'"),
        (lambda m, f: adaptrt.load(f["base"], precision="exactly"), RequestError, "exactly"),
        (lambda m, f: adaptrt.load(f["base"], threads=0), RequestError, "threads"),
        (lambda m, f: adaptrt.load(f["base"], threads=True), RequestError, "threads: found True"),
        (lambda m, f: adaptrt.load(f["base"], backend=None), RequestError, "backend: found None"),
    ],
)
def test_refusals_name_the_thing(
    model: adaptrt.Model, files: dict[str, Path], call: object, error: type, words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        call(model, files)
    assert "\n" not in str(caught.value)


class Chips(ReferenceBackend):
    """A backend for several devices, which notes what it was asked for."""

    takes_device = takes_gpu_memory = True
    device: str

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> Any:
        self.device, self.gpu_memory = options.device, options.gpu_memory
        self.prefetched: list[tuple[int, ...]] = []
        executable: Any = super().load(program, tensors, options)
        executable.prefetch = lambda handles: self.prefetched.append(tuple(handles))
        return executable


@pytest.mark.parametrize(("choice", "device"), [("chips", ""), ("chips:1", "1"), ("chips:cuda:1", "cuda:1")])
def test_a_backend_gets_the_device_after_the_first_colon(
    files: dict[str, Path], choice: str, device: str
) -> None:
    chips = Chips()
    registry = replace(load_registry(), backends={"chips": chips})
    with adaptrt.load(files["base"], choice, registry=registry, gpu_memory=77) as model:
        assert (chips.device, chips.gpu_memory) == (device, 77)
        assert model.describe().startswith("reference")


def test_adapters_are_announced_when_a_request_names_them_and_while_it_waits(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptrt.engine.engine.MAX_SEQUENCES", 1)
    chips = Chips()
    registry = replace(load_registry(), backends={"chips": chips})
    with adaptrt.load(files["base"], "chips", registry=registry) as model:
        a, b = model.load_adapter(files["a"]), model.load_adapter(files["b"])
        requests = [adaptrt.Request([5, 6], name, adaptrt.Sampling(max_tokens=2)) for name in (a, b)]
        chunks = model.generate_batch([*requests, adaptrt.Request([5], {}, adaptrt.Sampling(max_tokens=1))])
        assert chips.prefetched == []
        next(chunks)
        assert chips.prefetched == [(0,), (1,), (0,), (1,), (1,)]  # checked, then run; the second one waits
        for _ in chunks:
            pass
        assert chips.prefetched[5:] == [(1,)]


class Rack(ReferenceBackend):
    """A backend that shows what is attached, by handle."""

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> Any:
        executable: Any = super().load(program, tensors, options)
        self.attached: dict[int, LoweredAdapter] = {}
        attach, detach = executable.attach, executable.detach

        def noted(adapter: LoweredAdapter) -> int:
            handle: int = attach(adapter)
            self.attached[handle] = adapter
            return handle

        def forgotten(handle: int) -> None:
            detach(handle)
            del self.attached[handle]

        executable.attach, executable.detach = noted, forgotten
        return executable


def test_a_sweep_of_scales_leaves_few_attached_and_takes_the_tensors_once(files: dict[str, Path]) -> None:
    rack, scales = Rack(), [k / 16 for k in range(1, 17)]
    registry = replace(load_registry(), backends={"rack": rack})
    with adaptrt.load(files["base"], "rack", registry=registry) as model:
        model.load_adapter(files["a"])
        swept = [model.logits(PROMPT, {"a": scale}) for scale in scales]
        assert len(rack.attached) == IDLE_SCALES + 1
        assert len({id(one["blk.0.attn_q"].terms[0]) for one in rack.attached.values()}) == IDLE_SCALES + 1
        assert len({id(one["blk.0.attn_q"].terms[0].v) for one in rack.attached.values()}) == 1
        again = [model.logits(PROMPT, {"a": scale}) for scale in scales]
        np.testing.assert_array_equal(again, swept)
        model.unload_adapter("a")
        assert rack.attached == {}


def test_a_scale_in_use_stays_attached_while_others_come_and_go(model: adaptrt.Model) -> None:
    alone = greedy(model, PROMPT, max_tokens=6, adapters=[("a", 0.5), ("a", 0.25)])
    stream = model.generate(PROMPT, 6, [("a", 0.5), ("a", 0.25)], stream=True, temperature=0)
    tokens = list(next(stream).token_ids)
    for k in range(1, 3 * IDLE_SCALES):
        model.logits(PROMPT, {"a": 1 + k / 8})
    with pytest.raises(AdapterError, match="in use"):
        model.unload_adapter("a")
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == alone
    model.unload_adapter("a")


def test_f16_cache_is_close_to_f32(files: dict[str, Path]) -> None:
    ids = np.random.default_rng(3).integers(0, 131, 100).tolist()
    logits = []
    for kv_dtype in ("f16", "f32"):
        with adaptrt.load(files["base"], precision="exact", kv_dtype=kv_dtype) as model:
            logits.append(model.logits(ids))
    error = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1])
    assert 0 < error < 2e-3


def test_a_long_prompt_reports_its_pieces(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrt.engine.engine.MAX_BATCH_TOKENS", 40)
    with adaptrt.load(files["base"], precision="exact") as model:
        chunks = list(model.generate([7] * 100, max_tokens=2, temperature=0, stream=True))
        pieces = [(chunk.n_prompt_tokens, chunk.n_tokens) for chunk in chunks]
    assert pieces == [(40, 0), (80, 0), (100, 1), (100, 2)]
