"""The command line without a model: options, usage errors, the batch file's parser, errors as one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from helpers.cli import adaptrt_cli, adaptrt_process

import adaptrt
import adaptrt.cli
from adaptrt.cli.options import AdapterChoice, parse_adapter
from adaptrt.cli.prompts import read_prompts
from adaptrt.engine.request import Sampling
from adaptrt.errors import AdapterError, AdaptrtError, FormatError, RequestError


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("poet", "poet", 1.0),
        ("poet:0.5", "poet", 0.5),
        ("poet:-2", "poet", -2.0),
        ("poet:1e-3", "poet", 1e-3),
        ("a:1:0.5", "a:1", 0.5),
        ("dir/a.adrt:0", "dir/a.adrt", 0.0),
        ("lora:v2", "lora:v2", 1.0),
        (r"C:\adapters\poet", r"C:\adapters\poet", 1.0),
        (r"C:\adapters\poet:0.5", r"C:\adapters\poet", 0.5),
    ],
)
def test_parse_adapter(text: str, source: str, scale: float) -> None:
    assert parse_adapter(text) == AdapterChoice(source, scale)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poet:nan", "adapter 'poet': scale is 'nan', expected a finite number"),
        ("poet:-inf", "adapter 'poet': scale is '-inf', expected a finite number"),
        ("poet:1e999", "adapter 'poet': scale is '1e999', expected a finite number"),
        ("poet:", "adapter 'poet:': expected NAME or PATH, then perhaps ':' and a scale"),
        (":0.5", "adapter ':0.5': expected NAME or PATH, then perhaps ':' and a scale"),
        ("", "adapter '': expected NAME or PATH, then perhaps ':' and a scale"),
        ("a\0b", r"adapter 'a\x00b': expected NAME or PATH, then perhaps ':' and a scale"),
        ("poet::2", "adapter 'poet::2': expected NAME or PATH, then perhaps ':' and a scale"),
    ],
)
def test_parse_adapter_refuses(text: str, message: str) -> None:
    with pytest.raises(AdapterError) as error:
        parse_adapter(text)
    assert str(error.value) == message


def test_every_command_of_the_table_exists_and_has_help() -> None:
    shown = adaptrt_cli("--help")
    assert shown.code == 0
    for name, line in adaptrt.cli.COMMANDS.items():
        assert line in shown.out
        help_page = adaptrt_cli(name, "--help")
        assert help_page.code == 0, name
        assert help_page.out.startswith(f"Usage: adaptrt {name} "), name


def test_no_arguments_show_help() -> None:
    assert adaptrt_cli().out == adaptrt_cli("--help").out


def test_version() -> None:
    assert adaptrt_cli("--version").out == f"adaptrt {adaptrt.__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sing"], "No such command 'sing' (see 'adaptrt --help')"),
        (["run"], "Missing argument 'MODEL' (see 'adaptrt run --help')"),
        (["run", "m.adrt", "--temp", "hot"], "Invalid value for '--temp': 'hot' is not a valid float"),
        (
            ["run", "m.adrt", "-p", "x", "-f", "y"],
            "give one of -p, -f and --prompts (see 'adaptrt run --help')",
        ),
        (["run", "m.adrt", "--prompts", "x", "--chat"], "--chat does not go with --prompts"),
        (["run", "m.adrt", "--chat", "--json"], "--json does not go with a chat"),
        (["run", "m.adrt", "-p", "x", "--system", "y"], "--system goes with a chat only"),
        (["run", "m.adrt", "--precision", "half"], "Invalid value for '--precision'"),
        (
            ["run", "m.adrt", "--gpu-memory", "6X"],
            "Invalid value for '--gpu-memory': '6X', expected a size like 6GiB, 6G, 800M or 6GB",
        ),
        (["plugins", "--json", "new", "x"], "--json does not go with new"),
        (["bench", "-a", "x", "--rank", "4"], "--rank: no effect beside -a"),
        (
            ["bench", "--peer", "bnb", "--steps", "4", "-a", "x"],
            "--adapter, --steps: no effect beside --peer bnb alone",
        ),
        (["eval", "m.adrt"], "Missing option '--text' (see 'adaptrt eval --help')"),
        (["adapter", "sing"], "No such command 'sing' (see 'adaptrt adapter --help')"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(args: list[str], message: str) -> None:
    outcome = adaptrt_cli(*args)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error.startswith(message)
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GiB", 6 << 30),
        ("6g", 6 << 30),
        ("6GB", 6 * 10**9),
        ("800M", 800 << 20),
        ("1.5 KiB", 1536),
        ("12", 12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    outcome = adaptrt_cli("run", "demo", "--backend", "cpu", "--gpu-memory", text)
    assert outcome.code == 1
    assert outcome.error == f"backend 'cpu': has no GPU memory to limit, found a limit of {n_bytes} bytes"


@pytest.mark.parametrize("text", ["", "0", "0.4", "-1", "1e3", "6 G B", "99999999T", "GiB"])
def test_what_is_no_size(text: str) -> None:
    outcome = adaptrt_cli("run", "demo", "--gpu-memory", text)
    assert outcome.code == 2 and f"{text!r}, expected a size like 6GiB" in outcome.error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temp", "-1", "temperature: found -1.0, expected a number from 0 to 100"),
        ("--temp", "nan", "temperature: found nan, "),
        ("--top-p", "2", "top_p: found 2.0, "),
        ("-n", "-2", "max_tokens: found -2, "),
        ("--repeat-penalty", "0", "repeat_penalty: found 0.0, "),
        ("--stop", "", "stop: found [''], expected non-empty strings"),
        ("-a", "poet:inf", "adapter 'poet': scale is 'inf', expected a finite number"),
    ],
)
def test_impossible_values_are_refused_before_a_model_is_opened(
    option: str, value: str, message: str
) -> None:
    outcome = adaptrt_cli("run", "no-such-model.adrt", "-p", "x", option, value)
    assert outcome.code == 1
    assert outcome.error.startswith(message)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FormatError("one\n  two\n"), 1, "one; two"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "No space left on device", "out.adrt"), 1, "out.adrt: No space left on device"),
        (OSError("odd"), 1, "odd"),
        (ZeroDivisionError("x"), 1, "internal error, ADAPTRT_DEBUG=1 shows where: ZeroDivisionError: x"),
        (BaseException("x"), 1, "internal error, ADAPTRT_DEBUG=1 shows where: BaseException: x"),
    ],
)
def test_errors_become_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("adaptrt.cli.plugins.load_registry", fail)
    outcome = adaptrt_cli("plugins")
    assert (outcome.code, outcome.error) == (code, line)
    monkeypatch.setenv("ADAPTRT_DEBUG", "1")
    with pytest.raises(type(error)):
        adaptrt_cli("plugins")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, BrokenPipeError])
def test_interrupts_are_quiet(monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    def fail() -> None:
        click.echo("before")
        raise stop

    monkeypatch.setattr("adaptrt.cli.plugins.load_registry", fail)
    outcome = adaptrt_cli("plugins")
    assert outcome.out == "before\n"
    assert outcome.err.strip() == ""
    assert outcome.code == (130 if stop is KeyboardInterrupt else 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-m", "adaptrt", "plugins"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "adaptrt: error: No space left on device\n"


def test_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "adaptrt", "--help"], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_a_stream_that_the_caller_closed_is_as_good_as_empty(descriptor: int) -> None:
    outcome = adaptrt_process("run", "demo", "-n", "1", setup=lambda: os.close(descriptor))
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err


def test_plugins_lists_what_is_installed() -> None:
    outcome = adaptrt_process("plugins", "--json")
    assert outcome.code == 0
    (builtin,) = [plugin for plugin in json.loads(outcome.out)["plugins"] if plugin["name"] == "builtin"]
    assert builtin["error"] is None
    assert builtin["provides"]["variants"] == ["lora"]
    assert "variants lora; backends cpu, cuda, reference; architectures llama" in adaptrt_cli("plugins").out


def prompts(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_read_prompts(tmp_path: Path) -> None:
    path = prompts(
        tmp_path,
        {"prompt": "a"},
        "",
        {"prompt": "b\u2028", "adapters": ["x:0.5", "y"], "temperature": 0, "stop": ["."]},
        {"prompt": "c", "adapters": {"x": 2, "C:1": 0.25}},
        {"prompt": "d", "adapters": []},
        {"prompt": "e", "adapters": "x"},
    )
    common, sampling = [AdapterChoice("z", 3.0)], Sampling(max_tokens=7)
    tasks = read_prompts(path, common, sampling)
    assert [task.prompt for task in tasks] == ["a", "b\u2028", "c", "d", "e"]
    assert [list(task.adapters) for task in tasks] == [
        common,
        [AdapterChoice("x", 0.5), AdapterChoice("y", 1.0)],
        [AdapterChoice("x", 2.0), AdapterChoice("C:1", 0.25)],
        [],
        [AdapterChoice("x", 1.0)],
    ]
    assert [task.sampling for task in tasks][:2] == [
        sampling,
        Sampling(max_tokens=7, temperature=0, stop=(".",)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: "),
        ("[" * 100_000, ""),  # nested too deep for the parser
        ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[1]", "found list, expected an object with a prompt"),
        ({"adapters": []}, "prompt: found None, expected text"),
        ({"prompt": 3}, "prompt: found 3, expected text"),
        ({"prompt": ""}, "prompt: found '', expected text"),
        (
            {"prompt": "x", "temprature": 1},
            "unknown key 'temprature', expected one of prompt, adapters, max_tokens",
        ),
        ({"prompt": "x", "temperature": "hot"}, "temperature: found 'hot', "),
        ({"prompt": "x", "stop": 7}, "stop: "),
        ({"prompt": "x", "stop": ""}, "stop: "),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens: found 1.5, expected a whole number"),
        ({"prompt": "x", "adapters": 7}, "adapters: found 7, expected "),
        ({"prompt": "x", "adapters": {"a": "b"}}, "adapters: found {'a': 'b'}, expected "),
        ({"prompt": "x", "adapters": ["a:nan"]}, "adapter 'a': scale is 'nan', expected a finite number"),
        ('{"prompt": "x", "adapters": {"a": NaN}}', "adapter 'a': scale is 'nan', expected a finite number"),
    ],
)
def test_read_prompts_names_the_line(tmp_path: Path, line: object, message: str) -> None:
    path = prompts(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(RequestError) as error:
        read_prompts(path, [], Sampling())
    assert str(error.value).startswith(f"{path}, line 2: {message}")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_text_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrt.cli.options.TEXT_LIMIT", 1 << 20)
    assert (
        adaptrt_cli("run", "demo", "-f", "/dev/zero").error == "/dev/zero: more than 1 MiB, expected a text"
    )


def test_an_empty_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptrtError, match="holds no prompts"):
        read_prompts(prompts(tmp_path, "", " "), [], Sampling())
