"""Plugins as real throw-away distributions on sys.path: sound ones are kept, the rest named and skipped."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import adaptrt_cli

from adaptrt.plugins import PluginRecord, Registry, load_registry

Install = Callable[..., None]

BACKEND = """
from adaptrt.hookspecs import hookimpl

class Toy:
    name = {name!r}
    def unavailable(self): return None
    def load(self, program, tensors, options): raise NotImplementedError

@hookimpl
def adaptrt_backends():
    return [Toy()]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a one-module distribution: install("toy", source) → distribution toy 1.2, entry point toy."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, source: str, entry: str | None = None) -> None:
        module = f"adaptrt_test_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[adaptrt]\n{entry or name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


def record(registry: Registry, distribution: str) -> PluginRecord:
    (found,) = [plugin for plugin in registry.plugins if plugin.distribution == distribution]
    return found


def test_builtins_come_through_the_same_hooks() -> None:
    registry = load_registry()
    builtin = registry.plugins[0]
    assert (builtin.name, builtin.distribution, builtin.error) == ("builtin", "adaptrt", None)
    assert "lora" in registry.variants
    assert {"cpu", "reference"} <= set(registry.backends)
    assert "llama" in registry.architectures
    for kind in ("variants", "backends", "architectures", "importers"):
        named = getattr(registry, kind)
        assert all(thing.name == name for name, thing in named.items())
        assert set(builtin.provides[kind]) <= set(named)


def test_a_strangers_plugin_is_found(install: Install) -> None:
    install("toy", BACKEND.format(name="toychip"))
    registry = load_registry()
    assert registry.backends["toychip"].name == "toychip"
    assert record(registry, "toy") == PluginRecord("toy", "toy", "1.2", {"backends": ("toychip",)})


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def oops(:", "SyntaxError: "),
        (
            BACKEND.format(name="x").replace("return [Toy()]", "raise ValueError('two\\nlines')"),
            "ValueError: two lines",
        ),
        (
            "from adaptrt.hookspecs import hookimpl\n@hookimpl\ndef adaptrt_variant():\n    return []",
            "there is no hook 'adaptrt_variant', did you mean 'adaptrt_variants'?",
        ),
        (
            "from adaptrt.hookspecs import hookimpl\n@hookimpl\ndef zzz():\n    return []",
            "there is no hook 'zzz', expected one of adaptrt_variants, ",
        ),
        (
            "from adaptrt.hookspecs import hookimpl\n@hookimpl\ndef adaptrt_variants(wish):\n    return []",
            "PluginValidationError: ",
        ),
        (
            BACKEND.format(name="x").replace("[Toy()]", "[Toy]"),
            "adaptrt_backends returned the class Toy, expected an instance of it",
        ),
        (BACKEND.format(name=""), "adaptrt_backends returned a Toy without a name"),
        (
            BACKEND.format(name="x").replace("[Toy()]", "[Toy(), Toy()]"),
            "adaptrt_backends returned two named 'x'",
        ),
        (BACKEND.format(name="x").replace("[Toy()]", "7"), "TypeError: "),
        (
            BACKEND.format(name="x").replace("unavailable", "available"),
            "adaptrt_backends returned a Toy named 'x', expected a Backend (adaptrt.backends.base)",
        ),
        (
            BACKEND.format(name="x").replace("adaptrt_backends", "adaptrt_variants"),
            "adaptrt_variants returned a Toy named 'x', expected a Variant (adaptrt.adapters.variant)",
        ),
        ("raise BaseException('neither')", "BaseException: neither"),
    ],
)
def test_a_broken_plugin_is_named_and_skipped(
    install: Install, caplog: pytest.LogCaptureFixture, source: str, error: str
) -> None:
    sound = load_registry()
    install("broken", source)
    with caplog.at_level(logging.WARNING, "adaptrt"):
        registry = load_registry()
    found = record(registry, "broken")
    assert found.error is not None
    assert found.error.startswith(error)
    assert "\n" not in found.error
    assert found.provides == {}
    assert f"plugin broken (broken 1.2) skipped: {found.error}" in caplog.messages
    for kind in ("variants", "backends", "architectures", "importers"):
        assert list(getattr(registry, kind)) == list(getattr(sound, kind))


def test_a_backend_that_cannot_say_whether_it_is_here_is_listed(install: Install) -> None:
    install("odd", BACKEND.format(name="odd").replace("return None", "return 1 / 0"))
    outcome = adaptrt_cli("plugins")
    assert outcome.code == 0
    assert "backend odd cannot run here: ZeroDivisionError: division by zero" in outcome.out


def test_a_misspelt_hook_takes_its_whole_plugin_down(install: Install) -> None:
    install("half", BACKEND.format(name="half") + "\n@hookimpl\ndef adaptrt_importer():\n    return []\n")
    registry = load_registry()
    assert (
        record(registry, "half").error
        == "there is no hook 'adaptrt_importer', did you mean 'adaptrt_importers'?"
    )
    assert "half" not in registry.backends


def test_a_name_that_is_taken_is_refused_and_the_builtin_wins(install: Install) -> None:
    install("usurper", BACKEND.format(name="reference"))
    registry = load_registry()
    assert record(registry, "usurper").error == "backend 'reference' already comes from builtin (adaptrt)"
    assert type(registry.backends["reference"]).__module__ == "adaptrt.backends.reference"


def test_of_two_strangers_the_first_by_name_wins(install: Install) -> None:
    install("second", BACKEND.format(name="shared"))
    install("first", BACKEND.format(name="shared"))
    registry = load_registry()
    assert record(registry, "first").error is None
    assert record(registry, "second").error == "backend 'shared' already comes from first (first)"
    assert type(registry.backends["shared"]).__module__ == "adaptrt_test_first"
