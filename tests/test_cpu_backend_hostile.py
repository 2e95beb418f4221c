"""Impossible arguments to the native ABI: each is refused with one line that names it, and nothing crashes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptrt.adapters.normal import Kronecker, Lowered, LowRank, Sparse, Term
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cpu import CpuBackend
from adaptrt.backends.native import ProgramStructs
from adaptrt.errors import BackendError, ClosedError
from adaptrt.quant.plain import from_float32
from adaptrt.testing.programs import Run, adapter, batch, decoder, random, run_tokens

OPTIONS = LoadOptions(threads=2, precision="exact", page_tokens=4)
MODEL = decoder()
OPS = [type(op).__name__ for op in MODEL.program.ops]
HUGE = 2**62


@pytest.fixture(scope="module")
def calls() -> Any:
    return CpuBackend()._calls()


def refused(function: Callable[[], Any], message: str) -> None:
    with pytest.raises(BackendError) as caught:
        function()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def try_load(calls: Any, change: Callable[[Any, Any], None], message: str) -> None:
    """Change the C structs of a good program, then load it."""
    loaded = ProgramStructs(calls, MODEL.program, MODEL.tensors)
    options = calls.ffi.new(
        "adrt_options *", {"threads": 1, "kv_dtype": calls.lib.ADRT_F16, "page_tokens": 4}
    )
    change(loaded.program, options)
    out = calls.ffi.new("adrt_executable **")
    refused(lambda: calls("load", loaded.program, options, out), message)
    assert out[0] == calls.ffi.NULL


def set_op(kind: str, /, **fields: Any) -> Callable[[Any, Any], None]:
    def change(program: Any, _: Any) -> None:
        for name, value in fields.items():
            setattr(program.ops[OPS.index(kind)], name, value)

    return change


def set_tensor(index: int, /, **fields: Any) -> Callable[[Any, Any], None]:
    def change(program: Any, _: Any) -> None:
        for name, value in fields.items():
            setattr(program.tensors[index], name, value)

    return change


def set_program(**fields: Any) -> Callable[[Any, Any], None]:
    return lambda program, _: [setattr(program, name, value) for name, value in fields.items()] and None


def set_options(**fields: Any) -> Callable[[Any, Any], None]:
    return lambda _, options: [setattr(options, name, value) for name, value in fields.items()] and None


LOADS = {
    "no ops": (set_program(n_ops=0), "impossible program"),
    "negative registers": (set_program(n_registers=-1), "impossible program"),
    "too many targets": (set_program(n_targets=10**6), "impossible program"),
    "one target more": (set_program(n_targets=len(MODEL.program.targets) + 1), "named by no op"),
    "one target fewer": (set_program(n_targets=len(MODEL.program.targets) - 1), "out of range"),
    "program cut short": (
        set_program(n_ops=len(OPS) - 1, n_targets=len(MODEL.program.targets) - 1),
        "LOGITS must be the last",
    ),
    "fewer tensors": (set_program(n_tensors=3), "tensor"),
    "fewer registers": (set_program(n_registers=3), "register"),
    "unknown kind": (set_op("Norm", kind=77), "unknown kind 77"),
    "register out of range": (set_op("Norm", a=1000), "register 1000"),
    "register negative": (set_op("Linear", out=-5), "register -5 of"),
    "register of another width": (set_op("Linear", a=7), "expected"),
    "read before written": (set_op("Norm", a=1), "read before it is written"),
    "weight missing": (set_op("Linear", weight=-1), "tensor -1"),
    "bias of another size": (set_op("Linear", bias=0), "bias"),
    "target twice": (set_op("Linear", target=0), "named twice"),
    "target out of range": (set_op("Embed", target=99), "out of range"),
    "odd head": (set_op("Rope", head_dim=33), "odd"),
    "no heads": (set_op("Rope", heads=0), "impossible 0 heads"),
    "heads overflow": (set_op("Rope", heads=2**31 - 1, head_dim=2**31 - 2), "tensor"),
    "KV heads do not divide": (set_op("Attention", kv_heads=3), "impossible 4 heads"),
    "head_dim huge": (set_op("Attention", head_dim=2**31 - 1), "wide"),
    "layer negative": (set_op("Attention", layer=-1), "layer -1"),
    "layer twice": (set_op("Attention", layer=1), "belongs to op"),
    "unknown activation": (set_op("Gated", mode=9), "activation 9"),
    "unknown dtype": (set_tensor(0, dtype=42), "unknown dtype 42"),
    "dtype negative": (set_tensor(0, dtype=-1), "unknown dtype -1"),
    "bytes short": (set_tensor(1, bytes=100), "needs"),
    "bytes overflow": (set_tensor(1, rows=HUGE, cols=HUGE), "impossible shape"),
    "rows overflow": (set_tensor(1, rows=HUGE // 2, cols=8), "impossible shape"),
    "rows zero": (set_tensor(1, rows=0), "impossible shape"),
    "cols negative": (set_tensor(1, cols=-4), "impossible shape"),
    "no threads": (set_options(threads=0), "0 threads"),
    "threads without end": (set_options(threads=10**9), "threads"),
    "KV in bf16": (set_options(kv_dtype=2), "expected f16 or f32"),
    "page not a power of two": (set_options(page_tokens=12), "power of two"),
    "page huge": (set_options(page_tokens=1 << 30), "power of two"),
    "unknown precision": (set_options(precision=3), "precision 3"),
    "unknown instruction set": (set_options(isa=9), "instruction set 9"),
    "a limit of GPU memory": (
        set_options(gpu_memory=5),
        "5 bytes of GPU memory are allowed, but the CPU has none",
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_load_refuses(calls: Any, name: str) -> None:
    try_load(calls, *LOADS[name])


def test_load_refuses_null_and_unaligned_data(calls: Any) -> None:
    def shift(program: Any, _: Any) -> None:
        program.tensors[1].data = calls.ffi.cast(
            "void *", int(calls.ffi.cast("uintptr_t", program.tensors[1].data)) + 1
        )

    try_load(calls, shift, "not aligned")
    try_load(calls, set_tensor(1, data=calls.ffi.NULL), "NULL")
    try_load(calls, set_program(ops=calls.ffi.NULL), "NULL")
    refused(lambda: calls("load", calls.ffi.NULL, calls.ffi.NULL, calls.ffi.NULL), "NULL")


@pytest.fixture(scope="module")
def executable() -> Any:
    loaded = CpuBackend().load(MODEL.program, MODEL.tensors, OPTIONS)
    loaded.reserve(8)
    loaded.attach(adapter(MODEL, 1))
    loaded.detach(loaded.attach(adapter(MODEL, 2)))  # handle 1 is stale
    return loaded


GOOD = [Run([1, 2, 3, 4, 5], 0, [0, 1], (0,)), Run([6], 3, [2])]


def changed(name: str, index: int, value: int) -> Any:
    made = copy.deepcopy(batch(GOOD))
    getattr(made, name)[index] = value
    return made


BATCHES = {
    "token too large": (changed("tokens", 2, 101), "token 2 is 101, the vocabulary has 101"),
    "token negative": (changed("tokens", 0, -1), "token 0 is -1"),
    "position negative": (changed("positions", 5, -3), "position -3"),
    "positions jump": (changed("positions", 1, 7), "position 7, expected 1"),
    "position beyond the pages": (changed("positions", 5, 4), "needs 2 KV pages"),
    "position huge": (changed("positions", 5, 2**31 - 1), "KV pages"),
    "page not reserved": (changed("pages", 0, 8), "KV page 8 is not reserved, 8 pages are"),
    "page negative": (changed("pages", 2, -1), "KV page -1"),
    "run starts late": (changed("run_start", 0, 1), "run_start[0] is 1"),
    "run ends beyond": (changed("run_start", 2, 7), "run_start ends at 7, expected 6"),
    "runs go back": (changed("run_start", 1, 8), "less than"),
    "pages go back": (changed("page_start", 1, -1), "less than"),
    "pages start late": (changed("page_start", 0, 2), "page_start[0] is 2"),
    "stacks go back": (changed("stack_start", 1, 3), "less than"),
    "unknown handle": (changed("stacks", 0, 9), "no adapter with handle 9"),
    "negative handle": (changed("stacks", 0, -1), "no adapter with handle -1"),
    "stale handle": (changed("stacks", 0, 1), "no adapter with handle 1"),
    "logit row beyond": (changed("logit_rows", 0, 6), "logit row 0 is token 6 of 6"),
    "logit row negative": (changed("logit_rows", 1, -1), "logit row 1 is token -1"),
    "no tokens": (batch([]), "0 tokens"),
    "fewer positions": (
        replace(batch(GOOD), positions=np.zeros(2, np.int32)),
        "positions has 2 items, expected 6",
    ),
    "fewer pages": (replace(batch(GOOD), pages=np.zeros(1, np.int32)), "pages has 1 items, expected 3"),
    "fewer stacks": (replace(batch(GOOD), stacks=np.zeros(0, np.int32)), "stacks has 0 items, expected 1"),
    "fewer starts": (replace(batch(GOOD), page_start=np.zeros(2, np.int32)), "number of runs + 1"),
    "tokens beyond int32": (replace(batch(GOOD), tokens=np.full(6, 2**40)), "fit into int32"),
    "tokens not whole": (replace(batch(GOOD), tokens=np.zeros(6, np.float32)), "fit into int32"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_step_refuses_and_still_works(executable: Any, name: str) -> None:
    before = executable.step(batch(GOOD))
    hostile, message = BATCHES[name]
    refused(lambda: executable.step(hostile), message)
    np.testing.assert_array_equal(executable.step(batch(GOOD)), before)


def test_random_batches_never_crash(executable: Any) -> None:
    rng = np.random.default_rng(0)
    names = ("tokens", "positions", "run_start", "page_start", "pages", "stack_start", "stacks", "logit_rows")
    refusals = 0
    for _ in range(2000):
        made = copy.deepcopy(batch(GOOD))
        for _ in range(rng.integers(1, 4)):
            array = getattr(made, names[rng.integers(len(names))])
            array[rng.integers(len(array))] = rng.choice([rng.integers(-3, 12), -(2**31), 2**31 - 1])
        try:
            executable.step(made)
        except BackendError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert 1000 < refusals < 2000


def lowered(u: tuple[int, int], v: tuple[int, int], dtype: str = "f32", **fields: Any) -> dict[str, Lowered]:
    term = LowRank(
        from_float32(random(1, *u), dtype), from_float32(random(2, *v), dtype), fields.pop("scale", 1.0)
    )
    return {fields.pop("target", "0.k"): Lowered((term,), **fields)}


PLAIN = LowRank(from_float32(random(1, 64, 4), "f32"), from_float32(random(2, 4, 128), "f32"), 1.0)


def one_term(term: Term, target: str = "0.k") -> dict[str, Lowered]:
    return {target: Lowered((term,))}


def csr(row_start: list[int], columns: list[int]) -> Sparse:
    return Sparse(np.array(row_start, np.int32), np.array(columns, np.int32), random(1, len(columns)), 1.0)


def kronecker_of(w1: tuple[int, int], w2: tuple[int, int], dtype: str = "f32") -> Kronecker:
    return Kronecker(from_float32(random(1, *w1), dtype), from_float32(random(2, *w2), dtype), 1.0)


ATTACHMENTS = {
    "U too short": (lowered((63, 4), (4, 128)), "do not fit [64, rank] [rank, 128]"),
    "V too narrow": (lowered((64, 4), (4, 127)), "do not fit"),
    "ranks differ": (lowered((64, 4), (5, 128)), "do not fit"),
    "U in int8, not transposed": (lowered((64, 4), (4, 128), "int8"), "do not fit"),
    "U in int8, too tall": (lowered((4, 65), (4, 128), "int8"), "do not fit"),
    "V in nf4, too wide": (lowered((4, 64), (4, 192), "nf4"), "do not fit"),
    "no U": (
        one_term(LowRank(None, from_float32(random(1, 63, 128), "bf16"), 1.0)),
        "no U [0, 0] and bf16 V",
    ),
    "d": (one_term(replace(PLAIN, d=random(1, 5))), "d is [5], expected [4]"),
    "e": (one_term(replace(PLAIN, e=random(1, 63))), "e is [63], expected [64]"),
    "row starts too few": (one_term(csr([0, 1], [3])), "row_start is [2], expected [65]"),
    "row starts late": (one_term(csr([1] * 65, [3])), "row_start[0] is 1"),
    "rows fall": (one_term(csr([0, 2, 1] + [2] * 62, [3, 4])), "row_start[2] is 1 after 2"),
    "rows beyond the values": (one_term(csr([0] + [2**31 - 1] * 64, [3])), "of 1 values"),
    "rows end early": (one_term(csr([0] * 65, [3])), "64 rows end at value 0 of 1"),
    "column negative": (one_term(csr([0] + [1] * 64, [-1])), "column -1"),
    "column beyond": (one_term(csr([0] + [1] * 64, [128])), "column 128 after -1, of 128"),
    "columns fall": (one_term(csr([0] + [2] * 64, [4, 4])), "column 4 after 4"),
    "column of a table": (one_term(csr([0] + [1] * 101, [128]), "embed"), "of 128 columns"),
    "fewer values": (
        one_term(replace(csr([0] + [1] * 64, [3]), values=random(1, 2))),
        "values is [2], expected [1]",
    ),
    "kronecker of another size": (
        one_term(kronecker_of((8, 8), (8, 17))),
        "do not make a product of [64, 128]",
    ),
    "kronecker in int8": (one_term(kronecker_of((8, 64), (8, 2), "int8")), "adapter W1 of term 0 is int8"),
    "kronecker of a table": (one_term(kronecker_of((8, 101), (16, 1)), "embed"), "takes no Kronecker"),
    "rotation that does not divide": (
        {"0.k": Lowered(rotation=random(1, 3, 40, 40))},
        "expected [128/b, b, b]",
    ),
    "rotation of a table": ({"embed": Lowered(rotation=random(1, 101, 1, 1))}, "an embedding"),
    "norm with c": ({"0.norm1": Lowered(c=random(1, 128))}, "a norm, which takes g_out"),
    "norm with a term": (one_term(csr([0] * 129, []), "0.norm1"), "a norm, which takes g_out"),
    "scale is NaN": (lowered((64, 4), (4, 128), scale=float("nan")), "scale nan"),
    "unknown target": (lowered((64, 4), (4, 128), target="9.k"), "9.k"),
    "g_in": (lowered((64, 4), (4, 128), g_in=random(0, 127)), "g_in is [127], expected [128]"),
    "g_out": (lowered((64, 4), (4, 128), g_out=random(0, 65)), "g_out is [65], expected [64]"),
    "c": (lowered((64, 4), (4, 128), c=random(0, 1)), "c is [1], expected [64]"),
}


@pytest.mark.parametrize("name", ATTACHMENTS)
def test_attach_refuses(executable: Any, name: str) -> None:
    hostile, message = ATTACHMENTS[name]
    refused(lambda: executable.attach(hostile), message)


def test_native_attach_refuses_what_python_cannot_say(executable: Any, calls: Any) -> None:
    handle, native = calls.ffi.new("int32_t *"), executable._executable

    def attach(*attachments: dict[str, Any], n: int | None = None) -> Callable[[], None]:
        array = calls.ffi.new("adrt_attachment[]", list(attachments) or 1)
        return lambda: calls("attach", native, len(attachments) if n is None else n, array, handle)

    refused(attach({"target": 3}, {"target": 3}), "given twice")
    refused(attach({"target": -1}), "out of range")
    refused(attach({"target": 2, "n_terms": 1}), "1 terms, NULL")
    refused(attach({"target": 2, "n_terms": -1}), "-1 terms")
    refused(attach(n=-1), "-1 attachments")

    floats = calls.ffi.new("float[]", 2**14)
    norm, linear = (executable._loaded.targets[name] for name in ("0.norm1", "0.k"))
    unaligned = calls.ffi.cast("float *", int(calls.ffi.cast("uintptr_t", floats)) + 2)
    for block in (0, -128, 129, 7, HUGE):
        refused(attach({"target": linear, "rotation": floats, "rotation_block": block}), f"blocks of {block}")
    refused(attach({"target": norm, "rotation": floats, "rotation_block": 128}), "g_out and nothing else")
    refused(attach({"target": linear, "g_out": unaligned}), "not aligned")

    def term(**fields: Any) -> Callable[[], None]:
        array = calls.ffi.new("adrt_term[]", [fields])
        return attach({"target": linear, "n_terms": 1, "terms": array})

    starts, columns = calls.ffi.new("int32_t[]", [0, *[1] * 64]), calls.ffi.new("int32_t[]", [3])
    sparse = {"kind": 1, "n_values": 1, "row_start": starts, "columns": columns, "values": floats}
    term(**sparse)()
    calls("detach", native, handle[0])
    for field in ("row_start", "columns", "values"):
        refused(term(**sparse | {field: calls.ffi.NULL}), f"{field} is NULL")
    refused(term(**sparse | {"values": unaligned}), "values is not aligned")
    refused(term(**sparse | {"n_values": -1}), "impossible -1 values")
    refused(term(**sparse | {"n_values": 2**31}), "impossible 2147483648 values")
    v = {"dtype": 0, "rows": 4, "cols": 128, "data": floats, "bytes": 2048}
    refused(term(kind=9, v=v), "unknown kind 9")
    refused(term(), "impossible shape [0, 0]")
    refused(term(v=v), "no U [0, 0]")
    refused(term(v=v | {"bytes": 2047}), "needs 2048 bytes, got 2047")
    refused(term(v=v | {"data": calls.ffi.NULL}), "NULL")
    refused(term(v=v, d=unaligned), "d is not aligned")
    factors = {"kind": 2, "u": v | {"rows": HUGE, "cols": 1, "bytes": 0}, "v": v}
    refused(term(**factors), "impossible shape")


def random_attachment(calls: Any, rng: np.random.Generator, keep: list[Any]) -> Any:
    """One attachment of some numbers that are wrong; its arrays are large enough for every target."""

    def array(ctype: str, values: Any) -> Any:
        keep.append(calls.ffi.new(ctype, values))
        return keep[-1]

    floats = array("float[]", 2**15)
    rows, cols = (64, 128) if rng.random() < 0.8 else (128, 64)
    f32 = {"dtype": 0, "data": floats}
    low_rank = {"u": f32 | {"rows": rows, "cols": 4, "bytes": 16 * rows}, "d": floats, "e": floats}
    low_rank |= {"v": f32 | {"rows": 4, "cols": cols, "bytes": 16 * cols}, "scale": 1.0}
    starts = array("int32_t[]", [min(i, 40) for i in range(256)])
    columns = array("int32_t[]", [3] * 40)
    sparse = {"kind": 1, "n_values": 40, "row_start": starts, "columns": columns, "values": floats}
    w1, w2 = f32 | {"rows": 8, "cols": 4, "bytes": 128}, f32 | {"rows": 8, "cols": 32, "bytes": 1024}
    terms = array("adrt_term[]", [low_rank, sparse, {"kind": 2, "u": w1, "v": w2}])
    wrong = [1 - 2**31, -1, 0, 1, 2, 3, 4, 63, 129, 2**31 - 1]
    for _ in range(rng.integers(0, 3)):
        term, value = terms[rng.integers(3)], int(rng.choice(wrong))
        place = rng.integers(6)
        if place < 2:
            setattr(term.u if place else term.v, rng.choice(["dtype", "rows", "cols", "bytes"]), abs(value))
        elif place == 2:
            starts[rng.integers(130)] = value
        elif place == 3:
            columns[rng.integers(40)] = value
        else:
            setattr(term, ("kind", "n_values")[place % 2], value)
    block = int(
        rng.choice([1, 2, 16, 64, 3, 0, -1, 2**31 - 1], p=[0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05])
    )
    vectors = dict.fromkeys(("g_in", "rotation", "g_out", "c"), floats)
    first, n = int(rng.integers(3)), int(rng.integers(0, 2))
    chosen = calls.ffi.addressof(terms, first)
    return {
        "target": int(rng.integers(-1, 24)),
        "n_terms": n,
        "terms": chosen,
        "rotation_block": block,
    } | vectors


def test_random_attachments_never_crash(executable: Any, calls: Any) -> None:
    rng, handle, accepted = np.random.default_rng(0), calls.ffi.new("int32_t *"), 0
    for _ in range(3000):
        keep: list[Any] = []
        array = calls.ffi.new("adrt_attachment[]", [random_attachment(calls, rng, keep)])
        try:
            calls("attach", executable._executable, 1, array, handle)
        except BackendError as error:
            assert "\n" not in str(error)
            continue
        executable.step(batch([Run([1, 2, 3], 0, [3], [handle[0]])]))
        calls("detach", executable._executable, handle[0])
        accepted += 1
    assert 300 < accepted < 2700


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from adaptrt.testing.programs import decoder, run_tokens
from adaptrt.backends.base import LoadOptions
from adaptrt.backends.cpu import CpuBackend
model = decoder()
loaded = CpuBackend().load(model.program, model.tensors, LoadOptions(threads=2, page_tokens=65536))
before = run_tokens(loaded, [1, 2, 3], 65536)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 200_000_000,) * 2)
try:
    loaded.reserve(1000)
except Exception as error:
    print(error)
assert (run_tokens(loaded, [1, 2, 3], 65536) == before).all()
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to limit memory precisely"
)
def test_pages_that_memory_cannot_hold_are_refused_and_the_rest_stays() -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no memory for KV page" in done.stdout


def test_unknown_handles_and_closed_executables() -> None:
    loaded = CpuBackend().load(MODEL.program, MODEL.tensors, OPTIONS)
    handle = loaded.attach(adapter(MODEL, 3))
    loaded.detach(handle)
    refused(lambda: loaded.detach(handle), f"no adapter with handle {handle}")
    refused(lambda: loaded.detach(-1), "no adapter with handle -1")
    loaded.close()
    loaded.close()
    with pytest.raises(ClosedError):
        loaded.step(batch(GOOD))


def test_shared_tensors_survive_the_detaching_of_one_adapter(executable: Any) -> None:
    """Two adapters that share U and V: detaching one leaves the other's copy alone."""
    shared = adapter(MODEL, 4)
    first, second = executable.attach(shared), executable.attach(dict(shared))
    expected = run_tokens(executable, [3, 1], 4, [second])
    executable.detach(first)
    np.testing.assert_array_equal(run_tokens(executable, [3, 1], 4, [second]), expected)
    executable.detach(second)


def test_nan_weights_and_activations_do_not_crash() -> None:
    tensors = dict(MODEL.tensors)
    poisoned = random(0, *tensors["0.norm1"].shape)
    poisoned[3] = np.nan
    tensors["0.norm1"] = from_float32(poisoned, "f32")
    for precision in ("exact", "fast"):
        loaded = CpuBackend().load(MODEL.program, tensors, replace(OPTIONS, precision=precision))
        assert np.isnan(run_tokens(loaded, [1, 2, 3], 4)).all()
