"""The CUDA backend as a whole: decoders with ragged stacks, changing steps, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from helpers.cuda import (
    OPTIONS,
    UNAVAILABLE,
    load,
    needs_gpu,
    plain,
    reference,
    sparse,
)

from adaptrt.adapters.normal import Lowered, LoweredAdapter, LowRank
from adaptrt.backends.base import attach_points
from adaptrt.backends.cuda import CudaBackend
from adaptrt.backends.native import ProgramStructs, native_module, open_table
from adaptrt.errors import BackendError
from adaptrt.program import Embed, Linear, Logits, Op
from adaptrt.quant.plain import from_float32
from adaptrt.testing import programs
from adaptrt.testing.programs import (
    Floats,
    Model,
    Pages,
    Run,
    Sizes,
    adapter,
    batch,
    decoder,
    linear_model,
    random,
    relative_error,
    run_tokens,
    weight,
)

SIZES = {
    "even": Sizes(),
    "odd": Sizes(width=75, heads=3, kv_heads=1, head_dim=10, mlp=43, vocabulary=37),
    "wide": Sizes(width=256, heads=4, kv_heads=4, head_dim=64, mlp=384, vocabulary=300, layers=1),
}


@needs_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 8, 64), (8, 1, 64), (6, 2, 128), (2, 1, 128)]
)
def test_decoding_by_one_token(heads: int, kv_heads: int, head_dim: int) -> None:
    """From no context on, past the tiles of one pass over it, alone and with others of the same beginning."""
    model = decoder(Sizes(heads=heads, kv_heads=kv_heads, head_dim=head_dim))
    pages = [3, 1, 6, 0, 2, 4]
    runs = [[Run([3 * i], i, pages)] for i in range(5)]
    for start, end in ((5, 31), (35, 127), (131, 160)):
        runs.append([Run([5 * i % 37 for i in range(start, end)], start, pages)])
        runs += [[Run([3 * i % 37], i, pages)] for i in range(end, end + 4)]
    others = [Run([5, 9, 2], 128, [*pages[:4], 7]), Run([4, 8], 160, [*pages[:5], 8]), Run([8], 0, [9])]
    runs.append(others)
    runs += [[Run([i], o.start + len(o.tokens) + i, o.pages) for o in others] for i in range(3)]
    results = []
    for executable in (reference(model, page_tokens=32), load(model, page_tokens=32)):
        executable.reserve(16)
        results.append(np.concatenate([executable.step(batch(step)) for step in runs]))
        executable.close()
    assert np.linalg.norm(results[1] - results[0]) < 2e-2 * np.linalg.norm(results[0])
    assert relative_error(results[1], results[0]) < 5e-2


@needs_gpu
@pytest.mark.parametrize("page_tokens", [32, 64])
def test_decoding_after_contexts_of_all_lengths(page_tokens: int) -> None:
    """One so long that several blocks of threads share it, beside short ones and none; then the long one alone."""
    model = decoder(Sizes(heads=8, kv_heads=2, head_dim=128, layers=1))
    lengths = [1500, 0, 1, page_tokens + 1, 700]
    results = []
    for executable in (reference(model, page_tokens=page_tokens), load(model, page_tokens=page_tokens)):
        pages = Pages(page_tokens, 100)
        executable.reserve(100)
        taken = [pages.take(length + 2) for length in lengths]
        for length, own in zip(lengths, taken, strict=True):
            if length:
                executable.step(batch([Run([7 * i % 37 for i in range(length)], 0, own, wanted=[])]))
        runs = [[Run([3 + i], n + i, own) for n, own in zip(lengths, taken, strict=True)] for i in range(2)]
        runs.append(runs[1][:1])
        results.append(np.concatenate([executable.step(batch(step)) for step in runs]))
        executable.close()
    assert np.linalg.norm(results[1] - results[0]) < 2e-2 * np.linalg.norm(results[0])
    assert relative_error(results[1], results[0]) < 5e-2


def with_one_term(model: Model) -> LoweredAdapter:
    points = attach_points(model.program, model.tensors).items()
    linears = [(name, point) for name, point in points if point.kind == "linear"]
    return {name: Lowered((plain(16, at.out, at.inner, i),)) for i, (name, at) in enumerate(linears)}


def with_factors_in_common(model: Model, count: int) -> list[LoweredAdapter]:
    points = attach_points(model.program, model.tensors).items()
    linears = {name: point for name, point in points if point.kind == "linear"}
    u = from_float32(random(1, max(at.out for at in linears.values()), 40, scale=0.1), "bf16")
    v = from_float32(random(2, 40, max(at.inner for at in linears.values()), scale=0.1), "bf16")
    return [
        {
            name: Lowered((LowRank(u, v, 0.5, random(i, 40), random(i + 1, at.out)),))
            for name, at in linears.items()
        }
        for i in range(count)
    ]


@needs_gpu
@pytest.mark.parametrize("kind", ["none", "one term", "several terms", "factors in common"])
def test_no_sequence_changes_a_bit_of_another(kind: str) -> None:
    """Not even one that is not finite, in steps of as many tokens as each kernel takes."""
    model, ill = decoder(Sizes(head_dim=64)), 36
    table = random(5, 101, 128)
    table[ill] = np.resize([np.nan, np.inf, -np.inf], 128)
    model.tensors["embed"] = from_float32(table, "f32")
    executable = load(model, page_tokens=32)
    executable.reserve(130)
    adapters = {"none": [], "one term": [with_one_term(model)] * 2, "several terms": [adapter(model, 1)] * 2}
    for one in adapters.get(kind) or with_factors_in_common(model, 2):
        executable.attach(one)
    stacks = [()] if kind == "none" else [(0,), (), (1,), (0, 1)]

    def logits(first: int, n_runs: int, longest: int) -> Floats:
        """Two steps of sequences of up to `longest` tokens, where the one in the middle begins with `first`."""
        steps = []
        for step in range(2):
            runs = []
            for i in range(n_runs):
                tokens = [3 + (i + k + step) % 30 for k in range(1 + i % longest)]
                if i == n_runs // 2 and step == 0:
                    tokens[0] = first
                runs.append(
                    Run(tokens, step * len(tokens), [i], stacks[i % len(stacks)], wanted=[len(tokens) - 1])
                )
            steps.append(executable.step(batch(runs)))
        return np.stack(steps)

    for n_runs in (2, 5, 8, 9, 16, 17, 40, 112, 130):
        for longest in (1, 3):
            expected, found = logits(2, n_runs, longest), logits(ill, n_runs, longest)
            others = np.arange(n_runs) != n_runs // 2
            assert np.isfinite(expected).all() and np.isnan(found[:, ~others]).all()
            np.testing.assert_array_equal(found[:, others], expected[:, others])


@needs_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "nf4"])
def test_decoder_with_ragged_stacks(size: str, dtype: str) -> None:
    """Prefill, then decode three times (the last as a graph), of five sequences with different stacks in one batch."""
    model = decoder(SIZES[size], dtype)
    adapters = [
        adapter(model, 1, "f32", rank=5),
        adapter(model, 2, "bf16", rank=16, skip=("embed", "0.q", "head")),
        adapter(model, 3, "f16", rank=1),
    ]
    stacks = [(), (0,), (1, 0, 2), (1,), (1,)]
    lengths = [1, 6, 3, 9, 2]
    results = []
    for executable in (reference(model), load(model)):
        handles = [executable.attach(a) for a in adapters]
        pages = Pages(OPTIONS.page_tokens, 64)
        executable.reserve(64)
        taken = [pages.take(length + 4) for length in lengths]
        runs = [
            Run([(7 * i + j) % 37 for j in range(length)], 0, taken[i], [handles[s] for s in stacks[i]])
            for i, length in enumerate(lengths)
        ]
        runs[3].wanted = [0, 8, 8, 3]
        logits = [executable.step(batch(runs))]
        for more in range(4):
            decoded = [
                Run([i + more], length + more, taken[i], runs[i].stack) for i, length in enumerate(lengths)
            ]
            logits.append(executable.step(batch(decoded)))
        results.append(np.concatenate(logits))
        executable.close()
    assert np.linalg.norm(results[1] - results[0]) < 2e-2 * np.linalg.norm(results[0])
    assert relative_error(results[1], results[0]) < 5e-2


@needs_gpu
@pytest.mark.parametrize(("page_tokens", "head_dim"), [(4, 32), (32, 64)])
def test_runs_that_share_pages_see_each_other(page_tokens: int, head_dim: int) -> None:
    """Decoding, and one sequence's next tokens as runs of their own: then all are stored before any attends."""
    model = decoder(Sizes(head_dim=head_dim))
    results = []
    for executable in (reference(model, page_tokens=page_tokens), load(model, page_tokens=page_tokens)):
        executable.reserve(8)
        logits = [executable.step(batch([Run([5, 9, 2], 0, [0, 1]), Run([7, 1, 3], 0, [2, 3])]))]
        for _ in range(3):
            logits.append(
                executable.step(batch([Run([4], 3, [0, 1]), Run([6], 4, [0, 1]), Run([8], 3, [2, 3])]))
            )
            logits.append(executable.step(batch([Run([9], 5, [0, 1]), Run([3], 4, [2, 3])])))
        results.append(np.concatenate(logits))
    assert relative_error(results[1], results[0]) < 3e-2


