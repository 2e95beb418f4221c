"""`adaptrt plugins`: what is installed and why a plugin was skipped; `adaptrt plugins new NAME`: a project for one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template

import click

from adaptrt.backends.base import Backend
from adaptrt.cli.notes import note
from adaptrt.cli.options import PATH, as_json
from adaptrt.errors import PluginError
from adaptrt.plugins import PluginRecord, Registry, load_registry

NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
LONGEST = 40


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List plugins and what they provide, or start one."""
    if ctx.invoked_subcommand is None:
        registry = load_registry()
        click.echo(_json(registry) if as_json else _text(registry))
    elif as_json:
        raise click.UsageError(f"--json does not go with {ctx.invoked_subcommand}")


@command.command()
@click.argument("name")
@click.option("--into", type=PATH, default=Path(), help="The folder to make it in.  [default: this one]")
def new(name: str, into: Path) -> None:
    """Write a project for a variant NAME, with its tests, into a new folder adaptrt-NAME."""
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise PluginError(
            f"plugin name {name!r}: expected at most {LONGEST} lower-case letters and digits, words joined by - or _"
        )
    if name in load_registry().variants:
        raise PluginError(f"plugin name {name!r}: a variant of this name is installed already")
    folder = into / f"adaptrt-{name}"
    if not into.is_dir():
        raise PluginError(f"{into}: no such folder")
    if folder.exists():
        raise PluginError(f"{folder}: exists already")
    _write(folder, project(name))
    note(f"wrote {folder}; next: cd {folder} && pip install -e '.[test]' && pytest")


def project(name: str) -> Mapping[str, str]:
    """The files of a new project by path: the templates of adaptrt/cli/new_plugin, filled in."""
    module = f"adaptrt_{name.replace('-', '_')}"
    words = re.split("[-_]", name)
    values = {
        "name": name,
        "module": module,
        "title": "".join(word.capitalize() for word in words),
        "peft_type": "_".join(words).upper(),
    }
    places = {
        "pyproject.toml": "pyproject.toml.in",
        "README.md": "README.md.in",
        f"{module}.py": "module.py.in",
        f"tests/test_{module}.py": "test.py.in",
    }
    templates = files("adaptrt.cli") / "new_plugin"
    return {
        path: Template((templates / source).read_text(encoding="utf-8")).substitute(values)
        for path, source in places.items()
    }


def _write(folder: Path, contents: Mapping[str, str]) -> None:
    """All of it or, when the disk refuses, nothing."""
    folder.mkdir()
    try:
        for path, text in contents.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PluginError(f"{folder}: {error.strerror}") from error


def _json(registry: Registry) -> str:
    backends = {name: _unavailable(backend) for name, backend in registry.backends.items()}
    plugins = [asdict(plugin) for plugin in registry.plugins]
    return json.dumps({"plugins": plugins, "unavailable_backends": {k: v for k, v in backends.items() if v}})


def _text(registry: Registry) -> str:
    lines = [
        f"{plugin.name} ({plugin.distribution} {plugin.version}): {_outcome(plugin)}"
        for plugin in registry.plugins
    ]
    for name, backend in registry.backends.items():
        if reason := _unavailable(backend):
            lines.append(f"backend {name} cannot run here: {reason}")
    return "\n".join(lines)


def _unavailable(backend: Backend) -> str | None:
    try:
        return backend.unavailable()
    except Exception as error:  # a stranger's code
        return f"{type(error).__name__}: {error}"


def _outcome(plugin: PluginRecord) -> str:
    if plugin.error is not None:
        return f"skipped: {plugin.error}"
    return (
        "; ".join(f"{kind} {', '.join(names)}" for kind, names in plugin.provides.items())
        or "provides nothing"
    )
