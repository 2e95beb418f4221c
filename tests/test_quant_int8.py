"""int8 against torch's bfloat16 and rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptrt.quant import int8
from adaptrt.tensor import tensor_nbytes

SHAPES = [(1, 64), (3, 64), (5, 100), (7, 1), (2, 3, 65), (33,), (200,), (16, 256)]


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(np.float32)


def expected_block(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule, in torch: codes [n] and the bfloat16 scale of one block."""
    wanted = block.abs().max() / 127
    scale = wanted.bfloat16()
    if scale < wanted:
        scale = torch.nextafter(scale, torch.tensor(torch.inf, dtype=torch.bfloat16))
    codes = torch.round(block / scale.float()).clip(-127, 127)
    return codes.to(torch.int8), scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_follows_the_rule(shape):
    x = weights(shape)
    codes, scales = int8.parts(int8.quantize(x))
    for row, row_codes, row_scales in zip(x.reshape(-1, shape[-1]), codes, scales, strict=True):
        for number, block in enumerate(torch.from_numpy(row).split(64)):
            expected, scale = expected_block(block)
            assert np.array_equal(row_codes[number * 64 :][:64], expected.numpy())
            assert row_scales[number] == scale.view(torch.uint16).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_is_code_times_scale(shape):
    tensor = int8.quantize(weights(shape))
    codes, scales = int8.parts(tensor)
    scale = torch.from_numpy(scales.copy()).view(torch.bfloat16).float().repeat_interleave(64, dim=1)
    expected = torch.from_numpy(codes.copy()).float() * scale[:, : codes.shape[1]]
    assert np.array_equal(int8.dequantize(tensor), expected.reshape(shape).numpy())
    assert tensor.data.size == tensor_nbytes("int8", shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_half_a_step(shape):
    x = weights(shape)
    tensor = int8.quantize(x)
    scale = torch.from_numpy(int8.parts(tensor).scales.copy()).view(torch.bfloat16).float()
    half_step = scale.repeat_interleave(64, dim=1)[:, : shape[-1]].numpy().reshape(shape) / 2
    assert np.all(np.abs(int8.dequantize(tensor) - x) <= half_step * (1 + 1e-4))


def test_ties_go_to_the_even_code():
    x = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes, scales = int8.parts(int8.quantize(x))
    assert scales.tolist() == [[0x3F80]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1.2e-38, 3.4e38])
def test_extreme_magnitudes_stay_within_127(magnitude):
    x = np.linspace(-1, 1, 65, dtype=np.float32)[None] * np.float32(magnitude)
    tensor = int8.quantize(x)
    assert np.abs(int8.parts(tensor).codes.astype(int)).max() <= 127
    assert np.all(np.abs(int8.dequantize(tensor) - x) <= max(magnitude / 250, 2.0**-133))


def test_zero_block_and_empty_matrix():
    codes, scales = int8.parts(int8.quantize(np.zeros((2, 65), np.float32)))
    assert not codes.any()
    assert not scales.any()
    for shape in [(0, 64), (3, 0)]:
        assert int8.dequantize(int8.quantize(np.empty(shape, np.float32))).shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_without_a_code_is_named(value):
    x = np.zeros((4, 50), np.float32)
    x[2, 31] = value
    with pytest.raises(ValueError, match=f"flat index 131 is {value}, expected a finite number"):
        int8.quantize(x)
