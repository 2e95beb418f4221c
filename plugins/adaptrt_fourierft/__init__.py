"""FourierFT (Gao et al., arXiv:2405.03003): W x + scaling · Re(F⁻¹ S) x, the spectrum S having n trained entries.

PEFT does not store where these are: they are the start of a random permutation of torch's, drawn from a seed. What
torch draws is made here from the same Mersenne Twister.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.dense import Floats, dense_term, row_parts
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import (
    Rule,
    any_value,
    finite,
    flag,
    match_ending,
    plain_patterns,
    positive_int,
)
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULTS = {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777}
SMALL = (
    0xFFFFFFFF // 20
)  # below it torch.randperm draws 32 bits a step and from the front, above 64 and from the back
DRAWS = 1 << 20  # at a time


def _seed(value: object) -> str | None:
    return None if type(value) is int and abs(value) < 1 << 53 else "expected a whole number"


class FourierFtVariant(Variant):
    """FourierFT on linear layers."""

    name = "fourierft"
    options: ClassVar[Mapping[str, Rule]] = {
        "n_frequency": positive_int,
        "n_frequency_pattern": plain_patterns(positive_int),
        "scaling": finite,
        "random_loc_seed": _seed,
        "fan_in_fan_out": flag,  # says how the base stores W
        "init_weights": any_value,  # of the start
    }
    params: ClassVar[Mapping[str, type]] = {"frequencies": int, "scale": float, "seed": float}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {"spectrum": ("frequencies",)}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "FOURIERFT"

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        usual, scaling, seed = (config.get(name, value) for name, value in PEFT_DEFAULTS.items())
        frequencies = match_ending(config.get("n_frequency_pattern"), module.path, usual)
        params = {"frequencies": frequencies, "scale": float(scaling), "seed": seed}
        return params, {"spectrum": "fourierft_spectrum"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """Two ranks a frequency where these cost less than the dense change.

        Raises AdapterError for more frequencies than the weight has entries.
        """
        spectrum = to_float32(tensors["spectrum"])
        out, inner = base.shape
        if len(spectrum) > out * inner:
            raise AdapterError(f"{len(spectrum)} frequencies for a weight of {out * inner} entries")
        places = first_of_permutation(out * inner, len(spectrum), int(params["seed"]))
        scale = float(params["scale"])
        if 2 * len(spectrum) * (out + inner) < out * inner:
            return Lowered(terms=(_low_rank(spectrum, places, out, inner, scale),))
        return Lowered(terms=(dense_term(_inverse(spectrum, places, out, inner), scale),))


def first_of_permutation(size: int, count: int, seed: int) -> NDArray[np.int64]:
    """`torch.randperm(size)[:count]` on the CPU, from a generator of this seed."""
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    if size >= SMALL:
        return _inside_out(size, count, twister)
    draws = twister.randint(0, 1 << 32, min(count, size - 1), np.uint32).tolist()
    moved: dict[int, int] = {}  # where a place holds another number than its own
    first = np.arange(count)
    for i, draw in enumerate(draws):
        place = i + draw % (size - i)
        first[i] = moved.get(place, place)
        moved[place] = moved.get(i, i)
    if count == size:
        first[-1] = moved.get(size - 1, size - 1)
    return first


def _inside_out(size: int, count: int, twister: np.random.RandomState) -> NDArray[np.int64]:
    """Step i moves what is at a place up to i to place i, and puts i there: past `count` only the second matters."""
    first = np.zeros(count, np.int64)
    for start in range(0, size, DRAWS):
        steps = np.arange(start, min(start + DRAWS, size), dtype=np.uint64)
        halves = twister.randint(0, 1 << 32, 2 * len(steps), np.uint32).astype(np.uint64)
        places = ((halves[0::2] << np.uint64(32)) | halves[1::2]) % (steps + np.uint64(1))
        early = max(0, min(count - start, len(steps)))
        for i, place in zip(range(start, start + early), places[:early].tolist(), strict=True):
            first[i] = first[place]
            first[place] = i
        hits = np.flatnonzero(places[early:] < count) + early
        first[places[hits].astype(np.int64)] = steps[hits]  # of two to one place the later stays
    return first


def _low_rank(spectrum: Floats, places: NDArray[np.int64], out: int, inner: int, scale: float) -> LowRank:
    """cos(a + b) = cos a cos b - sin a sin b, a the phase along the outputs and b along the inputs."""
    u = np.ascontiguousarray(_waves(places // inner, out).T)
    v = _waves(places % inner, inner)
    factors = np.concatenate([spectrum, -spectrum]) / np.float32(out * inner)
    return LowRank(Tensor.from_numpy(u), Tensor.from_numpy(v), scale, d=factors)


def _waves(frequencies: NDArray[np.int64], size: int) -> Floats:
    """The cosine, then the sine of every frequency: [2 n, size]."""
    turn = np.arange(size) * (2 * np.pi / size)
    cosine, sine = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
    waves = np.empty((2, len(frequencies), size), np.float32)
    for part in row_parts(len(frequencies), size):
        phase = frequencies[part, None] * np.arange(size) % size
        waves[0, part], waves[1, part] = cosine[phase], sine[phase]
    return waves.reshape(-1, size)


def _inverse(spectrum: Floats, places: NDArray[np.int64], out: int, inner: int) -> Floats:
    """Re(F⁻¹ S) [out, inner]. Row y is the inverse transform of a half spectrum, row out - y its mirror image."""
    rows, columns, values = _folded(spectrum, places // inner, places % inner, out, inner)
    firsts = np.flatnonzero(np.diff(columns, prepend=-1))
    change = np.empty((out, inner), np.float32)
    parts = list(row_parts(out // 2 + 1, inner))
    turn = np.exp(np.arange(out) * (2j * np.pi / out)).astype(np.complex64)
    steps = turn[rows[:, None] * np.arange(parts[0].stop) % out]  # from a part's first row to the others

    def fill(part: slice) -> None:
        size = part.stop - part.start
        waves = steps[:, :size] * (turn[rows * part.start % out] * values)[:, None]
        half = np.zeros((size, inner // 2 + 1), np.complex64)
        half[:, columns[firsts]] = np.add.reduceat(waves, firsts).T
        change[part] = np.fft.irfft(half, inner)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, parts))
    count = (out - 1) // 2  # rows 1 … count again, as rows out - 1, out - 2, …, with their columns mirrored
    rest = change[out - count :][::-1]
    rest[:, 0] = change[1 : count + 1, 0]
    rest[:, 1:] = change[1 : count + 1, :0:-1]
    return change


def _folded(
    spectrum: Floats, rows: NDArray[np.int64], columns: NDArray[np.int64], out: int, inner: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """The entries with those of the right half of the columns turned over into the left one, by columns.

    An entry and its conjugate are half of a real wave each, and the same in the first and the middle column.
    """
    right = columns > inner - columns
    rows, columns = np.where(right, -rows % out, rows), np.where(right, inner - columns, columns)
    alone = (columns == 0) | (2 * columns == inner)
    values = spectrum * np.where(alone, np.float32(1 / out), np.float32(0.5 / out))
    order = np.argsort(columns, kind="stable")
    return rows[order], columns[order], values[order]


@hookimpl
def adaptrt_variants() -> list[FourierFtVariant]:
    """FourierFT."""
    return [FourierFtVariant()]
