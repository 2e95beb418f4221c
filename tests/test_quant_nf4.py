"""NF4 against bitsandbytes: codes, double-quantized absmax, dequantized weights and ties."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adaptrt.quant import nf4
from adaptrt.quant.tables import DYNAMIC_MAP, NF4_CODEBOOK
from adaptrt.tensor import Tensor, tensor_nbytes

SHAPES = [
    (64,),
    (128, 64),
    (100, 100),
    (3, 7),
    (1, 1),
    (33, 65),
    (65, 63),
    (1000, 130),
    (5, 5, 5),
    (96, 1024),
]
RNG_SEED = 20240917


@dataclass(frozen=True)
class Theirs:
    """What bitsandbytes makes of a weight."""

    codes: NDArray[np.uint8]
    absmax: NDArray[np.uint8]
    nested: NDArray[np.float32]
    offset: np.float32
    weights: NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def no_compiler():
    """bitsandbytes would compile its fallback for odd row lengths."""
    with torch._dynamo.config.patch(disable=True):
        yield


def bitsandbytes(x: NDArray[np.float32]) -> Theirs:
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(x), compress_statistics=True, quant_type="nf4", blocksize=64
    )
    return Theirs(
        packed.numpy().reshape(-1),
        state.absmax.numpy(),
        state.state2.absmax.numpy(),
        np.float32(state.offset.item()),
        bnb.dequantize_4bit(packed, state).numpy().reshape(x.shape),
    )


def bitsandbytes_nearest(difference: NDArray[np.float32]) -> NDArray[np.uint8]:
    """bitsandbytes' exhaustive search, kept for float64; float32 goes through a 65536-entry table."""
    exhaustive = torch.ops.bitsandbytes.quantize_blockwise
    codes, _ = exhaustive(torch.from_numpy(difference).double(), bnb.create_dynamic_map(), 256)
    return codes.numpy()


def random_weights(shape: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.default_rng([RNG_SEED, *shape])
    return (rng.standard_t(4, shape) * 0.02).astype(np.float32)


def bits(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


def test_codebooks_are_those_of_bitsandbytes():
    theirs = bnb.get_4bit_type("nf4", device="cpu").numpy()
    assert np.array_equal(bits(NF4_CODEBOOK), bits(theirs))
    assert np.array_equal(bits(DYNAMIC_MAP), bits(bnb.create_dynamic_map().numpy()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_writes_the_codes_and_scales_of_bitsandbytes(shape):
    x = random_weights(shape)
    theirs = bitsandbytes(x)
    codes, absmax = nf4.quantize_blocks(x.reshape(-1))
    q, nested = nf4.quantize_absmax(absmax, theirs.offset)
    assert np.array_equal(codes, theirs.codes)
    assert np.array_equal(bits(nested), bits(theirs.nested))
    difference = absmax - theirs.offset
    scale = nested[np.arange(q.size) // 256]
    some = scale > 0  # in a group of equal absmax, the code has no meaning
    assert np.array_equal(q[some], bitsandbytes_nearest(difference)[some])
    ours_off, theirs_off = (np.abs(DYNAMIC_MAP[c] * scale - difference)[some] for c in (q, theirs.absmax))
    assert np.all(theirs_off - ours_off <= scale[some] * 2 / 65536)  # the resolution of its table


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_offset_is_the_mean_correctly_rounded(shape):
    x = random_weights(shape)
    _, absmax = nf4.quantize_blocks(x.reshape(-1))
    exact = sum(map(Fraction, absmax.tolist())) / absmax.size
    offset = nf4.parts(nf4.quantize(x)).offset
    neighbours = np.nextafter(offset, np.float32([-np.inf, np.inf]))
    error = abs(Fraction(float(offset)) - exact)
    assert all(error <= abs(Fraction(float(other)) - exact) for other in neighbours)
    assert float(offset) == pytest.approx(float(bitsandbytes(x).offset), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_equals_bitsandbytes_bit_for_bit(shape):
    theirs = bitsandbytes(random_weights(shape))
    tensor = nf4.assemble(shape, nf4.Nf4Parts(theirs.codes, theirs.absmax, theirs.nested, theirs.offset))
    ours = nf4.dequantize(tensor)
    assert ours.shape == shape
    assert np.array_equal(bits(ours), bits(theirs.weights))


def test_a_tie_takes_the_code_that_bitsandbytes_takes():
    halfway = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / np.float32(2)
    near = [np.nextafter(halfway, np.float32(to)) for to in (-2, 2)]
    block = np.concatenate(
        [halfway, *near, [-1.0, 1.0, -0.0, 0.0], NF4_CODEBOOK[1:-1], [0.0]], dtype=np.float32
    )
    for scale in (1.0, 0.5, 2.0**-120, 2.0**100, 3.0, 0.7):
        x = block * np.float32(scale)
        for size in (64, 63):  # multiplied by the inverse; divided
            assert np.array_equal(nf4.quantize_blocks(x[:size])[0], bitsandbytes(x[:size]).codes), (
                scale,
                size,
            )


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("size", [64, 130, 7])
def test_extreme_magnitudes_equal_bitsandbytes(scale, size):
    x = np.clip(random_weights((size,)) * 10, -1, 1) * np.float32(scale)
    packed, state = bnb.quantize_4bit(torch.from_numpy(x), quant_type="nf4", blocksize=64)
    codes, absmax = nf4.quantize_blocks(x)
    assert np.array_equal(codes, packed.numpy().reshape(-1))
    assert np.array_equal(bits(absmax), bits(state.absmax.numpy()))


def test_zeros_stay_zero():
    for shape in [(64,), (7,), (3, 50)]:
        tensor = nf4.quantize(np.zeros(shape, np.float32))
        assert set(nf4.parts(tensor).codes) == {0x77}
        assert not nf4.dequantize(tensor).any()


def test_parts_are_views_and_padding_is_zero():
    tensor = nf4.quantize(random_weights((13, 77)))
    codes, absmax, nested, offset = nf4.parts(tensor)
    assert all(np.shares_memory(part, tensor.data) for part in (codes, absmax, nested))
    kept = bytes(codes) + bytes(absmax) + bytes(nested) + offset.tobytes()
    assert (
        tensor.data.size == 512 + 64 + 8
    )  # 501 and 16 bytes, each padded to a multiple of 64; then two floats
    assert sum(map(int, tensor.data)) == sum(kept)  # whatever is not a part is zero
    assert tensor.data.size == tensor_nbytes("nf4", (13, 77))


def test_empty_and_scalar():
    empty = nf4.quantize(np.empty((0, 4), np.float32))
    assert nf4.dequantize(empty).shape == (0, 4)
    scalar = nf4.quantize(np.float32(0.25).reshape(()))
    assert nf4.dequantize(scalar) == np.float32(0.25)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_without_a_code_is_named(value):
    x = np.zeros((4, 50), np.float32)
    x[2, 31] = value
    with pytest.raises(ValueError, match=f"flat index 131 is {value}, expected a finite number"):
        nf4.quantize(x)


def test_assemble_refuses_parts_of_another_shape():
    made_of = nf4.parts(nf4.quantize(random_weights((4, 64))))
    with pytest.raises(
        ValueError, match=r"shape \[5, 64\] have sizes \(128, 4, 1, 1\), expected \(160, 5, 1, 1\)"
    ):
        nf4.assemble((5, 64), made_of)


def test_hostile_scales_dequantize_without_warnings():
    data = np.full(tensor_nbytes("nf4", (100,)), 0x7F, np.uint8)
    assert nf4.dequantize(Tensor("nf4", (100,), data)).shape == (100,)
