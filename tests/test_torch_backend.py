"""The torch backend beyond its conformance: weights on the device, the demo, what it says when it cannot run."""

from __future__ import annotations

import adaptrt_torch
import numpy as np
import pytest
import torch
from adaptrt_torch.executable import KEPT, find_device
from adaptrt_torch.matrices import matrix
from adaptrt_torch.placement import padded
from helpers.imports import modules_after

import adaptrt
from adaptrt.backends.base import LoadOptions
from adaptrt.errors import BackendError
from adaptrt.quant.plain import from_float32, to_float32
from adaptrt.testing.programs import DTYPES, Run, Sizes, adapter, batch, decoder, random, run_tokens

CPU = torch.device("cpu")
SMALL = Sizes(width=32, heads=2, kv_heads=1, head_dim=16, mlp=48, vocabulary=29, layers=1)


def loaded(**options: object) -> object:
    model = decoder(SMALL)
    return adaptrt_torch.TorchBackend().load(
        model.program, model.tensors, LoadOptions(device="cpu", threads=1, page_tokens=4, **options)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_keep_their_type_and_become_the_same_floats(dtype: str) -> None:
    """On the device a tensor takes what it takes in the file, and numpy's values come out, to the last bit."""
    for shape in ((3, 128), (5, 31), (700, 64)):
        tensor = from_float32(random(1, *shape), dtype)
        stored, expected = matrix(tensor, CPU), to_float32(tensor)
        np.testing.assert_array_equal(stored.dense().numpy(), expected)
        rows = torch.tensor([2, 0, 2])
        np.testing.assert_array_equal(stored.rows(rows).numpy(), expected[rows.numpy()])
        parts = [part for part in vars(stored).values() if isinstance(part, torch.Tensor)]
        tables = 4 * (512 + 256) if dtype == "nf4" else 0
        assert sum(part.nbytes for part in parts) - tables <= tensor.data.nbytes


def test_tokens_are_grouped_by_element_and_padded() -> None:
    found = padded(np.array([1, -1, 0, 1, -1, 1]))
    np.testing.assert_array_equal(found, [[2, 6, 6], [0, 3, 5]])
    assert padded(np.array([-1, -1])).shape == (0, 0)


def test_a_mixed_batch_multiplies_as_often_as_one_adapter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are batched: their number does not grow with sequences or adapters."""
    model, counts = decoder(SMALL), []
    product = torch.bmm

    def counted(*args: torch.Tensor) -> torch.Tensor:
        counts[-1] += 1
        return product(*args)

    monkeypatch.setattr(torch, "bmm", counted)
    for n in (1, 12):
        executable = loaded()
        executable.reserve(n)
        handles = [executable.attach(adapter(model, seed)) for seed in range(n)]
        counts.append(0)
        executable.step(batch([Run([3, i], 0, [i], (handle,)) for i, handle in enumerate(handles)]))
    assert counts[0] == counts[1] > 10


def test_compositions_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """More compositions than are kept, one of them again after the others, and handles that are used anew."""
    model = decoder(SMALL)
    executable = loaded()
    handles = [executable.attach(adapter(model, seed)) for seed in range(KEPT + 3)]
    expected = [run_tokens(loaded_with(seed), [1, 2], 4, [0]) for seed in range(2)]
    for handle in handles:
        run_tokens(executable, [1, 2], 4, [handle])
    for seed in range(2):
        np.testing.assert_array_equal(run_tokens(executable, [1, 2], 4, [handles[seed]]), expected[seed])
    executable.detach(handles[0])
    with pytest.raises(BackendError, match="no adapter with handle 0"):
        run_tokens(executable, [1, 2], 4, [handles[0]])


def loaded_with(seed: int) -> object:
    executable = loaded()
    executable.attach(adapter(decoder(SMALL), seed))
    return executable


def test_memory_that_is_not_there_is_refused_and_what_existed_stays() -> None:
    executable = loaded()
    before = run_tokens(executable, [1, 2, 3], 4)
    with pytest.raises(BackendError, match=r"KV pages: .*alloc") as caught:
        executable.reserve(10**12)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(run_tokens(executable, [1, 2, 3], 4), before)


def test_devices() -> None:
    assert find_device("cpu") == CPU
    assert find_device("").type in ("cpu", "cuda", "mps", "xpu")
    for name, words in (("abacus", "device 'abacus': Expected one of"), ("meta", "device 'meta': expected")):
        with pytest.raises(BackendError, match=words):
            find_device(name)


def test_torch_is_imported_only_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "from adaptrt.plugins import load_registry\nload_registry().backends['torch'].unavailable()"
    loaded_modules = modules_after(listing)
    assert "adaptrt_torch" in loaded_modules and "torch" not in loaded_modules
    monkeypatch.setattr(adaptrt_torch, "find_spec", lambda name: None)
    reason = adaptrt_torch.TorchBackend().unavailable()
    assert reason == "torch is not installed: pip install 'adaptrt[torch]'"


def test_the_demo_says_the_same_on_torch() -> None:
    """The greedy continuation of the exact CPU backend, from the built-in model with a stored adapter."""
    texts = []
    for backend in ("cpu", "torch:cpu"):
        with adaptrt.load("demo", backend=backend, precision="exact", threads=1) as model:
            texts.append(model.generate("In the", 12, adapters="scripture", temperature=0))
    assert texts[0] == texts[1] != ""
