"""The README's commands and its Python, run as they stand on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.cli import adaptrt_cli
from helpers.oracle import peft_folder
from helpers.tiny import tiny_folder

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
INSTALL, OWN_MODEL, *_ = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the paths that the README names exist."""
    base = tiny_folder(tmp_path / "path/to/hf-llama")
    for name in ("path/to/peft-adapter", "first", "second"):
        peft_folder(tmp_path / name, base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_line(here: Path) -> None:
    command = shlex.split(INSTALL.split("&&")[-1])
    assert command[0].endswith("bin/adaptrt")
    outcome = adaptrt_cli(*command[1:])
    assert outcome.code == 0 and outcome.out.strip()


def test_the_commands_and_the_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [shlex.split(line, comments=True) for line in OWN_MODEL.splitlines()]
    converting = [line for line in lines if line[1] == "convert"]
    running = [line for line in lines if line[1] != "convert"]
    extra = [
        shlex.split(f"adaptrt convert {name} -o {name}.adrt --base base.adrt") for name in ("first", "second")
    ]
    for line in [*converting, *extra, *running]:
        outcome = adaptrt_cli(*line[1:], *(["-n", "4"] if line[1] == "run" else []))
        assert line[0] == "adaptrt" and outcome.code == 0, outcome.err
    exec(compile(PYTHON, "README.md", "exec"), {})
    assert capsys.readouterr().out
