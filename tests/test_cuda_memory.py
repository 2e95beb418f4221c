"""The CUDA backend within a budget of GPU memory: what moves to the host changes no result."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cuda import needs_gpu
from numpy.typing import NDArray

from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cuda import CudaBackend
from adaptrt.errors import BackendError
from adaptrt.testing.programs import Model, Run, Sizes, adapter, batch, decoder

MIB = 1 << 20
HERE = Path(__file__).parent
OPTIONS = LoadOptions(page_tokens=16)


def load(model: Model, **options: Any) -> Any:
    return CudaBackend().load(model.program, model.tensors, replace(OPTIONS, **options))


@cache
def large() -> Model:
    """About 150 MiB of bfloat16 weights in 24 layers."""
    return decoder(
        Sizes(width=512, heads=8, kv_heads=8, head_dim=64, mlp=1280, vocabulary=1000, layers=24), "bf16"
    )


def least_memory(model: Model) -> int:
    """The MiB that the refusal of one byte asks for."""
    with pytest.raises(BackendError, match="at least") as caught:
        load(model, gpu_memory=1)
    return int(re.findall(r"at least (\d+) MiB", str(caught.value))[0])


def answers(executable: Any) -> list[NDArray[np.float32]]:
    """A prompt, one token, a batch, one token again, and a prompt that is no graph."""
    executable.reserve(25)
    tokens = np.random.default_rng(0).integers(0, 1000, 400).tolist()
    one = Run(tokens[:1], 20, [0, 1])
    return [
        executable.step(batch([run] if isinstance(run, Run) else run))
        for run in (
            Run(tokens[:20], 0, [0, 1]),
            one,
            one,
            [Run(tokens[i : i + 2], 0, [i]) for i in range(9)],
            one,
            Run(tokens, 0, list(range(25))),
        )
    ]


@needs_gpu
def test_streamed_weights_give_the_same_bits() -> None:
    model = large()
    least = least_memory(model)
    whole = load(model)
    expected = answers(whole)
    whole.close()
    for budget in (least, least + 20, least + 60):
        executable = load(model, gpu_memory=budget * MIB)
        for found, wanted in zip(answers(executable), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert "GB of weights streamed" in executable.describe()
        executable.close()


@needs_gpu
def test_weights_give_way_to_pages_of_the_cache() -> None:
    model = large()
    whole, tight = load(model), load(model, gpu_memory=(least_memory(model) + 160) * MIB)
    assert "streamed" not in tight.describe()
    one = batch([Run([7, 8, 9], 0, [0])])
    for executable in (whole, tight):
        executable.reserve(1)
    for pages in (1, 150, 250):  # 0.75 MiB each
        tight.reserve(pages)
        for _ in range(3):
            np.testing.assert_array_equal(tight.step(one), whole.step(one))
    with pytest.raises(BackendError, match=r"KV pages: \d+ bytes do not fit into the GPU memory"):
        tight.reserve(5000)
    np.testing.assert_array_equal(tight.step(one), whole.step(one))


@needs_gpu
def test_a_budget_that_is_too_small_is_refused_with_one_that_does() -> None:
    model = large()
    least = least_memory(model)
    with pytest.raises(
        BackendError, match=rf"are too few for this model, at least {least} MiB are needed"
    ) as caught:
        load(model, gpu_memory=(least - 1) * MIB)
    assert "\n" not in str(caught.value)
    load(model, gpu_memory=least * MIB).close()


@needs_gpu
def test_idle_adapters_leave_and_come_back() -> None:
    """Eight adapters of 28 MiB and the weights do not fit together: not even without the weights."""
    model = large()
    adapters = [adapter(model, seed, "bf16", rank=20) for seed in range(8)]
    whole, tight = load(model), load(model, gpu_memory=(least_memory(model) + 120) * MIB)
    handles = [[executable.attach(one) for one in adapters] for executable in (whole, tight)]
    assert handles[0] == handles[1]
    for executable in (whole, tight):
        executable.reserve(8)

    def agree(*stacks: tuple[int, ...]) -> None:
        made = batch([Run([3 + i], 0, [i], stack) for i, stack in enumerate(stacks)])
        np.testing.assert_array_equal(tight.step(made), whole.step(made))

    for turn in range(3):
        for handle in handles[0]:
            tight.prefetch([(handle + turn) % 8])
            agree((handle,))
    agree((0,), (5, 1), ())
    agree((2, 3))
    tight.detach(3)
    whole.detach(3)
    agree((4, 2), (7,))
    with pytest.raises(BackendError, match="do not fit into the GPU memory"):
        tight.step(batch([Run([3], 0, [0], tuple(h for h in handles[0] if h != 3))]))
    agree((0,))
    with pytest.raises(BackendError, match="prefetch: no adapter with handle 3"):
        tight.prefetch([3])


@needs_gpu
def test_adapters_that_share_tensors_leave_and_come_back() -> None:
    model = large()
    shared = adapter(model, 1, "bf16", rank=20)
    others = [adapter(model, seed, "bf16", rank=20) for seed in range(2, 6)]
    whole, tight = load(model), load(model, gpu_memory=(least_memory(model) + 60) * MIB)
    for executable in (whole, tight):
        assert [executable.attach(one) for one in (shared, dict(shared), *others)] == list(range(6))
        executable.reserve(1)

    def agree(handle: int) -> None:
        made = batch([Run([3], 0, [0], (handle,))])
        np.testing.assert_array_equal(tight.step(made), whole.step(made))

    for handle in (0, 2, 3, 1, 4, 5, 0, 1):
        agree(handle)
    for executable in (whole, tight):
        executable.detach(0)
        assert executable.attach(shared) == 6
    for handle in (6, 4, 5, 1, 6):
        agree(handle)


@needs_gpu
def test_what_fails_for_want_of_memory_frees_what_it_had() -> None:
    model = large()
    load(model).close()  # what CUDA itself takes, it keeps
    before = torch.cuda.mem_get_info()[0]
    executable = load(model)
    executable.reserve(8)
    with_model = torch.cuda.mem_get_info()[0]
    assert before - with_model > 130 * MIB
    with pytest.raises(BackendError, match=r"KV pages: \d+ bytes do not fit, \d+ of the GPU's \d+ are free"):
        executable.reserve(2_000_000)
    assert abs(with_model - torch.cuda.mem_get_info()[0]) <= 8 * MIB
    executable.close()
    assert abs(before - torch.cuda.mem_get_info()[0]) <= 8 * MIB
    with pytest.raises(BackendError, match="at least"):
        load(model, gpu_memory=MIB)
    assert abs(before - torch.cuda.mem_get_info()[0]) <= 8 * MIB


FAULT = """
import torch
from adaptrt.errors import BackendError
from adaptrt.testing.programs import Run, batch
from test_cuda_memory import large, load

