"""adaptrt: a local runtime for adapters. `adaptrt.load("base.adrt")` gives a Model; see README.md."""

from __future__ import annotations

from adaptrt.errors import AdaptrtError

# As type checkers take it; importing it from typing would take most of this module's time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from adaptrt.api import Chunk, Model, Request, Sampling, load

__version__ = "0.1.0"
__all__ = ["AdaptrtError", "Chunk", "Model", "Request", "Sampling", "__version__", "load"]


def __getattr__(name: str) -> object:
    """Import numpy and everything above it only when something is used: `import adaptrt` stays instant."""
    if name in ("Chunk", "Model", "Request", "Sampling", "load"):
        from adaptrt import api

        return getattr(api, name)
    raise AttributeError(f"module 'adaptrt' has no attribute {name!r}")
