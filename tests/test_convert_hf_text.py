"""Tokenizer, special tokens, end ids and chat template, against transformers' reading of the same folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.oracle import llama_folder
from helpers.tiny import BOS, CHAT_TEMPLATE, EOS, tiny_folder
from transformers import AutoTokenizer

from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.hf import HfImporter
from adaptrt.format import File, open_file


def convert(folder: Path) -> File:
    HfImporter().convert(folder, folder / "out.adrt", ConvertOptions(), lambda *_: None)
    return open_file(folder / "out.adrt")


def edit(path: Path, **changes: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "hf")


def test_tokenizer_is_stored_verbatim(folder: Path) -> None:
    file = convert(folder)
    stored = file.tensor("tokenizer", "tokenizer.json")
    assert stored.data.tobytes() == (folder / "tokenizer.json").read_bytes()
    assert file.sections["tokenizer"].kind == "tokenizer"
    assert file.sections["tokenizer"].codec == "zstd"


def test_special_tokens_and_template_equal_transformers(folder: Path) -> None:
    metadata = convert(folder).metadata
    oracle = AutoTokenizer.from_pretrained(folder)
    assert metadata["tokenizer.bos_token"] == oracle.bos_token == BOS
    assert metadata["tokenizer.eos_token"] == oracle.eos_token == EOS
    assert metadata["tokenizer.bos_token_id"] == oracle.bos_token_id
    assert metadata["tokenizer.eos_token_ids"] == [oracle.eos_token_id]
    assert metadata["tokenizer.chat_template"] == oracle.chat_template == CHAT_TEMPLATE
    assert "tokenizer.pad_token" not in metadata
    assert oracle.pad_token is None


def test_end_ids_come_from_generation_config_and_the_tokenizer(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 9, 7])
    assert convert(folder).metadata["tokenizer.eos_token_ids"] == [7, 9, 1]
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "config.json", eos_token_id=5)
    assert convert(folder).metadata["tokenizer.eos_token_ids"] == [5, 1]


def test_minus_one_means_no_token(folder: Path) -> None:
    edit(folder / "generation_config.json", pad_token_id=-1)
    assert "tokenizer.pad_token_id" not in convert(folder).metadata


def test_added_token_objects_and_the_special_tokens_map(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token={"content": EOS, "lstrip": False}, bos_token=None)
    edit(folder / "special_tokens_map.json", bos_token={"content": "<turn>"}, eos_token="ignored")
    metadata = convert(folder).metadata
    assert (metadata["tokenizer.bos_token"], metadata["tokenizer.eos_token"]) == ("<turn>", EOS)


def test_template_file_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file {{ '…' }}", encoding="utf-8")
    assert convert(folder).metadata["tokenizer.chat_template"] == "from the file {{ '…' }}"
    assert AutoTokenizer.from_pretrained(folder).chat_template == "from the file {{ '…' }}"


def test_template_json_and_named_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert convert(folder).metadata["tokenizer.chat_template"] == "plain"
    edit(folder / "chat_template.json", chat_template="from json")
    assert convert(folder).metadata["tokenizer.chat_template"] == "from json"


def test_without_a_tokenizer_there_is_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = llama_folder(tmp_path / "hf", eos_token_id=2)
    with caplog.at_level(logging.WARNING, logger="adaptrt.convert"):
        file = convert(folder)
    assert "tokenizer" not in file.sections
    assert caplog.messages == [f"{folder}: no tokenizer.json, the file takes token ids but no text"]
    assert file.metadata["tokenizer.eos_token_ids"] == [2]