def error(call, *arguments):
    try:
        call(*arguments)
    except BackendError as error:
        return str(error)

one = batch([Run([7, 8, 9], 0, [0])])
executable = load(large())
executable.reserve(1)
executable.step(one)
try:  # an assertion of somebody else's kernel: the process loses its context on the device
    torch.zeros(1, device="cuda")[torch.tensor([7], device="cuda")].item()
except Exception:
    pass
print(error(executable.step, one))
print(error(executable.reserve, 5))
executable.close()
print(error(load, large()) or "loaded")
"""


@needs_gpu
def test_a_fault_of_the_device_is_one_line_each_time_and_the_process_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, cwd=str(HERE))
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("backend cuda: ") and "cudaErrorAssert" in first
    assert second == "backend cuda: reserve: the GPU failed in an earlier call; load the model again"
    assert third == "loaded" or third.startswith("backend cuda: ")


@needs_gpu
def test_a_model_larger_than_what_is_free_runs_without_being_told() -> None:
    model = large()
    whole = load(model)
    expected = answers(whole)
    whole.close()
    torch.cuda.empty_cache()
    room = (least_memory(model) + 100) * MIB
    filling = torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device="cuda")
    executable = load(model)
    for found, wanted in zip(answers(executable), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert "GB of weights streamed" in executable.describe()
    executable.close()
    del filling
    torch.cuda.empty_cache()
