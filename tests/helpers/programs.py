"""Small Programs with random tensors, ragged batches and adapters, for comparing backends with the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.normal import Lowered, LoweredAdapter, LowRank
from adaptrt.backends.base import Batch, Executable
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Logits, Norm, Op, Program, Rope, Scale
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import Tensor

Floats = NDArray[np.float32]
VOCABULARY = 11


def random(seed: int, *shape: int, scale: float = 1.0) -> Floats:
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


def model(ops: Iterable[Op], widths: dict[str, int], tensors: dict[str, Tensor], constants=None) -> Model:
    ops = tuple(ops)
    head = tensors[ops[-1].weight]
    return Model(Program(widths, ops, constants or {}, head.shape[0], 1024), tensors)


def probe(
    op_list: list[Op], out: str, widths: dict[str, int], tensors: dict[str, Tensor], constants=None
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


@dataclass(frozen=True)
class Sizes:
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
        ops += [Norm("h", "x", f"{i}.norm1", 1e-5), linear("q", "h", f"{i}.q", bias=True)]
        ops += [linear("k", "h", f"{i}.k"), linear("v", "h", f"{i}.v")]
        ops += [
            Rope("q", sizes.heads, sizes.head_dim, "inv"),
            Rope("k", sizes.kv_heads, sizes.head_dim, "inv"),
        ]
        shape = (i, sizes.heads, sizes.kv_heads, sizes.head_dim)
        ops += [Attention("a", "q", "k", "v", *shape, scale=sizes.head_dim**-0.5, softcap=20.0 * i)]
        ops += [linear("o", "a", f"{i}.o"), Scale("o", "o", 0.7, 30.0 * i), Add("x", "x", "o")]
        ops += [
            Norm("h", "x", f"{i}.norm2", 1e-5),
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
    tensors[name] = from_float32(random(seed + 31 * len(tensors), rows, cols, scale=cols**-0.5), dtype)
    return name


def adapter(
    made: Model, seed: int, dtype: str = "f32", rank: int = 5, skip: Sequence[str] = ()
) -> LoweredAdapter:
    """An adapter with everything the normal form has, on every target but `skip`."""
    lowered: dict[str, Lowered] = {}
    for i, op in enumerate(made.program.ops):
        if not isinstance(op, Embed | Linear | Logits) or op.target in skip:
            continue
        out, inner = made.tensors[op.weight].shape
        if isinstance(op, Embed):
            out, inner = inner, out
        s = 1000 * seed + 10 * i
        terms = [term(s, out, inner, rank, dtype), term(s + 3, out, inner, 2 * rank + 1, dtype, with_d=True)]
        gains = {} if isinstance(op, Embed) else {"g_in": 1 + random(s + 7, inner, scale=0.1)}
        lowered[op.target] = Lowered(
            tuple(terms), g_out=1 + random(s + 8, out, scale=0.1), c=random(s + 9, out, scale=0.1), **gains
        )
    return lowered


def term(seed: int, out: int, inner: int, rank: int, dtype: str, with_d: bool = False) -> LowRank:
    u = from_float32(random(seed, out, rank, scale=0.3 * rank**-0.5), dtype)
    v = from_float32(random(seed + 1, rank, inner, scale=inner**-0.5), dtype)
    return LowRank(u, v, 0.8, 1 + random(seed + 2, rank, scale=0.5) if with_d else None)


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
        return [self.free.pop() for _ in range(-(-n_tokens // self.page_tokens))]


def batch(runs: Sequence[Run]) -> Batch:
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
