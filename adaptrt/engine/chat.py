"""Chat templates: a model's own jinja2 template, run in a sandbox."""

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
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **special_tokens
        )
    except ModelError:
        raise
    except Exception as error:  # a stranger's code may fail in any way
        raise ModelError(f"chat template: {str(error) or type(error).__name__}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Like jinja2's filter but without HTML escaping, which prompts must not have."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ModelError(f"chat template: {message}")
