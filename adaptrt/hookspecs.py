"""What a plugin may implement. Publish a module under the entry-point group `adaptrt` and decorate with `hookimpl`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from adaptrt.adapters.variant import Variant
    from adaptrt.backends.base import Backend
    from adaptrt.convert.base import Importer
    from adaptrt.model.architecture import Architecture

hookspec = pluggy.HookspecMarker("adaptrt")
hookimpl = pluggy.HookimplMarker("adaptrt")


@hookspec
def adaptrt_variants() -> Iterable[Variant]:  # type: ignore[empty-body]
    """Adapter variants: how a method's PEFT folder is read and lowered to the normal form."""


@hookspec
def adaptrt_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Backends: what runs a Program."""


@hookspec
def adaptrt_architectures() -> Iterable[Architecture]:  # type: ignore[empty-body]
    """Model architectures: how a Hugging Face config becomes metadata, tensor names and a Program."""


@hookspec
def adaptrt_importers() -> Iterable[Importer]:  # type: ignore[empty-body]
    """Importers: how a foreign file or folder becomes an `.adrt` file."""
