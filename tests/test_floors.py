"""design.md's floors: a package of adaptrt/ imports only from floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptrt

ROOT = Path(adaptrt.__file__).parent
FLOORS = (
    {"errors", "hookspecs", "tensor"},
    {"format", "quant"},
    {"program"},
    {"model"},
    {"adapters"},
    {"backends"},
    {"engine", "convert"},
    {"builtin", "plugins"},
    {"api"},
    {"bench"},
    {"cli"},
    {"testing"},
)
FLOOR = {package: number for number, packages in enumerate(FLOORS) for package in packages}
FRONT = {"__init__", "__main__"}  # the front doors: they lead to every floor
SEALED = {"demo"}  # data and the recipe that made it: nothing imports it
FOREIGN = {"torch", "transformers", "peft", "safetensors", "bitsandbytes"}


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names a module imports, also inside functions; those for type checkers only are left out."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, f"line {tree.lineno}: relative import"
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from runtime_imports(child)


SOURCES = sorted(path for path in ROOT.rglob("*.py") if package_of(path) not in SEALED)


def test_every_package_has_a_floor() -> None:
    found = {package_of(path) for path in SOURCES}
    assert found - FRONT == set(FLOOR), "a package is missing from the table or from the tree"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_come_from_floors_below(path: Path) -> None:
    own = package_of(path)
    for name in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
        first, *rest = name.split(".")
        assert first not in FOREIGN, f"{name}: a library that adaptrt must not need"
        if first != "adaptrt" or own in FRONT or rest[0] in (own, "__version__"):
            continue
        assert rest[0] in FLOOR, f"{name}: is on no floor"
        assert FLOOR[rest[0]] < FLOOR[own], f"{own} is on the same floor as {rest[0]}, or below it"


def test_the_checker_sees_hidden_imports_and_skips_types() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import adaptrt.api\n"
        "def late():\n    from adaptrt.engine import request\n    import adaptrt.cli.run as run\n"
    )
    assert list(runtime_imports(ast.parse(source))) == [
        "typing.TYPE_CHECKING",
        "adaptrt.engine.request",
        "adaptrt.cli.run",
    ]
