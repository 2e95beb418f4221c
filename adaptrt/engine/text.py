"""Text ↔ token ids: the tokenizer, the streaming detokenizer and stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptrt.errors import ModelError, RequestError

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not yet a whole character


class Tokenizer:
    """A Hugging Face tokenizer.json. Raises ModelError when it cannot be read or used.

    Its `truncation` and `padding` are what a training run left behind; as in transformers they do not act.
    """

    def __init__(self, json_bytes: bytes) -> None:
        from tokenizers import Tokenizer as HfTokenizer  # deferred: nothing else needs it

        with _naming("cannot be read"):
            self._hf: Any = HfTokenizer.from_buffer(json_bytes)
        self._hf.no_truncation()
        self._hf.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; special tokens such as BOS are added as the tokenizer says.

        Raises RequestError for what is no text, or not Unicode: half of a surrogate pair, or a byte that was not UTF-8.
        """
        if not isinstance(text, str):
            raise RequestError(f"text: found a {type(text).__name__}, expected text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start} is {text[error.start]!r}"
            raise RequestError(f"text: {found}, which is no Unicode text, expected UTF-8") from None
        with _naming("cannot encode this text"):
            return list(self._hf.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        with _naming("cannot decode token ids"):
            return str(self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn the library's plain Exceptions, and its panics, which are none, into one ModelError."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ModelError(f"tokenizer.json: {what}: {' '.join(str(error).split())}") from error


def check_text_metadata(metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse a model file whose metadata about text has another type than it must. Raises ModelError."""
    ids = metadata.get("tokenizer.eos_token_ids", [])
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ModelError(
            f"{path}: metadata tokenizer.eos_token_ids is {ids!r:.80}, expected a list of token ids"
        )
    for key in ("tokenizer.chat_template", "general.sample_prompt"):
        if not isinstance(metadata.get(key, ""), str):
            raise ModelError(f"{path}: metadata {key} is {metadata[key]!r:.80}, expected text")


class Detokenizer:
    """Turns a stream of token ids into text that never ends inside a character.

    Decoders depend on neighbours (spaces, byte pieces), so each step decodes a short window twice: without and with
    the new tokens; the difference is the new text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-6:])
        self._start = 0  # window start
        self._shown = len(self._ids)  # ids whose text is out

    def push(self, token: int) -> str:
        """Text completed by this token, possibly empty."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end; an incomplete character shows as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class StopMatcher:
    """Cuts text at the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show; sets `stopped` when a stop string is complete."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._held_back())

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.stopped else self._take(len(self._held))

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken
