"""Every kind of term and vector of the adapter normal form on the CPU, against the numpy reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.isas import FLOAT_ISAS, ISAS, load_on_cpu

from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import Lowered
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.reference import ReferenceBackend
from adaptrt.program import Embed, Linear, Logits, Norm
from adaptrt.quant.plain import from_float32
from adaptrt.testing.programs import (
    DTYPES,
    VOCABULARY,
    Model,
    Pages,
    Run,
    Sizes,
    adapter,
    batch,
    decoder,
    dense,
    divisors,
    everything,
    kronecker,
    low_rank,
    probe,
    random,
    relative_error,
    rotation,
    run_tokens,
    sparse,
    weight,
)
from adaptrt.testing.programs import model as made

EXACT = 4e-6  # float32 sums of a few hundred products in another order
OPTIONS = LoadOptions(threads=2, precision="exact", page_tokens=32, kv_dtype="f32")
STEPS = (1, 2, 5, 8, 17)


def load(model: Model, **options: Any) -> Any:
    return load_on_cpu(model, OPTIONS, **options)


def product(rows: int, cols: int, dtype: str = "f32", bias: bool = False) -> Model:
    """One linear layer `w`; in place when it is square."""
    tensors = {}
    weight("w", rows, cols, dtype, tensors, seed=rows)
    if bias:
        tensors["b"] = from_float32(random(9, rows), "bf16")
    out, widths = ("x", {"x": cols}) if rows == cols else ("out", {"x": cols, "out": rows})
    return probe([Linear(out, "x", "w", "b" if bias else None, "w")], out, widths, tensors)


def compare(model: Model, lowered: dict[str, Lowered], tolerance: float, steps=STEPS, **options: Any) -> None:
    """The same stack, the adapter twice, on both backends."""
    found = load(model, **options)
    expected = ReferenceBackend().load(model.program, model.tensors, replace(OPTIONS, **options))
    stacks = [[executable.attach(lowered)] * 2 for executable in (found, expected)]
    for n_tokens in steps:
        tokens = np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens).tolist()
        results = [
            run_tokens(executable, tokens, OPTIONS.page_tokens, stack)
            for executable, stack in zip((found, expected), stacks, strict=True)
        ]
        assert relative_error(*results, size=1.0) < tolerance


def middle(n: int) -> int:
    return divisors(n)[len(divisors(n)) // 2]


LOW_RANK: dict[str, Callable[[AttachPoint, str], Any]] = {
    "plain": lambda at, dtype: low_rank(1, at, 3, dtype),
    "vectors": lambda at, dtype: low_rank(2, at, 16, dtype, d=True, e=True),
    "float U": lambda at, dtype: low_rank(3, at, 5, dtype, u_dtype="bf16", e=True),
    "float V": lambda at, dtype: low_rank(4, at, 33, "f16", u_dtype=dtype, d=True),
    "dense": lambda at, dtype: dense(5, at, dtype),
    "dense with vectors": lambda at, dtype: dense(6, at, dtype, vectors=True),
}
FLOATS_ONLY: dict[str, Callable[[AttachPoint, str], Any]] = {
    "leading part": lambda at, dtype: low_rank(7, at, 9, dtype, beyond=7),
    "leading part of whole blocks": lambda at, dtype: low_rank(8, at, 9, dtype, beyond=64, e=True),
    "leading columns": lambda at, dtype: dense(9, at, dtype, beyond=3),
    "kronecker": lambda at, dtype: kronecker(10, at, dtype, middle(at.out), middle(at.inner)),
    "kronecker, W1 is a number": lambda at, dtype: kronecker(11, at, dtype, 1, 1),
    "kronecker, W2 is a number": lambda at, dtype: kronecker(12, at, dtype, at.out, at.inner),
    "kronecker, blocks of 64": lambda at, dtype: kronecker(13, at, dtype, at.out, max(1, at.inner // 64)),
}
SHAPES = [(64, 128), (65, 75), (48, 192), (31, 64), (130, 70), (64, 64), (1, 1)]


@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms(isa: str, dtype: str) -> None:
    makers = LOW_RANK if dtype in ("int8", "nf4") else LOW_RANK | FLOATS_ONLY
    for rows, cols in SHAPES:
        model, at = product(rows, cols, bias=rows == 65), AttachPoint("linear", rows, cols)
        for make in makers.values():
            if at.inner % 64 and make is FLOATS_ONLY["kronecker, blocks of 64"]:
                continue
            compare(model, {"w": Lowered((make(at, dtype),))}, EXACT, isa=isa)


@pytest.mark.parametrize("isa", FLOAT_ISAS)
def test_sparse_terms_and_vectors(isa: str) -> None:
    for rows, cols in SHAPES:
        model, at = product(rows, cols, "nf4", bias=True), AttachPoint("linear", rows, cols)
        lowered = [Lowered((sparse(1, at, density),)) for density in (0.0, 0.02, 0.4, 1.0)]
        lowered += [
            Lowered(g_in=random(2, cols), rotation=rotation(3, cols, block)) for block in divisors(cols)[:8]
        ]
        gains = {"g_out": random(4, rows), "c": random(5, rows)}
        lowered += [Lowered(**gains, scales_bias=scales) for scales in (False, True)]
        for one in lowered:
            compare(model, {"w": one}, 1e-5, steps=(1, 6), isa=isa)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_wide_terms_in_fast(dtype: str) -> None:
    """Factors between two vectors are multiplied as int8: their rounding shows, and stays below 1e-2."""
    for rows, cols, rank in ((64, 128, 128), (65, 192, 256), (31, 64, 192), (130, 320, 64)):
        model, at = product(rows, cols), AttachPoint("linear", rows, cols)
        for beyond in (0, 64, 7):
            term = low_rank(1, at, rank, dtype, beyond=beyond, d=True, e=True)
            adapted = {"w": Lowered((term,))}
            compare(model, adapted, 1e-2, isa="avx512_vnni", precision="fast")
            if (cols + beyond) % 64 == 0:
                with pytest.raises(AssertionError):
                    compare(model, adapted, 5e-4, steps=(5,), isa="avx512_vnni", precision="fast")


def test_a_wide_term_that_is_not_finite_is_taken_as_it_is() -> None:
    at = AttachPoint("linear", 64, 128)
    term = low_rank(1, at, 128, "f32", d=True, e=True)
    values = term.v.data.view(np.float32).reshape(128, 128).copy()
    values[5, 7] = np.inf
    executable = load(product(64, 128), isa="avx512_vnni", precision="fast")
    handle = executable.attach({"w": Lowered((replace(term, v=from_float32(values, "f32")),))})
    assert not np.isfinite(run_tokens(executable, [1], OPTIONS.page_tokens, [handle])).any()


def test_rotations_in_the_fast_product() -> None:
    for block in (1, 4, 16, 32, 64, 160):
        model = product(96, 320, "nf4")
        term = low_rank(1, AttachPoint("linear", 96, 320), 4, "bf16")
        compare(model, {"w": Lowered((term,), rotation=rotation(2, 320, block))}, 5e-4, precision="fast")


def test_wide_terms_of_few_inputs() -> None:
    """Items of many rows, more than the scratch memory of the inputs would hold."""
    rows, at = 40_000, AttachPoint("head", 40_000, 1)
    tensors = {"table": from_float32(random(1, VOCABULARY, 1), "f32")}
    weight("w", rows, 1, "f32", tensors)
    wide = made([Embed("x", "table", "embed"), Logits("x", "w", None, "w")], {"x": 1}, tensors)
    lowered = Lowered((low_rank(1, at, 2, "bf16", e=True),), g_out=random(2, rows), c=random(3, rows))
    compare(wide, {"w": lowered}, EXACT, steps=(1, 3), threads=1)


def test_rows_of_quantized_v_that_no_kernel_reads() -> None:
    """More blocks in a row than one expansion of scales holds."""
    model, at = product(3, 65600), AttachPoint("linear", 3, 65600)
    for dtype in ("int8", "nf4"):
        compare(model, {"w": Lowered((low_rank(1, at, 2, dtype), dense(2, at, dtype)))}, 2e-5, steps=(2,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: str) -> None:
    for width in (64, 75):
        model, at = probe([], "x", {"x": width}, {}), AttachPoint("embedding", width, VOCABULARY)
        c = {"c": random(1, width), "g_out": random(2, width)}
        terms = [
            low_rank(3, at, 5, dtype, d=True, e=True),
            dense(4, at, dtype, vectors=True),
            sparse(5, at, 0.3),
        ]
        if dtype not in ("int8", "nf4"):
            terms.append(low_rank(6, at, 16, dtype, beyond=3))
        for scales in (False, True):
            lowered = Lowered(tuple(terms), g_in=random(7, VOCABULARY), scales_bias=scales, **c)
            compare(model, {"embed_x": lowered}, EXACT)


def test_norm() -> None:
    tensors = {"n": from_float32(1 + random(1, 77), "f32")}
    model = probe([Norm("x", "x", "n", 1e-3, "n")], "x", {"x": 77}, tensors)
    compare(model, {"n": Lowered(g_out=random(2, 77))}, EXACT)


SIZES = {
    "even": Sizes(layers=1),
    "odd": Sizes(width=75, heads=3, kv_heads=1, head_dim=10, mlp=43, vocabulary=37, layers=1),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["f32", "nf4"])
def test_everything_in_a_mixed_batch(isa: str, size: str, dtype: str) -> None:
    model = decoder(SIZES[size], dtype)
    adapters = [everything(model, 1), everything(model, 2), adapter(model, 3)]
    stacks, lengths = [(), (0,), (1, 0, 2), (1,), (1,), (2, 1)], [1, 6, 3, 9, 2, 1]
    results = {}
    for name, tolerance in (("reference", 0.0), ("exact", 2e-4), ("fast", 2e-2)):
        if name == "reference":
            executable = ReferenceBackend().load(model.program, model.tensors, OPTIONS)
        else:
            executable = load(model, isa=isa, precision=name)
        handles = [executable.attach(a) for a in adapters]
        executable.reserve(8)
        pages = Pages(OPTIONS.page_tokens, 8)
        runs = [
            Run([(7 * i + j) % 37 for j in range(length)], 0, pages.take(32), [handles[s] for s in stacks[i]])
            for i, length in enumerate(lengths)
        ]
        first = executable.step(batch(runs))
        more = [Run([i], length, runs[i].pages, runs[i].stack) for i, length in enumerate(lengths)]
        results[name] = np.concatenate([first, executable.step(batch(more))])
        assert not tolerance or relative_error(results[name], results["reference"]) < tolerance


SHARED_PROJECTIONS = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from adaptrt.testing.programs import probe, random, run_tokens
from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cpu import CpuBackend
from adaptrt.program import Linear
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import Tensor
tall, rank = 100_000, 128
model = probe([Linear("y", "x", "w", None, "w")], "y", {"x": 8, "y": 64}, {"w": from_float32(random(1, 64, 8), "f32")})
u, v = Tensor.from_numpy(random(1, tall, rank)), Tensor.from_numpy(random(2, rank, tall))
loaded = CpuBackend().load(model.program, model.tensors, LoadOptions(threads=1))
run_tokens(loaded, [1], 32)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 3 * u.data.nbytes,) * 2)
one = run_tokens(loaded, [1], 32, [loaded.attach({"w": Lowered((LowRank(u, v, 1.0, e=np.ones(64, np.float32)),))})])
for i in range(50):
    e = np.full(64, i, np.float32)
    handle = loaded.attach({"w": Lowered((LowRank(u, v, 1.0, e=e),))})
print((run_tokens(loaded, [1], 32) * -48 + one * 49 - run_tokens(loaded, [1], 32, [handle]))[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to limit memory precisely"
)
def test_fifty_adapters_share_one_projection() -> None:
    """Each would need a copy of U of 51 MB; memory allows three."""
    command = [sys.executable, "-c", SHARED_PROJECTIONS, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.fromstring(done.stdout.strip().strip("[]"), sep=" ")).max() < 1e-2
