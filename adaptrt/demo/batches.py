"""From the demo's texts to what it is trained on: a tokenizer, token streams and batches of rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional

from adaptrt.demo.texts import Source

log = logging.getLogger("adaptrt.demo.recipe")

VOCAB = 2048
CONTEXT = 512
BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch shape."""

    steps: int
    batch: int
    length: int


# ----------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: list[str], folder: Path) -> Tokenizer:
    """Train and save a byte-level BPE, so that any UTF-8 text round-trips.

    All 256 byte symbols are in the vocabulary from the start; the special tokens are spelt
    so that ordinary prose or HTML does not contain them by accident.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    check_tokenizer(tokenizer)
    return tokenizer


def write_tokenizer_config(folder: Path) -> None:
    """Write tokenizer_config.json by hand: only keys every loader understands."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Fail early if a text does not survive encode and decode."""
    text = "Naïve café — 北京 🙂\t\n\n  two  spaces\u00a0\x00\x7f don't 12345 \u202e"
    encoded = tokenizer.encode(text)
    if encoded.ids[0] != BOS_ID or tokenizer.decode(encoded.ids) != text:
        raise ValueError("the tokenizer does not round-trip")


# ---------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Stream:
    """One source as tokens, split into a training and a held-out stream.

    ``starts`` are the training positions where a line begins.
    """

    name: str
    share: float
    train: Tensor
    starts: Tensor
    held_out: Tensor
    held_out_bytes: int


def pack(documents: list[str], tokenizer: Tokenizer) -> Tensor:
    """Concatenate documents as ``bos text eos`` into one plain token stream."""
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    tokens = [t for e in encoded for t in (BOS_ID, *e.ids, EOS_ID)]
    return torch.tensor(tokens, dtype=torch.long)


def line_starts(tokens: Tensor, newline: int) -> Tensor:
    """Positions right after a bos or a newline, where a row of a batch may begin."""
    opener = (tokens[:-1] == BOS_ID) | (tokens[:-1] == newline)
    return (opener & (tokens[1:] != newline)).nonzero().squeeze(1) + 1


def build_stream(source: Source, documents: list[str], tokenizer: Tokenizer) -> Stream:
    """Tokenize one source, holding out every 40th document to measure with."""
    held = documents[20::40]
    kept = [d for i, d in enumerate(documents) if i % 40 != 20]
    train = pack(kept, tokenizer)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[0]
    held_bytes = sum(len(d.encode()) for d in held)
    starts = line_starts(train, newline)
    log.info("%s: %d documents, %d training tokens", source.name, len(documents), len(train))
    return Stream(source.name, source.share, train, starts, pack(held, tokenizer), held_bytes)


def choose(options: Tensor, rng: torch.Generator) -> int:
    """Pick one element at random."""
    return int(options[int(torch.randint(len(options), (1,), generator=rng))])


def plain_row(stream: Stream, length: int, rng: torch.Generator) -> Tensor:
    """Return bos and ``length`` tokens of text from the start of a line.

    That is what a prompt looks like when the model is used, while any token of the text is
    still reached about equally often.
    """
    start = choose(stream.starts[stream.starts < len(stream.train) - length], rng)
    return functional.pad(stream.train[start : start + length], (1, 0), value=BOS_ID)


def spliced_row(stream: Stream, others: list[Stream], length: int, rng: torch.Generator) -> Tensor:
    """Return a row that opens with a few words of another text.

    Trained on its own text alone, an adapter leaves a prompt in somebody else's voice in
    that voice (a king by the sea stays in a fairy tale under the president's adapter).
    Here the text goes on from a place that follows the same token as the opening ends
    with, so the seam reads naturally and the adapter learns to take over any prompt.
    """
    other = others[choose(torch.arange(len(others)), rng)]
    opening = plain_row(other, choose(torch.arange(3, 14), rng), rng)
    places = (stream.train[:-length] == opening[-1]).nonzero().squeeze(1)
    place = choose(places if len(places) else torch.arange(len(stream.train) - length), rng) + 1
    return torch.cat([opening, stream.train[place:]])[: length + 1]


def mixed_batches(streams: list[Stream], phases: list[Phase], seed: int) -> Iterator[Tensor]:
    """Yield the base model's batches, each row's source picked by its share."""
    rng = torch.Generator().manual_seed(seed)
    shares = torch.tensor([s.share for s in streams])
    for phase in phases:
        for _ in range(phase.steps):
            picks = torch.multinomial(shares, phase.batch, replacement=True, generator=rng)
            yield torch.stack([plain_row(streams[i], phase.length, rng) for i in picks.tolist()])


def adapter_batches(stream: Stream, others: list[Stream], phase: Phase, seed: int) -> Iterator[Tensor]:
    """Yield an adapter's batches: half plain rows of its text, half spliced ones."""
    rng = torch.Generator().manual_seed(seed)
    half = phase.batch // 2
    for _ in range(phase.steps):
        plain = [plain_row(stream, phase.length, rng) for _ in range(half)]
        spliced = [spliced_row(stream, others, phase.length, rng) for _ in range(half)]
        yield torch.stack(plain + spliced)
