"""`adaptrt bench` on a tiny model: what it times, what it counts, what it refuses. Never how fast."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import astuple, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import adaptrt_cli
from helpers.oracle import llama_folder, peft_folder
from helpers.tiny import convert_model

from adaptrt.adapters.base import open_base
from adaptrt.adapters.normal import Kronecker, Lowered, LoweredAdapter, LowRank, Sparse
from adaptrt.backends.base import LoadOptions, Peaks, Reads
from adaptrt.backends.cpu import CpuBackend
from adaptrt.bench.adapter_cost import adapter_cost, predicted_seconds
from adaptrt.bench.added import Added
from adaptrt.bench.crowd import crowds
from adaptrt.bench.peers.gguf import write_gguf
from adaptrt.bench.products import Product, layers, product_works, products
from adaptrt.bench.report import cost_rows, geometric_means, product_rows
from adaptrt.bench.shapes import SHAPES, random_adapters, random_factor, random_tensor
from adaptrt.bench.subject import Cost
from adaptrt.bench.work import Work, measure
from adaptrt.cli.bench import PEERS
from adaptrt.format import open_file
from adaptrt.model.llama import LlamaArchitecture
from adaptrt.plugins import load_registry
from adaptrt.program import Linear
from adaptrt.quant.plain import to_float32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("bench")
    folder = llama_folder(path / "hf")
    return convert_model(folder, path / "base.adrt"), peft_folder(path / "voice", folder)


def test_rows_of_a_model_with_random_adapters(files: tuple[Path, Path]) -> None:
    outcome = adaptrt_cli("bench", files[0], "--backend", "cpu", "--rounds", 2, "--steps", 2, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    names = [row["name"] for row in report["rows"]]
    assert (
        names[0] == "decode 1 stream" and "decode 8 streams, 8 adapters" in names and "prefill 128" in names
    )
    assert names[-1] == "decode 1 stream, exact" and len(report["first_token_seconds"]) == 3
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["rows"][0]["time_over_base"] == [1, 1, 1]
    assert report["bandwidth"] > 1e8 and report["peak_memory_bytes"] > 1e6 and not report["crowd"]
    turns = {row["name"]: row["turns"] for row in report["costs"]}
    assert turns == {
        "decode 1 stream, 1 adapter": 16,
        "decode 1 stream, 4 stacked": 4,
        "decode 8 streams, 8 adapters": 4,
    }


def test_adapters_can_be_named_and_the_table_is_text(files: tuple[Path, Path]) -> None:
    outcome = adaptrt_cli("bench", files[0], "-a", f"{files[1]}:0.5", "--rounds", 1, "--steps", 1)
    assert outcome.code == 0, outcome.err
    assert "stacked" not in outcome.out
    costs = r"decode 1 stream, 1 adapter +4 +[+-][\d.]+% +[+-][\d.]+%   ([+-][\d.]+ ?){3}$"
    assert re.search(costs, outcome.out, re.MULTILINE)


def test_streams_with_adapters_of_their_own_are_a_table_of_their_own(files: tuple[Path, Path]) -> None:
    outcome = adaptrt_cli("bench", files[0], "--streams", 3, "--rounds", 1, "--steps", 1, "--json")
    assert outcome.code == 0, outcome.err
    crowd = json.loads(outcome.out)["crowd"]
    assert len(crowd) == 6 and crowd[0]["name"].startswith("decode 3 streams at ")
    assert crowd[0]["time_over_base"] == [1, 1, 1] and all(row["tokens_per_second"] > 0 for row in crowd)


def test_adapters_of_a_crowd_share_nothing_but_what_vera_shares(files: tuple[Path, Path]) -> None:
    with open_file(files[0]) as file:
        specs = open_base(file, load_registry().architectures).specs
    made = dict(crowds(specs, 3))
    for name, adapters in made.items():
        terms = [low.terms[0] for adapter in adapters for low in adapter.values()]
        places = {term.v.data.ctypes.data for term in terms if isinstance(term, LowRank)}
        assert len(places) == (1 if "VeRA" in name else len(terms)) and len(adapters) == 3
    assert len(made["q and v, rank 8, bf16"][0]) == 4 and len(made["all, rank 16, nf4"][0]) == 14


def test_products_are_those_of_a_layer_and_run_on_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of Llama-3.1-8B by hand; the layers' registers change, or a backend would make them one product."""
    shapes = {product.name: (product.rows, product.cols) for product in products("llama-8b")}
    assert shapes == {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    monkeypatch.setattr("adaptrt.bench.products.CACHE_BYTES", 100e3)
    monkeypatch.setattr("adaptrt.bench.products.TOKENS", (1, 3))
    product = Product("tiny", 96, 128)
    program, tensors = layers(product, 4 * product.copies(product.weight_bytes))
    linear = [op for op in program.ops if isinstance(op, Linear)]
    assert len(linear) == 64 and all(a.src != b.src for a, b in pairwise(linear))
    assert sum(tensors[op.weight].data.nbytes for op in linear[:16]) > 100e3
    works = list(product_works(product, lambda p, t: CpuBackend().load(p, t, LoadOptions(threads=1)), 32))
    assert [work.operations for work in works] == [2 * 96 * 128, 6 * 96 * 128]
    assert all(work.run() > 0 for work in works)


def test_product_rows_compare_and_average() -> None:
    ours, theirs = (
        [Work("a", 1, float, 8, 8, rounds=[[t]]), Work("b", 1, float, 8, 8, rounds=[[t]])] for t in (1.0, 2.0)
    )
    theirs[1].rounds = [[8.0]]
    table = product_rows(ours, {"lib": theirs}, Peaks(16.0, 0.0))
    assert [row["faster"]["lib"][1] for row in table] == [2, 8] and table[0]["percent_of_floor"] == 50
    assert product_rows(ours, {"lib": theirs}, Peaks())[0]["percent_of_floor"] is None
    streaming = Peaks(16.0, 0.0, bus_bytes_per_second=4.0, streamed_bytes=3)  # 0.75 s of the second
    assert product_rows(ours, {"lib": theirs}, streaming)[0]["percent_of_floor"] == 75
    assert geometric_means(table) == [{"tokens": 1, "faster": {"lib": pytest.approx(4)}}]


@pytest.mark.parametrize("variant", ["dora", "vera"])
def test_random_adapters_of_other_variants_fit(files: tuple[Path, Path], variant: str) -> None:
    outcome = adaptrt_cli("bench", files[0], "--variant", variant, "--rounds", 1, "--steps", 1)
    assert outcome.code == 0 and "decode 8 streams, 8 adapters" in outcome.out
    stacked = [line for line in outcome.out.splitlines() if "4 stacked" in line]
    assert re.search(r"   \d+\.\d\d \d+\.\d\d \d+\.\d\d$", stacked[0])
    assert re.search(r" 1 +[+-][\d.]+% +[+-][\d.]+%   ([+-][\d.]+ ?){3}$", stacked[1])


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["{base}", "--shape", "tinyllama"], "go without MODEL", 2),
        (["{base}", "--peer", "llama.cpp"], "go without MODEL", 2),
        (["{base}", "-a", "nobody"], "nobody", 1),
        (["{base}", "--backend", "tpu"], "tpu", 1),
        (["--shape", "llama-9000b"], "llama-9000b", 2),
    ],
)
def test_refusals(files: tuple[Path, Path], args: list[str], message: str, code: int) -> None:
    outcome = adaptrt_cli("bench", *(arg.format(base=files[0]) for arg in args))
    assert outcome.code == code and message in outcome.error