@needs_gpu
def test_steps_of_changing_shapes_and_adapters_stay_right() -> None:
    """Graphs are made for shapes that repeat: none may outlive what it was made of."""
    model = decoder()
    first, second = adapter(model, 1, "bf16", rank=4), adapter(model, 2, "bf16", rank=4)
    ours, theirs = load(model), reference(model)
    for executable in (ours, theirs):
        executable.reserve(8)

    def agree(*runs: Run) -> None:
        for _ in range(3):
            found, expected = (executable.step(batch(runs)) for executable in (ours, theirs))
            assert relative_error(found, expected) < 3e-2

    agree(Run([1], 0, [0]))
    agree(Run([1], 0, [0]), Run([2], 0, [1]))
    handle = ours.attach(first)
    assert theirs.attach(first) == handle
    agree(Run([1], 0, [0], [handle]))
    for executable in (ours, theirs):
        executable.attach(second)
    agree(Run([1], 0, [0], [handle + 1]))
    for executable in (ours, theirs):
        executable.detach(handle)
        executable.reserve(300)
    agree(Run([4], 0, [299], [handle + 1]))
    agree(Run(list(range(40)), 0, list(range(20, 30)), [handle + 1]))
    agree(Run([1], 0, [0]))


def answers_of_all_kernels(executable: Any) -> list[Floats]:
    """Steps of so many tokens as each kernel for products takes, each with the executable's only adapter."""
    executable.reserve(220)
    return [
        executable.step(batch([Run([i % 37 for i in range(n)], 0, range(n), (0,))]))
        for n in (1, 3, 8, 12, 16, 40, 112, 220)
    ]


