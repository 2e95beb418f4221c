"""Runs one chat template in a process of its own, started by chat.py: a stranger's program with limits.

jinja2's sandbox keeps a template from Python's insides but not from using all memory and time. Reads JSON on standard
input, {"path", "template", "variables"}, and writes {"text"} or {"error"}. To start quickly it imports no adaptrt.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

MEMORY = 512 << 20  # bytes of address space
SECONDS = 10
LONGEST_TEXT, LONGEST_MESSAGE = 16 << 20, 500  # characters


def main() -> None:
    """Answer the one request."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(ValueError, OSError):  # in case nobody is left to end this process
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    json.dump(_answer(), sys.stdout)


def _answer() -> dict[str, str]:
    try:
        request = json.load(sys.stdin)
        sys.path[:] = request["path"]
        text = render(request["template"], request["variables"])
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # a stranger's code may fail in any way
        return {"error": (str(error) or type(error).__name__)[:LONGEST_MESSAGE]}
    if len(text) > LONGEST_TEXT:
        return {"error": f"made {len(text)} characters, expected at most {LONGEST_TEXT}"}
    return {"text": text}


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text, as transformers makes it."""
    return str(_environment().from_string(template).render(**variables))


def _environment() -> Any:
    """What transformers gives to templates."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant says, for training; the text is that of its body."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

        def parse(self, parser: Any) -> Any:
            """The body."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like jinja2's filter but without HTML escaping, which prompts must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    main()
