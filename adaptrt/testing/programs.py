"""Small Programs with random tensors, ragged batches and adapters, for comparing backends with the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import Kronecker, Lowered, LoweredAdapter, LowRank, Sparse, Term
from adaptrt.backends.base import Batch, Executable, attach_points
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Logits, Norm, Op, Program, Rope, Scale
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import Tensor

Floats = NDArray[np.float32]
Constants = Mapping[str, Floats]
VOCABULARY = 11
DTYPES = ("f32", "f16", "bf16", "int8", "nf4")


def random(seed: int, *shape: int, scale: float = 1.0) -> Floats:
    """Normally distributed float32 values of a seed."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def relative_error(found: Floats, expected: Floats, size: float = 0.0) -> float:
    """Largest error over the tokens, each relative to the token's norm.

    `size` is what a value typically is: a floor under the norm, since a few values may cancel by chance.
    """
    norm = np.maximum(np.linalg.norm(expected, axis=-1), size * expected.shape[-1] ** 0.5)
    return float(np.max(np.linalg.norm(found - expected, axis=-1) / norm))


@dataclass
class Model:
    """A Program and its tensors."""

    program: Program
    tensors: dict[str, Tensor]


def model(
    ops: Iterable[Op], widths: dict[str, int], tensors: dict[str, Tensor], constants: Constants | None = None
) -> Model:
    """A Program of these operations; the last one is Logits, its weight gives the vocabulary."""
    ops = tuple(ops)
    assert isinstance(ops[-1], Logits)
    return Model(Program(widths, ops, constants or {}, tensors[ops[-1].weight].shape[0], 1024), tensors)


def probe(
    op_list: Sequence[Op],
    out: str,
    widths: dict[str, int],
    tensors: dict[str, Tensor],
    constants: Constants | None = None,
) -> Model:
    """Registers x, y, z are embedded from random tables; the logits are register `out` as it is."""
    embedded = [name for name in ("x", "y", "z") if name in widths]
    tables = {
        f"table_{name}": from_float32(random(i, VOCABULARY, widths[name]), "f32")
        for i, name in enumerate(embedded)
    }
    ops: list[Op] = [Embed(name, f"table_{name}", f"embed_{name}") for name in embedded]
    identity = from_float32(np.eye(widths[out], dtype=np.float32), "f32")
    ops += [*op_list, Logits(out, "identity", None, "head")]
    return model(ops, widths, tables | tensors | {"identity": identity}, constants)


OPERATIONS: Mapping[str, tuple[list[Op], str, dict[str, int], tuple[str, int, int] | None]] = {
    # name: operations, output register, register widths, the weight if there is one
    "norm": ([Norm("x", "x", "w", 1e-3)], "x", {"x": 77}, ("w", 1, 77)),
    "silu": ([Gated("z", "x", "y", "silu")], "z", {"x": 77, "y": 77, "z": 77}, None),
    "gelu": ([Gated("x", "x", "y", "gelu_tanh")], "x", {"x": 77, "y": 77}, None),
    "add": ([Add("y", "x", "y")], "y", {"x": 77, "y": 77}, None),
    "scale": ([Scale("x", "x", -2.5)], "x", {"x": 77}, None),
    "cap": ([Scale("y", "x", 3.0, 2.0)], "y", {"x": 77, "y": 77}, None),
    "linear in place": ([Linear("x", "x", "w", None, "w")], "x", {"x": 77}, ("w", 77, 77)),
    "linears that depend": (
        [Linear("y", "x", "w", None, "w"), Linear("x", "y", "w", None, "v")], "x", {"x": 77, "y": 77}, ("w", 77, 77)
    ),
}  # fmt: skip


def operation_model(name: str) -> Model:
    """One of OPERATIONS on random registers."""
    ops, out, widths, shape = OPERATIONS[name]
    tensors: dict[str, Tensor] = {}
    if shape:
        weight(*shape, "f32", tensors)
        if shape[1] == 1:
            tensors["w"] = from_float32(random(3, shape[2]), "f32")
    return probe(ops, out, widths, tensors)


