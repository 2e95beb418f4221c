"""A tiny model with a tokenizer and a chat template, for tests that go through text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.oracle import llama_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from adaptrt.convert.base import ConvertOptions
from adaptrt.plugins import load_registry

BOS, EOS, TURN = "<s>", "</s>", "<turn>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, BOS in front: any text round-trips, and a character may span several tokens."""
    specials = [BOS, EOS, TURN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    return tokenizer


def tiny_folder(path: Path, seed: int = 0, chat: bool = True, **changes: Any) -> Path:
    """A random Llama as a Hugging Face folder with a byte tokenizer; `changes` go into its config."""
    tokenizer = byte_tokenizer()
    size = tokenizer.get_vocab_size()
    llama_folder(path, seed, **{"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1} | changes)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def convert_model(folder: Path, out: Path, **options: Any) -> Path:
    """Convert a model folder with the built-in importer."""
    load_registry().importers["hf"].convert(folder, out, ConvertOptions(**options), lambda *_: None)
    return out
