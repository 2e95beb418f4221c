"""Finds plugins, asks each what it offers, and keeps what is sound.

A plugin is all or nothing: one that fails to import, raises in a hook, misspells a hook, offers something of
another type or under a name that is already taken contributes nothing. It is recorded with its error and named in a
warning, never fatal. The built-ins come first, then plugins in adaptrt's own distribution, then everyone else's by
name.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from adaptrt import __version__, hookspecs
from adaptrt.errors import PluginError

if TYPE_CHECKING:
    from adaptrt.adapters.variant import Variant
    from adaptrt.backends.base import Backend
    from adaptrt.convert.base import Importer
    from adaptrt.model.architecture import Architecture

log = logging.getLogger("adaptrt.plugins")

GROUP = "adaptrt"
CONTRACTS = {  # kind → what each thing of it is; imported with the built-ins, which bring all four
    "variants": ("adaptrt.adapters.variant", "Variant"),
    "backends": ("adaptrt.backends.base", "Backend"),
    "architectures": ("adaptrt.model.architecture", "Architecture"),
    "importers": ("adaptrt.convert.base", "Importer"),
}
KINDS = tuple(CONTRACTS)
HOOKS = {f"adaptrt_{kind}": kind for kind in KINDS}

Offer = dict[str, dict[str, Any]]  # kind → name → object


@dataclass(frozen=True)
class PluginRecord:
    """One plugin as `adaptrt plugins` shows it; `error` says why it was skipped, or is None."""

    name: str
    distribution: str
    version: str
    provides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kind → names
    error: str | None = None


@dataclass(frozen=True)
class Registry:
    """Everything sound that was found, by name, and a record of every plugin."""

    variants: Mapping[str, Variant]
    backends: Mapping[str, Backend]
    architectures: Mapping[str, Architecture]
    importers: Mapping[str, Importer]
    plugins: tuple[PluginRecord, ...]


@dataclass(frozen=True)
class _Source:
    """Where a plugin comes from; `load` imports it."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]


def load_registry() -> Registry:
    """Load the built-ins and every installed plugin; each one that is skipped is logged as a warning."""
    taken: dict[str, dict[str, _Source]] = {kind: {} for kind in KINDS}
    objects: Offer = {kind: {} for kind in KINDS}
    records = []
    for source in _sources():
        try:
            offer = _ask(source)
            _refuse_collisions(offer, taken)
        except PluginError as error:
            log.warning(
                "plugin %s (%s %s) skipped: %s", source.name, source.distribution, source.version, error
            )
            records.append(PluginRecord(source.name, source.distribution, source.version, error=str(error)))
            continue
        for kind, named in offer.items():
            objects[kind].update(named)
            taken[kind].update(dict.fromkeys(named, source))
        provides = {kind: tuple(named) for kind, named in offer.items() if named}
        records.append(PluginRecord(source.name, source.distribution, source.version, provides))
    return Registry(**objects, plugins=tuple(records))


def _sources() -> Iterator[_Source]:
    """The built-ins, then entry points: our own distribution's first, then by name and distribution."""
    yield _Source("builtin", "adaptrt", __version__, lambda: import_module("adaptrt.builtin"))
    found = [_entry_source(point) for point in entry_points(group=GROUP)]
    yield from sorted(
        found, key=lambda source: (source.distribution != "adaptrt", source.name, source.distribution)
    )


def _entry_source(point: EntryPoint) -> _Source:
    if point.dist is None:
        return _Source(point.name, "unknown", "", point.load)
    return _Source(point.name, point.dist.name, point.dist.version, point.load)


def _ask(source: _Source) -> Offer:
    """Import one plugin and call its hooks, in a manager of its own: what fails is this plugin's doing.

    Raises PluginError for whatever is wrong with it.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        plugin = source.load()
        _refuse_unknown_hooks(manager, plugin)
        manager.register(plugin, source.name)
        return {kind: _named(hook, kind, getattr(manager.hook, hook)()) for hook, kind in HOOKS.items()}
    except PluginError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's code may fail in any way; none may take us down
        raise PluginError(_one_line(error)) from error


def _refuse_unknown_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    for name in dir(plugin):
        if manager.parse_hookimpl_opts(plugin, name) is None or name in HOOKS:
            continue
        near = difflib.get_close_matches(name, HOOKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(HOOKS)}"
        raise PluginError(f"there is no hook '{name}', {hint}")


def _named(hook: str, kind: str, results: list[Any]) -> dict[str, Any]:
    """Flatten what a hook returned into name → object."""
    module, contract = CONTRACTS[kind]
    named: dict[str, Any] = {}
    for item in (item for result in results for item in result):
        if isinstance(item, type):
            raise PluginError(f"{hook} returned the class {item.__name__}, expected an instance of it")
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f"{hook} returned a {type(item).__name__} without a name")
        if not isinstance(item, getattr(import_module(module), contract)):
            found = f"{hook} returned a {type(item).__name__} named '{name}'"
            raise PluginError(f"{found}, expected a {contract} ({module})")
        if name in named:
            raise PluginError(f"{hook} returned two named '{name}'")
        named[name] = item
    return named


def _refuse_collisions(offer: Offer, taken: Mapping[str, Mapping[str, _Source]]) -> None:
    for kind, named in offer.items():
        for name in named:
            if holder := taken[kind].get(name):
                kind = kind.removesuffix("s")
                raise PluginError(f"{kind} '{name}' already comes from {holder.name} ({holder.distribution})")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
