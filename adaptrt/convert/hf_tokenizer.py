"""What a Hugging Face folder says about text: tokenizer.json, special tokens, end ids, the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrt.convert.files import JSON_LIMIT, read_bytes, read_json, shown
from adaptrt.errors import ConvertError

TOKENIZER_LIMIT = 1 << 27  # bytes; the largest published tokenizer.json files are about 35 MB
SPECIALS = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class TextFiles:
    """`tokenizer` is tokenizer.json verbatim, None when there is none; `metadata` is ready for the file."""

    tokenizer: bytes | None
    metadata: dict[str, Any]


def read_text_files(folder: Path, config: Mapping[str, Any], vocab_size: int) -> TextFiles:
    """Read and check them. Raises ConvertError for a file that is there but cannot be used."""
    path = folder / "tokenizer.json"
    stored = read_bytes(path, TOKENIZER_LIMIT) if path.exists() else None
    tokenizer = _load(stored, path)
    settings = _optional_json(folder / "tokenizer_config.json")
    special_map = _optional_json(folder / "special_tokens_map.json")
    generation = _optional_json(folder / "generation_config.json")
    metadata: dict[str, Any] = {}
    for name in SPECIALS:
        text = _token_text(folder, f"{name}_token", settings, special_map)
        ids = _token_ids(folder, f"{name}_token_id", generation, config, vocab_size)
        known = tokenizer.token_to_id(text) if tokenizer is not None and text is not None else None
        # Fine-tunes often change only the tokenizer's end token, so both kinds of end count.
        if known is not None and known not in ids and (name == "eos" or not ids) and known < vocab_size:
            ids.append(known)
        metadata |= _special(name, text, ids)
    template = _chat_template(folder, settings)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return TextFiles(stored, metadata)


def _special(name: str, text: str | None, ids: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {} if text is None else {f"tokenizer.{name}_token": text}
    if ids and name == "eos":
        found["tokenizer.eos_token_ids"] = ids
    elif ids:
        found[f"tokenizer.{name}_token_id"] = ids[0]
    return found


def _load(stored: bytes | None, path: Path) -> Any:
    """The tokenizer, so that a damaged one is found now and not at the first prompt."""
    if stored is None:
        return None
    from tokenizers import Tokenizer  # deferred: slow to import, and not every folder has a tokenizer

    try:
        return Tokenizer.from_buffer(stored)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises plain Exception, and panics, which are none
        reason = " ".join(str(error).split())[:160]
        raise ConvertError(f"{path}: not a tokenizer that can be read ({reason})") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, JSON_LIMIT) if path.exists() else {}


def _token_text(folder: Path, key: str, *sources: Mapping[str, Any]) -> str | None:
    """A special token's text from the first source that has it: a string, or an object with `content`."""
    for source in sources:
        value = source.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise ConvertError(f"{folder}: {key} is {shown(value)}, expected a string")
        if value is not None:
            return value
    return None


def _token_ids(
    folder: Path, key: str, generation: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int
) -> list[int]:
    """Ids from generation_config.json, else config.json, as in transformers; -1 means none (Llama 1)."""
    value = config.get(key) if generation.get(key) is None else generation[key]
    ids = value if isinstance(value, list) else [value]
    ids = [item for item in ids if item is not None and item != -1]
    for item in ids:
        if type(item) is not int or not 0 <= item < vocab_size:
            found = shown(item)
            raise ConvertError(f"{folder}: {key} is {found}, expected a token id from 0 to {vocab_size - 1}")
    return list(dict.fromkeys(ids))


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template; a file of its own wins over tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return _utf8(read_bytes(path, JSON_LIMIT), path)
    for name, source in (
        ("chat_template.json", _optional_json(folder / "chat_template.json")),
        ("tokenizer_config.json", settings),
    ):
        value = source.get("chat_template")
        if isinstance(value, list):  # named templates; the others are for tools and retrieval
            named = [item for item in value if isinstance(item, Mapping) and item.get("name") == "default"]
            value = named[0].get("template") if named else None
        if value is not None and not isinstance(value, str):
            raise ConvertError(
                f"{folder / name}: chat_template is a {type(value).__name__}, expected a string"
            )
        if value is not None:
            return value
    return None


def _utf8(text: bytes, path: Path) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path}: not UTF-8 at byte {error.start}") from error