def linear_model(rows: int, cols: int, dtype: str, bias: bool = False) -> Model:
    """One linear layer `w` with a bfloat16 bias or none."""
    tensors: dict[str, Tensor] = {}
    weight("w", rows, cols, dtype, tensors, seed=rows)
    if bias:
        tensors["b"] = from_float32(random(9, rows), "bf16")
    linear = Linear("out", "x", "w", "b" if bias else None, "w")
    return probe([linear], "out", {"x": cols, "out": rows}, tensors)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder."""

    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 192
    vocabulary: int = 101
    layers: int = 2


def decoder(sizes: Sizes = Sizes(), dtype: str = "nf4", head: str = "int8", seed: int = 0) -> Model:
    """A decoder with biases, caps, scales and both activations: every operation of the Program in one model."""
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    widths = {"x": sizes.width, "h": sizes.width, "o": sizes.width, "q": q, "a": q, "k": kv, "v": kv}
    widths |= {"gate": sizes.mlp, "up": sizes.mlp}
    tensors: dict[str, Tensor] = {}
    ops: list[Op] = [Embed("x", weight("embed", sizes.vocabulary, sizes.width, head, tensors), "embed")]

    def linear(out: str, src: str, name: str, bias: bool = False) -> Linear:
        weight(name, widths[out], widths[src], dtype, tensors, seed)
        if bias:
            tensors[f"{name}.bias"] = from_float32(random(seed + len(tensors), widths[out]), "f32")
        return Linear(out, src, name, f"{name}.bias" if bias else None, name)

    for i in range(sizes.layers):
        for norm in (f"{i}.norm1", f"{i}.norm2"):
            tensors[norm] = from_float32(1 + random(seed + len(tensors), sizes.width, scale=0.1), "f32")
        ops += [Norm("h", "x", f"{i}.norm1", 1e-5, f"{i}.norm1"), linear("q", "h", f"{i}.q", bias=True)]
        ops += [linear("k", "h", f"{i}.k"), linear("v", "h", f"{i}.v")]
        ops += [
            Rope("q", sizes.heads, sizes.head_dim, "inv"),
            Rope("k", sizes.kv_heads, sizes.head_dim, "inv"),
        ]
        shape = (i, sizes.heads, sizes.kv_heads, sizes.head_dim)
        ops += [Attention("a", "q", "k", "v", *shape, scale=sizes.head_dim**-0.5, softcap=20.0 * i)]
        ops += [linear("o", "a", f"{i}.o"), Scale("o", "o", 0.7, 30.0 * i), Add("x", "x", "o")]
        ops += [
            Norm("h", "x", f"{i}.norm2", 1e-5, f"{i}.norm2"),
            linear("gate", "h", f"{i}.gate"),
            linear("up", "h", f"{i}.up"),
        ]
        ops += [Gated("gate", "gate", "up", "gelu_tanh" if i % 2 else "silu")]
        ops += [linear("o", "gate", f"{i}.down"), Add("x", "x", "o")]
    weight("head", sizes.vocabulary, sizes.width, head, tensors, seed)
    ops.append(Logits("x", "head", None, "head"))
    half = sizes.head_dim // 2
    return model(ops, widths, tensors, {"inv": (1e4 ** -(np.arange(half) / half)).astype(np.float32)})


def weight(name: str, rows: int, cols: int, dtype: str, tensors: dict[str, Tensor], seed: int = 0) -> str:
    """Add a random weight that keeps the size of what it multiplies; returns its name."""
    tensors[name] = from_float32(random(seed + 31 * len(tensors), rows, cols, scale=cols**-0.5), dtype)
    return name


def adapter(
    made: Model, seed: int, dtype: str = "f32", rank: int = 5, skip: Sequence[str] = ()
) -> LoweredAdapter:
    """An adapter with low-rank terms and every vector the normal form has, on every target but norms and `skip`."""
    lowered: dict[str, Lowered] = {}
    for i, (target, point) in enumerate(attach_points(made.program, made.tensors).items()):
        if point.kind == "norm" or target in skip:
            continue
        s = 1000 * seed + 10 * i
        terms = (
            low_rank(s, point, rank, dtype),
            low_rank(s + 3, point, 2 * rank + 1, dtype, d=True),
        )
        g_in = None if point.kind == "embedding" else 1 + random(s + 7, point.inner, scale=0.1)
        g_out, c = 1 + random(s + 8, point.out, scale=0.1), random(s + 9, point.out, scale=0.1)
        lowered[target] = Lowered(terms, g_in=g_in, g_out=g_out, c=c)
    return lowered


def low_rank(
    seed: int,
    point: AttachPoint,
    rank: int,
    dtype: str,
    *,
    u_dtype: str | None = None,
    beyond: int = 0,
    d: bool = False,
    e: bool = False,
) -> LowRank:
    """U and V of random values; `beyond`: rows and columns more than the attach point has."""
    u_dtype = u_dtype or dtype
    u = random(seed, point.out + beyond, rank, scale=0.3 * rank**-0.5)
    v = random(seed + 1, rank, point.inner + beyond, scale=point.inner**-0.5)
    return LowRank(
        from_float32(np.ascontiguousarray(u.T) if u_dtype in ("int8", "nf4") else u, u_dtype),
        from_float32(v, dtype),
        0.8,
        1 + random(seed + 2, rank, scale=0.5) if d else None,
        1 + random(seed + 3, point.out, scale=0.5) if e else None,
    )


def dense(seed: int, point: AttachPoint, dtype: str, beyond: int = 0, vectors: bool = False) -> LowRank:
    """A dense change of the weight."""
    v = random(seed, point.out, point.inner + beyond, scale=0.3 * point.inner**-0.5)
    d, e = (1 + random(seed + i, point.out, scale=0.5) if vectors else None for i in (1, 2))
    return LowRank(None, from_float32(v, dtype), -0.7, d, e)


def sparse(seed: int, point: AttachPoint, density: float) -> Sparse:
    """Changes of about this share of the weight's entries."""
    rng = np.random.default_rng(seed)
    filled = rng.random(point.weight_shape) < density
    values = random(seed, int(filled.sum()), scale=0.5 * (1 + density * point.inner) ** -0.5)
    row_start = np.cumsum([0, *filled.sum(axis=1)], dtype=np.int32)
    return Sparse(row_start, np.nonzero(filled)[1].astype(np.int32), values, 1.3)


