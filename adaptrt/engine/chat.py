"""Chat templates: a model's own jinja2 template, run in a sandbox as transformers runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from adaptrt.errors import ModelError


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The prompt for `messages` ({"role", "content"}), ending where the assistant speaks.

    `special_tokens` gives bos_token, eos_token, … to the template, as Hugging Face does. Raises ModelError naming
    what the template refused.
    """
    variables = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
    try:
        return str(_environment().from_string(template).render(variables, **special_tokens))
    except ModelError:
        raise
    except Exception as error:  # a stranger's code may fail in any way
        raise ModelError(f"chat template: {str(error) or type(error).__name__}") from error


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
    raise ModelError(f"chat template: {message}")