def test_a_wrong_backend_is_refused_before_a_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "tpu" in adaptrt_cli("bench", "--backend", "tpu").error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("peer", PEERS)
def test_a_missing_peer_is_named(
    files: tuple[Path, Path], peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptrt.cli.bench.cached_model", lambda *_: files[0])
    monkeypatch.setattr(f"adaptrt.bench.peers.{PEERS[peer]}.PACKAGE", "no_such_package")
    steps = () if peer == "bnb" else ("--steps", 1)
    outcome = adaptrt_cli("bench", "--peer", peer, "--rounds", 1, *steps)
    assert outcome.code == 1 and f"peer {peer}" in outcome.error
    assert "no_such_package is not installed" in outcome.error


def test_products_are_compared_on_a_gpu_only() -> None:
    outcome = adaptrt_cli("bench", "--peer", "bnb", "--backend", "cpu")
    assert outcome.code == 1 and "on a GPU, found backend cpu" in outcome.error


def test_costs_are_those_of_the_shapes(files: tuple[Path, Path]) -> None:
    """Counted by hand: hidden 64, MLP 160, 2 layers, 4 heads and 2 KV heads of 16, vocabulary 131."""
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    with open_file(files[0]) as file:
        base = open_base(file, load_registry().architectures)
        cost = Cost.of(base.program, base.weights())
    assert (cost.token_operations, cost.logit_operations) == (2 * linear, 2 * 131 * 64)
    assert linear / 2 + 131 * 64 < cost.step_bytes < 0.6 * linear + 1.1 * 131 * 64


def test_what_adapters_add(files: tuple[Path, Path]) -> None:
    """Counted by hand for the same sizes: q, k and v read one input, gate and up another."""
    with open_file(files[0]) as file:
        base = open_base(file, load_registry().architectures)
    lora, dora, vera = (random_adapters(name, base.specs, 4, 2) for name in ("lora", "dora", "vera"))

    def added(*stacks: Sequence[LoweredAdapter]) -> tuple[int, int, int]:
        return astuple(Added.by(base.program, stacks))

    items = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    outputs, inputs = 2 * (2 * 64 + 2 * 32 + 2 * 160 + 64), 2 * (3 * 64 + 160)
    vectors, factors = 4 * (outputs + 14 * 4), 2 * 4 * (160 + 160)
    assert added(lora[:1]) == (2 * items, 0, 2 * items)
    assert added(lora) == added(lora[:1], lora[1:]) == (4 * items, 0, 4 * items)
    assert added(dora[:1]) == (2 * items + 4 * outputs, 0, 2 * items)
    assert added(vera[:1]) == (vectors, factors, 2 * 4 * (inputs + outputs))
    assert added(vera) == (2 * vectors, factors, 2 * 4 * (inputs + 2 * outputs))
    assert added(vera[:1], vera[1:]) == (2 * vectors, factors, 2 * 4 * 2 * (inputs + outputs))
    w1, w2 = (random_factor(np.random.default_rng(0), *shape) for shape in ((4, 8), (16, 8)))
    entries = Sparse(np.zeros(65, np.int32), np.zeros(9, np.int32), np.zeros(9, np.float32), 1.0)
    terms = {"blk.0.attn_q": Lowered((Kronecker(w1, w2, 1.0), entries), c=np.zeros(64, np.float32))}
    n_bytes = 2 * (4 * 8 + 16 * 8) + 4 * (65 + 9 + 9) + 4 * 64
    assert added([terms]) == (n_bytes, 0, 2 * (8 * 16 * 8 + 4 * 8 * 16 + 9))


def test_a_prediction_adds_what_each_part_takes() -> None:
    alone = Work("alone", 1, float, 100, 50)
    own = Work("own", 1, float, 300, 55, without=alone)
    shared = replace(own, floor_bytes=340, shared_bytes=40)
    heavy = replace(own, operations=800)
    peaks, probed = Peaks(10.0, 5.0), Reads(20.0, 6.0)
    assert predicted_seconds(own, peaks, probed) == 200 / 20  # nothing of it is shared
    assert predicted_seconds(own, peaks, Reads()) == 200 / 10
    assert predicted_seconds(shared, peaks, probed) == 6 + 200 / 20
    assert predicted_seconds(shared, peaks, Reads()) == 40 / 10 + 200 / 10
    assert predicted_seconds(heavy, peaks, probed) == 750 / 5
    assert predicted_seconds(heavy, Peaks(10.0), probed) == 200 / 20
    assert predicted_seconds(own, Peaks(), probed) == 200 / 20
    assert predicted_seconds(own, Peaks(), Reads()) is None
    assert predicted_seconds(alone, peaks, probed) is None


def test_costs_are_compared_turn_by_turn() -> None:
    """The machine is half as fast in every other turn, for steps and reads alike."""
    alone = Work("alone", 1, float, 100, rounds=[[1.0, 2.0], [1.0, 2.0, 7.0]])
    reads = [[Reads(100.0), Reads(50.0)], [Reads(100.0), Reads(40.0)]]
    work = Work("with", 1, float, 150, rounds=[[1.5, 3.0], [1.75, 3.5]], without=alone, reads=reads)
    cost = adapter_cost(work, Peaks())
    assert cost is not None and cost.turns == 4  # the fifth the base took alone
    assert cost.measured == (0.5, 0.625, 0.75)
    assert cost.predicted == pytest.approx((0.5, 0.5, 0.53125))
    assert cost.excess == pytest.approx((0.0, 0.0625, 0.15625))
    assert (
        adapter_cost(alone, Peaks(1.0)) is None
        and adapter_cost(replace(work, reads=[[Reads()] * 2] * 2), Peaks()) is None
    )
    (row,) = cost_rows([alone, work], Peaks())
    assert row["name"] == "with" and row["turns"] == 4 and row["excess"] == cost.excess
    once = replace(work, rounds=[[1.5]], without=replace(alone, rounds=[[1.0]]), reads=[[Reads(100.0)]])
    assert cost_rows([once], Peaks())[0]["excess"] == (0.0, 0.0, 0.0)


def test_rounds_drop_the_first_and_ratios_pair_them() -> None:
    times = iter([9.0, 9.0, 1.0, 2.0, 3.0, 12.0])
    a, b = (Work(name, 8, lambda: next(times), 100, 1000) for name in "ab")
    measure([a, b], 2, lambda _: None)
    assert (a.rounds, b.rounds) == ([[1.0], [3.0]], [[2.0], [12.0]])
    assert b.ratio_to(a) == (2.0, 3.0, 4.0) and a.tokens_per_second == 4.0
    assert a.floor_seconds(10, 0) == 10 and a.floor_seconds(1000, 100) == 10


def test_works_take_turns_and_a_round_keeps_all_runs() -> None:
    order: list[str] = []
    seconds = {"a": iter([9.0, 9.0, 9.0, 3.0, 1.0, 8.0]), "b": iter([9.0, 5.0])}

    def work(name: str, runs: int) -> Work:
        return Work(name, 1, lambda: order.append(name) or next(seconds[name]), runs=runs)

    a, b = work("a", 3), work("b", 1)
    b.probe = lambda: order.append("probe") or Reads(len(order))  # type: ignore[func-returns-value]
    measure([a, b], 1, lambda _: None)
    assert order == ["a", "b", "probe", "a", "a"] * 2
    assert (a.rounds, b.rounds) == ([[3.0, 1.0, 8.0]], [[5.0]])
    assert (a.reads, b.reads) == ([[Reads()] * 3], [[Reads(8)]])
    assert (a.median_seconds, b.median_seconds) == (3.0, 5.0)


def test_a_steady_work_is_run_once_more_before_each_run() -> None:
    seconds = iter([9.0, 8.0, 7.0, 6.0, 5.0, 1.0, 4.0, 2.0])
    work = Work("steady", 1, lambda: next(seconds), runs=2, steady=True)
    measure([work], 1, lambda _: None)
    assert work.rounds == [[1.0, 2.0]]


def test_a_ratio_compares_turns_where_both_had_as_many() -> None:
    slower = Work("slower", 1, float, rounds=[[2.0, 6.0, 30.0]])  # the machine slowed down after the first
    base = Work("base", 1, float, rounds=[[1.0, 2.0, 10.0, 70.0, 80.0]])  # ran more often
    prompt = Work("prompt", 1, float, rounds=[[12.0]])
    assert slower.ratio_to(base) == (3.0, 3.0, 3.0)
    assert prompt.ratio_to(base) == (1.2, 1.2, 1.2)


def test_random_weights_are_finite_and_small() -> None:
    architecture = LlamaArchitecture()
    specs = architecture.tensors(architecture.metadata(SHAPES["tinyllama"]))
    rng = np.random.default_rng(0)
    for made in (random_tensor(specs[0], rng), random_tensor(specs[2], rng), random_factor(rng, 16, 5632)):
        weight = to_float32(made)
        assert np.isfinite(weight).all() and 0.1 < weight.std() * np.sqrt(weight.shape[1]) < 2


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_reads_the_gguf(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    config = dict(SHAPES["tinyllama"]) | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
    }
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    architecture = LlamaArchitecture()
    metadata = architecture.metadata(config)
    write_gguf(tmp_path / "m.gguf", metadata, architecture.tensors(metadata))
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=16, verbose=False)
    model.eval([5, 6, 7])
    assert model.n_vocab() == 300 and model.n_tokens == 3
    model.close()