def kronecker(seed: int, point: AttachPoint, dtype: str, a: int, b: int) -> Kronecker:
    """W1 [a, b] and the W2 that completes the attach point."""
    w1 = from_float32(random(seed, a, b, scale=b**-0.5), dtype)
    w2 = from_float32(
        random(seed + 1, point.out // a, point.inner // b, scale=0.3 * (point.inner // b) ** -0.5), dtype
    )
    return Kronecker(w1, w2, 0.9)


def divisors(n: int) -> list[int]:
    """Every divisor, rising."""
    return [i for i in range(1, n + 1) if n % i == 0]


def rotation(seed: int, inner: int, block: int) -> Floats:
    """A map of the input near the identity, [inner / block, block, block]."""
    return np.eye(block, dtype=np.float32) + random(
        seed, inner // block, block, block, scale=0.3 * block**-0.5
    )


def everything(made: Model, seed: int) -> LoweredAdapter:
    """An adapter in which every kind of term and every vector occurs, several at every target."""
    return {
        target: everything_at(1000 * seed + 50 * i, point)
        for i, (target, point) in enumerate(attach_points(made.program, made.tensors).items())
    }


def everything_at(s: int, point: AttachPoint) -> Lowered:
    """Every part that an attach point of this kind takes."""
    g_out = 1 + random(s, point.out, scale=0.1)
    if point.kind == "norm":
        return Lowered(g_out=g_out)
    kind, other = (DTYPES[(s // 50 + i) % 5] for i in (0, 2))
    terms: list[Term] = [
        low_rank(s + 1, point, 3 + s % 7, kind, u_dtype=other, d=True, e=True),
        sparse(s + 5, point, 0.05),
        dense(s + 6, point, other, vectors=s % 100 == 0),
        low_rank(s + 9, point, 17, "bf16", beyond=5),
    ]
    c = random(s + 14, point.out, scale=0.1)
    if point.kind == "embedding":
        return Lowered(tuple(terms), g_in=1 + random(s + 15, point.inner, scale=0.1), g_out=g_out, c=c)
    a, b = (values[len(values) // 2] for values in (divisors(point.out), divisors(point.inner)))
    terms.append(kronecker(s + 16, point, "bf16" if s % 100 else "f32", a, b))
    return Lowered(
        tuple(terms),
        g_in=1 + random(s + 15, point.inner, scale=0.1),
        rotation=rotation(s + 18, point.inner, b),
        g_out=g_out,
        scales_bias=s % 100 == 0,
        c=c,
    )


@dataclass
class Run:
    """Tokens of one sequence from position `start`, its KV pages and its adapter stack."""

    tokens: Sequence[int]
    start: int = 0
    pages: Sequence[int] = ()
    stack: Sequence[int] = ()
    wanted: Sequence[int] | None = None  # indices of tokens whose logits are wanted; None = all


@dataclass
class Pages:
    """Hands out KV pages in a scattered order."""

    page_tokens: int
    n_pages: int
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(5).permutation(self.n_pages).tolist()

    def take(self, n_tokens: int) -> list[int]:
        """Pages for a sequence of n_tokens."""
        return [self.free.pop() for _ in range(-(-n_tokens // self.page_tokens))]


def batch(runs: Sequence[Run]) -> Batch:
    """The runs as one step."""

    def starts(lengths: Iterable[int]) -> NDArray[np.int32]:
        return np.cumsum([0, *lengths], dtype=np.int32)

    def joined(parts: Iterable[Sequence[int]]) -> NDArray[np.int32]:
        return np.array([item for part in parts for item in part], dtype=np.int32)

    run_start = starts(len(run.tokens) for run in runs)
    wanted = [range(len(run.tokens)) if run.wanted is None else run.wanted for run in runs]
    return Batch(
        tokens=joined(run.tokens for run in runs),
        positions=joined(range(run.start, run.start + len(run.tokens)) for run in runs),
        run_start=run_start,
        page_start=starts(len(run.pages) for run in runs),
        pages=joined(run.pages for run in runs),
        stack_start=starts(len(run.stack) for run in runs),
        stacks=joined(run.stack for run in runs),
        logit_rows=joined([first + i for i in rows] for first, rows in zip(run_start, wanted, strict=False)),
    )


def run_tokens(
    executable: Executable, tokens: Sequence[int], page_tokens: int, stack: Sequence[int] = ()
) -> Floats:
    """Logits of one whole sequence in one step."""
    pages = range(-(-len(tokens) // page_tokens))
    executable.reserve(len(pages))
    return executable.step(batch([Run(tokens, 0, pages, stack)]))
