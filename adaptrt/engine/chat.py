"""Chat templates: a model's own jinja2 template, a stranger's program, run by template.py within limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adaptrt.engine import template as renderer
from adaptrt.errors import ModelError, RequestError


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The prompt for `messages` ({"role", "content"}), ending where the assistant speaks.

    `special_tokens` gives bos_token, eos_token, … to the template, as Hugging Face does. Raises ModelError naming
    what the template refused, or the limit of memory or time it went beyond; RequestError for messages that are none.
    """
    variables: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}
    try:
        variables |= {**special_tokens, "messages": [dict(message) for message in messages]}
        path = [str(entry) for entry in sys.path]  # notebooks put Paths there
        request = json.dumps({"path": path, "template": template, "variables": variables})
    except (TypeError, ValueError):
        raise RequestError(
            f"messages: found {messages!r:.80}, expected a list of {{'role': …, 'content': …}}"
        ) from None
    answer = _answer(request.encode())
    if "error" in answer:
        raise ModelError(f"chat template: {answer['error']}")
    return str(answer["text"])


def _answer(request: bytes) -> dict[str, Any]:
    """What the process says. Raises ModelError when it cannot be started or does not finish."""
    command = [sys.executable or "python3", "-I", "-S", renderer.__file__]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=renderer.SECONDS)
    except subprocess.TimeoutExpired:
        raise ModelError(f"chat template: did not finish in {renderer.SECONDS} seconds") from None
    except OSError as error:
        raise ModelError(f"chat template: cannot start {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(f"chat template: ended with code {done.returncode} {reason}".rstrip())
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
