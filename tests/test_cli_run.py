"""run and eval end to end, with a tiny random model and PEFT adapters, on the default backend."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import adaptrt_cli, adaptrt_process
from helpers.oracle import Oracle, peft_folder
from helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, convert_model, tiny_folder
from numpy.typing import NDArray

import adaptrt
from adaptrt.api import Model
from adaptrt.backends.base import Batch
from adaptrt.backends.native import NativeExecutable
from adaptrt.cli import main
from adaptrt.cli.chat import Chat
from adaptrt.cli.notes import Progress
from adaptrt.engine.request import Chunk, Sampling


@dataclass(frozen=True)
class Tiny:
    """A model with a chat template, the same without, and two adapters as PEFT folders."""

    folder: Path
    model: Path
    plain: Path
    adapters: tuple[Path, Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("tiny")
    folder = tiny_folder(path / "hf")
    return Tiny(
        folder,
        convert_model(folder, path / "tiny.adrt"),
        convert_model(tiny_folder(path / "hf-plain", chat=False), path / "plain.adrt"),
        (peft_folder(path / "poet", folder, 1), peft_folder(path / "clerk", folder, 2, use_rslora=True)),
    )


GREEDY = ("--temp", "0", "--precision", "exact", "--threads", "2")


@pytest.mark.parametrize("stack", [[], [(0, 1.0)], [(1, 0.5), (0, -1.5)]])
def test_run_continues_as_transformers_and_peft_do(tiny: Tiny, stack: list[tuple[int, float]]) -> None:
    """Every token is the likeliest one by transformers + PEFT on the same dequantized weights."""
    chosen = [(tiny.adapters[i], scale) for i, scale in stack]
    with adaptrt.load(tiny.model, precision="exact", threads=2) as model:
        named = [(model.load_adapter(folder), scale) for folder, scale in chosen]
        chunks = list(model.generate("Once", 12, adapters=named, stream=True, temperature=0))
    prompt = byte_tokenizer().encode("Once").ids
    ids = [token for chunk in chunks for token in chunk.token_ids]
    logits = Oracle(tiny.folder, tiny.model).logits(prompt + ids, chosen)
    assert ids == logits.argmax(axis=1)[len(prompt) - 1 : -1].tolist()

    options = [word for folder, scale in chosen for word in ("-a", f"{folder}:{scale}")]
    outcome = adaptrt_cli("run", tiny.model, "-p", "Once", "-n", 12, *options, *GREEDY)
    assert outcome.code == 0, outcome.err
    assert outcome.out == byte_tokenizer().decode(ids) + "\n"


def test_adapters_move_the_text(tiny: Tiny) -> None:
    """The test above means something only if its three texts differ."""
    texts = {
        adaptrt_cli("run", tiny.model, "-p", "Once", "-n", 12, *options, *GREEDY).out
        for options in (
            [],
            ["-a", tiny.adapters[0]],
            ["-a", f"{tiny.adapters[0]}:0.5", "-a", tiny.adapters[1]],
        )
    }
    assert len(texts) == 3


def test_two_adapters_of_one_name_run_together(tiny: Tiny, tmp_path: Path) -> None:
    """run1/final and run2/final are how trainers leave them."""
    folders = [tmp_path / run / "final" for run in ("run1", "run2")]
    for adapter, folder in zip(tiny.adapters, folders, strict=True):
        shutil.copytree(adapter, folder)
    args = ["run", tiny.model, "-p", "Once", *GREEDY]
    expected = adaptrt_cli(*args, "-a", tiny.adapters[0], "-a", tiny.adapters[1])
    found = adaptrt_cli(*args, "-a", folders[0], "-a", folders[1])
    assert found.code == 0 and found.out == expected.out
    assert f"adapters final:1 + {folders[1]}:1;" in found.err


def test_an_adapter_that_takes_long_shows_that_it_is_being_loaded(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["run", tiny.model, "-p", "Once", "-n", 1, "-a", tiny.adapters[0]]
    started = threading.Event()
    show, load = Progress._show, Model.load_adapter

    def shown(progress: Progress) -> None:
        show(progress)
        started.set()

    def slow(model: Model, *rest: Any) -> str:
        assert started.wait(60)
        return load(model, *rest)

    monkeypatch.setattr(Progress, "_show", shown)
    monkeypatch.setattr(Model, "load_adapter", slow)
    lines = adaptrt_cli(*args).err.splitlines()
    assert lines[0] == f"adaptrt: loading adapter {tiny.adapters[0]} …"
    assert lines[1].startswith(f"adaptrt: loading adapter {tiny.adapters[0]}: done in ")


def test_the_prompt_comes_from_option_file_or_stdin(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Zwölf\n", encoding="utf-8")
    args = ("run", tiny.model, "-n", 8, *GREEDY)
    texts = [
        adaptrt_cli(*args, "-p", "Zwölf").out,
        adaptrt_cli(*args, "-f", file).out,
        adaptrt_cli(*args, stdin="Zwölf\n").out,
    ]
    assert texts[0] == texts[1] == texts[2] != adaptrt_cli(*args, "-p", "Zwolf").out


def test_a_seed_repeats_a_run_and_is_shown(tiny: Tiny) -> None:
    args = ("run", tiny.model, "-p", "Once", "-n", 16, "--temp", 2, "--top-k", 0, "--min-p", 0, "--top-p", 1)
    first = adaptrt_cli(*args)
    seed = re.search(r"seed (\d+)$", first.err, re.MULTILINE)
    assert seed
    assert adaptrt_cli(*args, "--seed", seed[1]).out == first.out
    assert adaptrt_cli(*args, "--seed", int(seed[1]) + 1).out != first.out


def test_run_json(tiny: Tiny) -> None:
    outcome = adaptrt_cli(
        "run", tiny.model, "-p", "Once", "-n", 5, "-a", f"{tiny.adapters[0]}:2", *GREEDY, "--json"
    )
    result = json.loads(outcome.out)
    assert (
        result["text"]
        == adaptrt_cli("run", tiny.model, "-p", "Once", "-n", 5, "-a", f"{tiny.adapters[0]}:2", *GREEDY).out[
            :-1
        ]
    )
    assert result["adapters"] == [["poet", 2.0]]
    assert (result["prompt_tokens"], result["tokens"], result["finish_reason"]) == (5, 5, "length")


def test_a_stop_text_ends_the_answer(tiny: Tiny) -> None:
    args = ("run", tiny.model, "-p", "Once", "-n", 24, *GREEDY)
    whole = adaptrt_cli(*args).out[:-1]
    stop = whole[8:10]
    assert adaptrt_cli(*args, "--stop", stop).out == whole[: whole.index(stop)] + "\n"


def test_text_streams_before_the_end(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text reaches stdout token by token, between the engine's steps, and never half a character."""
    events: list[str] = []
    step = NativeExecutable.step

    def counted_step(executable: NativeExecutable, batch: Batch) -> NDArray[np.float32]:
        events.append("step")
        return step(executable, batch)

    class Recorder(io.BytesIO):
        def write(self, data: Any) -> int:
            events.append(bytes(data).decode("utf-8"))
            return super().write(data)

    monkeypatch.setattr(NativeExecutable, "step", counted_step)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Recorder(), "utf-8"))
    with pytest.raises(SystemExit) as end:
        main(["run", str(tiny.model), "-p", "O", "-n", "120", *GREEDY])
    assert end.value.code == 0
    texts = [index for index, event in enumerate(events) if event != "step"]
    last_step = len(events) - 1 - events[::-1].index("step")
    assert len([index for index in texts if index < last_step]) > 1


