"""`adaptrt plugins`: what is installed, what each plugin provides, and why one was skipped."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from adaptrt.cli.options import as_json
from adaptrt.plugins import PluginRecord, load_registry


@click.command()
@as_json
def command(as_json: bool) -> None:
    """List plugins and what they provide."""
    registry = load_registry()
    if as_json:
        backends = {name: backend.unavailable() for name, backend in registry.backends.items()}
        plugins = [asdict(plugin) for plugin in registry.plugins]
        click.echo(
            json.dumps({"plugins": plugins, "unavailable_backends": {k: v for k, v in backends.items() if v}})
        )
        return
    for plugin in registry.plugins:
        click.echo(f"{plugin.name} ({plugin.distribution} {plugin.version}): {_outcome(plugin)}")
    for name, backend in registry.backends.items():
        if reason := backend.unavailable():
            click.echo(f"backend {name} cannot run here: {reason}")


def _outcome(plugin: PluginRecord) -> str:
    if plugin.error is not None:
        return f"skipped: {plugin.error}"
    return (
        "; ".join(f"{kind} {', '.join(names)}" for kind, names in plugin.provides.items())
        or "provides nothing"
    )
