"""What gets imported when: the promises behind a quick `adaptrt --help` and a torch-free install."""

from __future__ import annotations

from helpers.imports import modules_after

HEAVY = {"torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes"}


def test_import_adaptrt_is_light() -> None:
    loaded = modules_after("import adaptrt")
    assert not loaded & (HEAVY | {"numpy", "pluggy", "adaptrt.plugins"})


def test_the_api_needs_no_foreign_library() -> None:
    loaded = modules_after("import adaptrt\nadaptrt.load")
    assert "adaptrt.api" in loaded
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("adaptrt_")}  # no plugin before a model is loaded


def test_help_imports_no_command_and_no_numpy() -> None:
    loaded = modules_after("import adaptrt.cli\ntry: adaptrt.cli.main(['--help'])\nexcept SystemExit: pass")
    assert not loaded & (HEAVY | {"numpy", "pluggy", "jinja2", "cffi", "importlib.metadata", "adaptrt.api"})
    commands = {name for name in loaded if name.startswith("adaptrt.cli.")}
    assert not commands


def test_the_built_in_plugins_need_no_foreign_library() -> None:
    code = "from adaptrt.plugins import load_registry\nassert load_registry().plugins[0].error is None"
    assert not modules_after(code) & HEAVY