@needs_gpu
def test_models_that_step_at_the_same_time() -> None:
    """Blocks of threads of a kernel wait for each other: no two models may keep each other's from running."""
    rows, cols = 2304, 512  # a tile at least for each multiprocessor
    tensors = {"table": from_float32(random(0, 37, cols), "f32")}
    ops: list[Op] = [Embed("x", "table", "embed")]
    lowered: LoweredAdapter = {}
    for i in range(4):
        for name, out, src in ((f"{i}.up", "y", "x"), (f"{i}.down", "x", "y")):
            shape = (rows, cols) if out == "y" else (cols, rows)
            weight(name, *shape, "nf4", tensors)
            lowered[name] = Lowered((plain(16, *shape, i),))
            ops.append(Linear(out, src, name, None, name))
    weight("head", rows, cols, "int8", tensors)
    model = programs.model([*ops, Logits("x", "head", None, "head")], {"x": cols, "y": rows}, tensors)
    alone = [load(model, page_tokens=1) for _ in range(3)]
    for executable in (theirs := reference(model, page_tokens=1), *alone):
        executable.attach(lowered)
    expected = answers_of_all_kernels(alone[0])
    for found, wanted in zip(expected, answers_of_all_kernels(theirs), strict=True):
        assert relative_error(found, wanted) < 5e-2
    found_by: list[list[list[Floats]]] = [[] for _ in alone]
    threads = [
        Thread(
            target=lambda i=i: found_by[i].extend(answers_of_all_kernels(alone[i]) for _ in range(40)),
            daemon=True,
        )
        for i in range(len(alone))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(found) for found in found_by] == [40, 40, 40]
    for answers in found_by:
        for found in answers:
            for one, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, wanted)


@needs_gpu
def test_what_fails_loads_and_closes_leaves_another_alone() -> None:
    """Steps whose graphs are being made, while other models of the process come, err and go."""
    model = decoder()
    ours = load(model)
    ours.reserve(64)
    batches = [batch([Run([(i + k) % 37], 0, [i]) for i in range(n)]) for n in range(1, 65) for k in range(3)]
    expected = [ours.step(one) for one in batches]
    ours.close()
    ours = load(model)
    ours.reserve(64)
    done, errors = Event(), list[str]()

    def others() -> None:
        while not done.is_set():
            other = load(model)
            other.reserve(2)
            for refused in (Run([101], 0, [0]), Run([1], 0, [2])):
                with pytest.raises(BackendError) as caught:
                    other.step(batch([refused]))
                errors.append(str(caught.value))
            with pytest.raises(BackendError, match="do not fit"):
                other.attach({"0.k": Lowered((plain(4, 63, 128, 1),))})
            with pytest.raises(BackendError, match="device 99"):
                load(model, device="99")
            other.step(batch([Run([1], 0, [0])]))
            other.close()

    thread = Thread(target=others, daemon=True)
    thread.start()
    try:
        for one, wanted in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(ours.step(one), wanted)
    finally:
        done.set()
        thread.join(60)
    assert errors and len(errors) % 2 == 0
    assert all("token 0 is 101" in e or "KV page 2 is not reserved" in e for e in errors)


