"""bitsandbytes' NF4 products and cuBLAS's bfloat16 ones, product by product: CUDA graphs over weights in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from adaptrt.bench.products import TOKENS, Product, settled
from adaptrt.bench.work import Work

PACKAGE = "bitsandbytes"
REPLAYS = 12


def works(product: Product, device: str) -> Mapping[str, Iterator[Work]]:
    """By library, one for each number of tokens, named as ours are."""
    torch, bnb = import_module("torch"), import_module("bitsandbytes")
    weight = torch.randn(product.rows, product.cols, device=device, dtype=torch.bfloat16) * 0.02
    quantized = [
        bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        for _ in range(product.copies(product.weight_bytes))
    ]
    dense = [weight.clone() for _ in range(product.copies(2 * product.rows * product.cols))]

    def nf4(x: Any) -> int:
        for codes, state in quantized:
            bnb.matmul_4bit(x, codes.t(), quant_state=state)
        return len(quantized)

    def bf16(x: Any) -> int:
        for one in dense:
            torch.nn.functional.linear(x, one)
        return len(dense)

    return {
        "bitsandbytes": _each(product, device, nf4),
        "cuBLAS bf16": _each(product, device, bf16),
    }


def _each(product: Product, device: str, multiply: Callable[[Any], int]) -> Iterator[Work]:
    torch = import_module("torch")
    for tokens in TOKENS:
        x = torch.randn(tokens, product.cols, device=device, dtype=torch.bfloat16)
        yield product.work(tokens, _Captured(torch, device, lambda x=x: multiply(x)))  # type: ignore[misc]


class _Captured:
    """Products as a graph. Called, it replays them and returns the seconds of one."""

    def __init__(self, torch: Any, device: str, multiply: Callable[[], int]) -> None:
        self._torch, self._device = torch, device
        self._multiply = multiply  # it holds the memory that the graph reads
        self._stream, self._graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(device):
            with torch.cuda.stream(self._stream):
                multiply()  # libraries set themselves up
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._count = multiply()

    def __call__(self) -> float:
        return settled(self._replayed)

    def _replayed(self) -> float:
        cuda = self._torch.cuda
        times: list[float] = []
        with cuda.device(self._device), cuda.stream(self._stream):
            for _ in range(REPLAYS):
                start, end = (cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                self._graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1000 / self._count)
        return statistics.median(times)
