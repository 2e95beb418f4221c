"""llama.cpp through its Python package (`pip install llama-cpp-python`), on IQ4_NL weights of the same shape."""

from __future__ import annotations

import statistics
import time
from importlib import import_module

from adaptrt.bench.peers import Setup
from adaptrt.bench.peers.gguf import write_gguf
from adaptrt.bench.work import Work

NAME = "llama.cpp"
PACKAGE = "llama_cpp"


def works(setup: Setup) -> list[Work]:
    """Decode with one stream and prefills, named as ours are."""
    path = setup.cache.with_suffix(".iq4_nl.gguf")
    if not path.exists():
        write_gguf(path, setup.metadata, setup.specs)
    llama = import_module(PACKAGE).Llama(
        str(path),
        n_ctx=max(*setup.prefills, setup.steps) + 8,
        n_batch=512,
        n_ubatch=512,
        n_threads=setup.threads,
        n_threads_batch=setup.threads,
        verbose=False,
    )

    def evaluate(tokens: list[int]) -> float:
        start = time.perf_counter()
        llama.eval(tokens)
        return time.perf_counter() - start

    def decode() -> float:
        llama.reset()
        return statistics.median(evaluate([5 + position]) for position in range(setup.steps))

    def prefill(n_tokens: int) -> float:
        llama.reset()
        return evaluate([5 + i % 1000 for i in range(n_tokens)])

    return [
        Work("decode 1 stream", 1, decode),
        *(Work(f"prefill {n}", n, lambda n=n: prefill(n)) for n in setup.prefills),  # type: ignore[misc]
    ]
