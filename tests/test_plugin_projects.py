"""What strangers start from: the tutorial followed to the letter, and the project that `adaptrt plugins new` writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.cli import adaptrt_cli
from helpers.env import Env

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "spec" / "plugins.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "plugins" / "example-gain"
BLOCK = re.compile(r"(?:`([\w./]+)`:\n\n)?```(\w+)\n(.*?)```", re.DOTALL)


def test_the_tutorial_works_on_its_first_run(tmp_path: Path) -> None:
    env, folder, printed = Env(tmp_path / "env"), tmp_path / "project", []
    folder.mkdir()
    for name, language, text in BLOCK.findall(TUTORIAL):
        if language == "sh":
            printed.append(env.run(text, folder))
        else:
            (folder / name).write_text(text, encoding="utf-8")
    testing, using = printed
    assert "\ndial (adaptrt-dial 0.1.0): variants dial\n" in testing
    assert re.search(r"\d+ passed", testing) and "failed" not in testing
    assert "adapters my-adapter:0.5 + scripture:1" in using


def test_the_tutorial_says_how_long_its_variant_is() -> None:
    (module,) = [text for name, _, text in BLOCK.findall(TUTORIAL) if name == "adaptrt_dial.py"]
    lines = [line for line in module.splitlines() if line.strip()]
    docstring = ast.get_docstring(ast.parse(module))
    assert docstring is not None
    count = len(lines) - len(docstring.splitlines())
    assert f"takes {count} lines of code" in " ".join(TUTORIAL.split())


def test_a_new_project_is_the_example_and_passes_its_tests(tmp_path: Path) -> None:
    outcome = adaptrt_cli("plugins", "new", "gain", "--into", tmp_path)
    folder = tmp_path / "adaptrt-gain"
    assert outcome.code == 0 and outcome.out == "" and str(folder) in outcome.err
    assert files(folder) == files(EXAMPLE)
    printed = Env(tmp_path / "env").run(
        "python -m pip install -q -e . && python -m adaptrt plugins && python -m pytest", folder
    )
    assert "\ngain (adaptrt-gain 0.1.0): variants gain\n" in printed
    assert re.search(r"\d+ passed", printed) and "failed" not in printed


def files(folder: Path) -> dict[str, str]:
    """Text by path, without what tests leave behind."""
    suffixes = (".py", ".md", ".toml")
    return {
        str(p.relative_to(folder)): p.read_text("utf-8") for p in folder.rglob("*") if p.suffix in suffixes
    }


def test_words_of_a_name_are_joined_as_each_place_wants_it(tmp_path: Path) -> None:
    adaptrt_cli("plugins", "new", "two-words", "--into", tmp_path)
    folder = tmp_path / "adaptrt-two-words"
    assert 'two-words = "adaptrt_two_words"' in (folder / "pyproject.toml").read_text()
    module = (folder / "adaptrt_two_words.py").read_text()
    assert "class TwoWordsVariant" in module and '"TWO_WORDS"' in module and 'name = "two-words"' in module
    assert "$" not in module


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Gain", "plugin name 'Gain': expected"),
        ("a/b", "plugin name 'a/b': expected"),
        ("-x", "No such option"),
        ("x" * 41, "at most 40"),
        ("1st", "plugin name '1st': expected"),
        ("lora", "plugin name 'lora': a variant of this name is installed already"),
        ("taken", "adaptrt-taken: exists already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "adaptrt-taken").mkdir()
    outcome = adaptrt_cli("plugins", "new", name, "--into", tmp_path)
    assert outcome.code in (1, 2) and words in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["adaptrt-taken"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    outcome = adaptrt_cli("plugins", "new", "gain", "--into", tmp_path / "nowhere")
    assert outcome.code == 1 and outcome.error == f"{tmp_path / 'nowhere'}: no such folder"
