"""Single products of a shape, through a backend: Programs of many linear layers, timed beside one of none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from adaptrt.backends.base import Batch, Executable
from adaptrt.bench.shapes import SHAPES, random_tensor
from adaptrt.bench.work import Work
from adaptrt.model.architecture import TensorSpec
from adaptrt.program import Embed, Linear, Logits, Op, Program
from adaptrt.quant.plain import from_float32
from adaptrt.tensor import Tensor

TOKENS = (1, 8, 16, 64, 512, 2048)
CACHE_BYTES = 400e6  # the weights of one after another are more than any cache holds
PASSES = 4  # over all weights in a step, so that what a step costs by itself hardly counts
STEPS = 5
SETTLE_SECONDS = 0.03
VOCABULARY = 16

Load = Callable[[Program, Mapping[str, Tensor]], Executable]


@dataclass(frozen=True)
class Product:
    """y [tokens, rows] = x [tokens, cols] W^T, W in nf4."""

    name: str
    rows: int
    cols: int

    @property
    def weight_bytes(self) -> float:
        """Codes, an absmax a block of 64, nested scales of 256 of those."""
        return self.rows * self.cols * (1 / 2 + 1 / 64 + 1 / 4096)

    def work(self, tokens: int, run: Callable[[], float]) -> Work:
        """A row of the table: x is read as bfloat16, y written as it."""
        moved = self.weight_bytes + 2 * tokens * (self.rows + self.cols)
        name = f"{self.name} {self.rows} x {self.cols}, M = {tokens}"
        return Work(name, tokens, run, int(moved), 2 * tokens * self.rows * self.cols)

    def copies(self, n_bytes: float) -> int:
        """So many weights of n_bytes each are more than the caches hold, for any that runs on them in turn."""
        return max(2, ceil(CACHE_BYTES / n_bytes))


def products(shape: str) -> list[Product]:
    """The products of a layer, those of one input together, as backends run them."""
    config = SHAPES[shape]
    width, mlp = config["hidden_size"], config["intermediate_size"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    return [
        Product("qkv", width + 2 * kv, width),
        Product("o", width, width),
        Product("gate_up", 2 * mlp, width),
        Product("down", width, mlp),
    ]


def product_works(product: Product, load: Load, page_tokens: int) -> Iterator[Work]:
    """One for each number of tokens."""
    count = PASSES * product.copies(product.weight_bytes)
    full_step, empty_step = (_Steps(load(*layers(product, n)), page_tokens) for n in (count, 0))

    def one(tokens: int) -> float:
        pairs = [(full_step.seconds(tokens), empty_step.seconds(tokens)) for _ in range(STEPS)]
        full, nothing = (statistics.median(times) for times in zip(*pairs, strict=True))
        return float(max(full - nothing, 1e-9)) / count

    for tokens in TOKENS:
        yield product.work(tokens, lambda tokens=tokens: settled(lambda: one(tokens)))  # type: ignore[misc]


def settled(run: Callable[[], float]) -> float:
    """The seconds that `run` returns once it has been running for a while: a GPU's clock rises with its load."""
    until = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < until:
        run()
    return run()


def layers(product: Product, count: int) -> tuple[Program, dict[str, Tensor]]:
    """So many linear layers; they read two registers in turn, since neighbours with one input become one product."""
    rng, weights = np.random.default_rng(0), count // PASSES
    spec = TensorSpec("", "", (product.rows, product.cols), "linear")
    tensors = {f"w{i}": random_tensor(spec, rng) for i in range(weights)}
    for name in ("table", "head"):
        values = rng.standard_normal((VOCABULARY, product.cols), np.float32)
        tensors[name] = from_float32(values, "bf16")
    ops: list[Op] = [Embed(register, "table", f"embed_{register}") for register in "xy"]
    ops += [Linear("out", "xy"[i % 2], f"w{i % weights}", None, f"linear {i}") for i in range(count)]
    ops.append(Logits("x", "head", None, "head"))
    registers = {"x": product.cols, "y": product.cols, "out": product.rows}
    return Program(registers, tuple(ops), {}, VOCABULARY, max(TOKENS)), tensors


class _Steps:
    """Steps of one sequence."""

    def __init__(self, executable: Executable, page_tokens: int) -> None:
        self._executable, self._page_tokens = executable, page_tokens
        executable.reserve(ceil(max(TOKENS) / page_tokens))

    def seconds(self, n_tokens: int) -> float:
        """Of one step."""
        pages = ceil(n_tokens / self._page_tokens)
        arrays = {
            "tokens": np.arange(n_tokens) % VOCABULARY,
            "positions": np.arange(n_tokens),
            "run_start": [0, n_tokens],
            "page_start": [0, pages],
            "pages": np.arange(pages),
            "stack_start": [0, 0],
            "stacks": [],
            "logit_rows": [0],
        }
        batch = Batch(**{name: np.asarray(values, np.int32) for name, values in arrays.items()})
        start = time.perf_counter()
        self._executable.step(batch)
        return time.perf_counter() - start