@needs_gpu
def test_no_logits_and_logits_in_any_order() -> None:
    executable = load(decoder())
    executable.reserve(8)
    runs = [Run([5, 9, 2, 30], 0, [0]), Run([8, 8], 0, [5])]
    every = executable.step(batch(runs))
    rows = np.array([5, 0, 4, 4, 3], np.int32)
    np.testing.assert_array_equal(executable.step(replace(batch(runs), logit_rows=rows)), every[rows])
    assert executable.step(replace(batch(runs), logit_rows=rows[:0])).shape == (0, every.shape[1])


@needs_gpu
def test_shared_tensors_survive_the_detaching_of_one_adapter() -> None:
    model = decoder()
    executable = load(model)
    shared = adapter(model, 4)
    first, second = executable.attach(shared), executable.attach(dict(shared))
    expected = run_tokens(executable, [3, 1], 4, [second])
    executable.detach(first)
    np.testing.assert_array_equal(run_tokens(executable, [3, 1], 4, [second]), expected)


@needs_gpu
def test_what_is_not_offered_is_refused_in_one_line() -> None:
    model = linear_model(3, 8, "f32")
    for options, message in (
        ({"precision": "exact"}, "precision exact"),
        ({"kv_dtype": "f32"}, "KV in f32"),
        ({"device": "99"}, "device 99"),
    ):
        with pytest.raises(BackendError, match=message) as caught:
            load(model, **options)
        assert "\n" not in str(caught.value)


@needs_gpu
def test_peaks_leave_the_executable_as_it_was() -> None:
    executable = load(decoder())
    before = run_tokens(executable, [1, 2, 3], 4)
    peaks = executable.peaks()
    assert peaks.bytes_per_second > 1e10 and peaks.device_bytes > 1e6
    assert peaks.operations_per_second == 0 or peaks.operations_per_second > 1e12  # without cuBLAS not known
    np.testing.assert_array_equal(run_tokens(executable, [1, 2, 3], 4), before)


@needs_gpu
def test_memory_that_is_not_there_is_refused_and_the_rest_stays() -> None:
    model = decoder()
    executable = load(model, page_tokens=65536)
    before = run_tokens(executable, [1, 2, 3], 65536)
    with pytest.raises(BackendError, match=r"KV pages: \d+ bytes do not fit"):
        executable.reserve(10_000)
    np.testing.assert_array_equal(run_tokens(executable, [1, 2, 3], 65536), before)


@needs_gpu
def test_hostile_programs_batches_and_adapters_are_refused() -> None:
    """The checks are those of native/common, tested with the CPU backend; here that they are made."""
    model, backend = decoder(), CudaBackend()
    calls = backend._calls()
    loaded = ProgramStructs(calls, model.program, model.tensors)
    loaded.program.ops[2].out = 1000
    options = calls.ffi.new("adrt_options *", {"threads": 1, "precision": 1, "kv_dtype": 1, "page_tokens": 4})
    out = calls.ffi.new("adrt_executable **")
    with pytest.raises(BackendError, match="register 1000"):
        calls("load", loaded.program, options, out)
    assert out[0] == calls.ffi.NULL
    executable = load(model)
    executable.reserve(2)
    for run, message in (
        (Run([101], 0, [0]), "token 0 is 101"),
        (Run([1], 0, [2]), "KV page 2 is not reserved"),
        (Run([1], 0, [0], [7]), "no adapter with handle 7"),
    ):
        with pytest.raises(BackendError, match=message):
            executable.step(batch([run]))
    for lowered, message in (
        (Lowered((plain(4, 63, 128, 1),)), "do not fit"),
        (Lowered((plain(4, 64, 128, 1, "int8"), plain(4, 64, 127, 1))), "do not fit"),
        (Lowered(rotation=random(1, 2, 64, 64)[:1]), "rotation"),
        (Lowered((replace(sparse(64, 128, 1), columns=sparse(64, 128, 1).columns[::-1]),)), "column"),
    ):
        with pytest.raises(BackendError, match=message):
            executable.attach({"0.k": lowered})
    with pytest.raises(BackendError, match="no adapter with handle 3"):
        executable.detach(3)


def test_a_library_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    module = native_module("cuda")
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"no library")
    for path in (broken, Path(module.__file__)):  # the second one is sound, but has no such symbol
        with pytest.raises(BackendError, match=r"backend cuda: .* cannot be loaded") as caught:
            open_table(module, path, "adrt_cuda_backend", "cuda")
        assert "\n" not in str(caught.value)


def test_a_device_that_is_no_number_is_refused() -> None:
    with pytest.raises(BackendError, match="device 'x', expected the number of a GPU"):
        load(linear_model(3, 8, "f32"), device="x")


def test_the_reason_why_there_is_no_gpu_is_one_line() -> None:
    assert UNAVAILABLE is None or (UNAVAILABLE and "\n" not in UNAVAILABLE and "backend" not in UNAVAILABLE)