def test_a_batch_equals_each_line_alone(tiny: Tiny, tmp_path: Path) -> None:
    poet, clerk = tiny.adapters
    lines = [
        {"prompt": "Once", "adapters": [f"{poet}:0.5", str(clerk)]},
        {"prompt": "x" * 200},
        {"prompt": "Twice upon", "adapters": {str(clerk): 2}, "max_tokens": 3},
        {"prompt": "Thrice", "adapters": ["nobody"]},
        {"prompt": "Four", "stop": "\x00"},
        {"prompt": "Five", "adapters": ["n" * 300]},
    ]
    file = tmp_path / "batch.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    outcome = adaptrt_cli("run", tiny.model, "--prompts", file, "-n", 7, "-a", poet, *GREEDY)
    assert outcome.code == 1
    results = {result["index"]: result for result in map(json.loads, outcome.out.splitlines())}
    assert sorted(results) == [0, 1, 2, 3, 4, 5]
    assert results[1]["error"] == "prompt: found 201 tokens, expected at most 128, the context length"
    assert results[3]["error"].startswith("adapter 'nobody': no such file or folder, and not inside")
    assert results[5]["error"].startswith(f"adapter '{'n' * 300}': no such file or folder")
    alone = {
        0: ("Once", 7, ["-a", f"{poet}:0.5", "-a", clerk]),
        2: ("Twice upon", 3, ["-a", f"{clerk}:2"]),
        4: ("Four", 7, ["-a", poet]),
    }
    for index, (prompt, tokens, options) in alone.items():
        text = adaptrt_cli("run", tiny.model, "-p", prompt, "-n", tokens, *options, *GREEDY).out[:-1]
        assert (results[index]["prompt"], results[index]["text"]) == (prompt, text)
    assert results[2]["adapters"] == [["clerk", 2.0]]


def test_eval_equals_transformers(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    ids = byte_tokenizer().encode(text.read_text()).ids
    oracle = Oracle(tiny.folder, tiny.model)
    total, count = 0.0, 0
    for start in range(0, len(ids), 64):
        window = ids[start : start + 64]
        scores = torch.log_softmax(
            torch.from_numpy(oracle.logits(window, [(tiny.adapters[0], 0.5)])).double(), -1
        )
        total -= sum(float(scores[i, token]) for i, token in enumerate(window[1:]))
        count += len(window) - 1
    args = (
        "eval",
        tiny.model,
        "--text",
        text,
        "--ctx",
        64,
        "-a",
        f"{tiny.adapters[0]}:0.5",
        "--precision",
        "exact",
    )
    assert float(adaptrt_cli(*args).out) == pytest.approx(np.exp(total / count), rel=1e-4)
    assert json.loads(adaptrt_cli(*args, "--json").out)["perplexity"] == pytest.approx(
        np.exp(total / count), rel=1e-4
    )


def test_eval_of_a_model_that_overflows_is_one_line(tiny: Tiny) -> None:
    outcome = adaptrt_cli("eval", tiny.model, "--text", __file__, "-a", f"{tiny.adapters[0]}:1e38")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.error.startswith("logits: the largest is nan, expected a finite number")


def test_chat_applies_the_template_to_the_whole_conversation(tiny: Tiny) -> None:
    outcome = adaptrt_cli(
        "run",
        tiny.model,
        "--chat",
        "--system",
        "Be brief.",
        "-n",
        4,
        *GREEDY,
        stdin="hi\n\n/reset\nhello\nmore\n/exit\nno",
    )
    assert outcome.code == 0, outcome.err
    with adaptrt.load(tiny.model, precision="exact", threads=2) as model:

        def reply(*turns: str) -> str:
            roles = ("user", "assistant")
            prompt = "<s><turn>system: Be brief.\n"
            prompt += (
                "".join(f"<turn>{roles[i % 2]}: {turn}\n" for i, turn in enumerate(turns))
                + "<turn>assistant: "
            )
            assert model.chat_template == CHAT_TEMPLATE
            return str(
                model.generate(
                    byte_tokenizer().encode(prompt, add_special_tokens=False).ids, 4, temperature=0
                )
            )

        second = reply("hello")
        assert outcome.out == "".join(
            f"{text}\n" for text in (reply("hi"), second, reply("hello", second, "more"))
        )


def test_chat_without_a_template_continues_each_line(tiny: Tiny) -> None:
    outcome = adaptrt_cli("run", tiny.plain, "--chat", "-n", 4, *GREEDY, stdin="Once\nOnce\n")
    alone = adaptrt_cli("run", tiny.plain, "-p", "Once", "-n", 4, *GREEDY).out
    assert outcome.out == alone * 2
    assert "no chat template" in outcome.err


def test_a_refused_turn_does_not_end_the_chat(tiny: Tiny) -> None:
    outcome = adaptrt_cli("run", tiny.model, "--chat", "-n", 2, *GREEDY, stdin="x" * 300 + "\nhi\n")
    assert outcome.code == 0
    assert "adaptrt: error: prompt: found " in outcome.err
    assert outcome.out == adaptrt_cli("run", tiny.model, "--chat", "-n", 2, *GREEDY, stdin="hi\n").out


def test_a_terminal_gets_a_chat(tiny: Tiny) -> None:
    terminal, inner = pty.openpty()
    command = [sys.executable, "-m", "adaptrt", "run", str(tiny.model), "-n", "2", *GREEDY]
    with subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    ) as process:
        os.close(inner)
        try:
            shown = read_until(terminal, b"> ")
            os.write(terminal, b"hi\n")
            shown += read_until(terminal, b"> ")
            os.write(terminal, b"\x04")
            assert process.wait(20) == 0, shown
        finally:
            process.kill()
    os.close(terminal)
    assert b"Ctrl-C stops an answer" in shown
    assert b"Traceback" not in shown


def read_until(terminal: int, mark: bytes) -> bytes:
    """What a terminal shows up to `mark` at its end; fails after 20 seconds."""
    shown, deadline = b"", time.monotonic() + 20
    while not shown.endswith(mark):
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], shown
        shown += os.read(terminal, 4096)
    return shown


class Parrot:
    """A model that repeats its prompt word by word and is interrupted at the word STOP."""

    chat_template = None

    def generate(self, prompt: str, **options: object) -> Iterator[Chunk]:
        for word in prompt.split():
            if word == "STOP":
                raise KeyboardInterrupt
            yield Chunk(0, word, (), 1, 1)


def test_ctrl_c_stops_an_answer_or_clears_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["a STOP b", KeyboardInterrupt(), "c", EOFError()])

    def type_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", type_line)
    Chat(Parrot(), [], Sampling(), None).loop()  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert shown.out == "a\nc\n"
    assert "adaptrt: stopped\n" in shown.err


def test_ctrl_c_ends_a_run_with_130_and_keeps_the_text() -> None:
    command = [sys.executable, "-m", "adaptrt", "run", "demo", "-p", "O", "-n", "-1", *GREEDY]
    command += ["--backend", "reference"]  # slow enough that the answer is under way when the signal comes
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert b"Traceback" not in process.stderr.read()


def test_ctrl_c_while_the_command_line_is_imported_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")  # as if the signal came right then
    for start in (["-m", "adaptrt"], ["-c", "from adaptrt.__main__ import main; main()"]):
        done = subprocess.run(
            [sys.executable, *start], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_process_as_a_user_runs_it(tiny: Tiny) -> None:
    outcome = adaptrt_process("run", tiny.model, "-n", 4, *GREEDY, stdin="Once")
    assert outcome.out == adaptrt_cli("run", tiny.model, "-n", 4, *GREEDY, stdin="Once").out
    assert all(line.startswith("adaptrt: ") for line in outcome.err.splitlines())
