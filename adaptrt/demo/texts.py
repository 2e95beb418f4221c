"""The public-domain texts the demo is trained on, cleaned and cut into documents."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One text: how paragraphs join, and its share of the base model's batches."""

    name: str
    separator: str
    share: float


# The shares are flatter than the file sizes (48, 33, 13 and 5 %), so that no single voice
# owns the base model and every adapter has something to change.
SOURCES = [
    Source("kjv", "\n", 0.30),
    Source("presidents", "\n", 0.36),
    Source("shakespeare", "\n\n", 0.18),
    Source("grimm", "\n", 0.16),
]


def plain_quotes(text: str) -> str:
    """Replace typographic quotes and dashes: only one book has them, prompts never do."""
    for fancy, plain in zip("\u201c\u201d\u2018\u2019\u2014", ['"', '"', "'", "'", "--"], strict=True):
        text = text.replace(fancy, plain)
    return text


def lines_of(text: str) -> list[str]:
    """Split into stripped, non-empty lines."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def presidents_paragraphs(text: str) -> list[str]:
    """One paragraph a line, without titles, dates and footnotes.

    Some speeches run into the next one's title on the same line; that title is cut off.
    """
    text = re.sub(r"(?<=[.!?])(?=(PRESIDENT|SPECIAL MESSAGE) )", "\n", text)
    date = re.compile(r"^[A-Z][a-z]+ \d{1,2}, \d{4}")
    return [p for p in lines_of(text) if p != p.upper() and not date.match(p) and len(p) > 20]


def grimm_paragraphs(text: str) -> list[str]:
    """The tales alone, with hard-wrapped lines joined again.

    The front matter ends at the first tale's title (the contents list the same title with
    a page number behind it).  The file has no blank lines, so a paragraph is taken to end
    at a line too short to have been wrapped.
    """
    lines = lines_of(re.sub(r"\[Illustration.*?\]", "", text, flags=re.DOTALL).replace("_", ""))
    start = lines.index("THE FROG-KING; OR, IRON HENRY")
    stop = next(i for i, line in enumerate(lines) if line.startswith("Transcriber's Notes"))
    paragraphs: list[str] = []
    current: list[str] = []
    for line in lines[start:stop]:
        title = line == line.upper() and len(line) > 5
        if not title:
            current.append(line)
        if title or len(line) < 58:
            paragraphs.append(" ".join(current))
            current = []
    return [p for p in [*paragraphs, " ".join(current)] if p]


def read_paragraphs(corpora: Path, name: str) -> list[str]:
    """Return one text as paragraphs: verses, speeches or prose paragraphs."""
    text = plain_quotes((corpora / f"{name}.txt").read_text(encoding="utf-8"))
    if name == "shakespeare":
        return [p.strip() for p in text.split("\n\n") if p.strip()]
    if name == "presidents":
        return presidents_paragraphs(text)
    if name == "grimm":
        return grimm_paragraphs(text)
    return lines_of(text)


def group_documents(paragraphs: list[str], separator: str, seed: int) -> list[str]:
    """Group neighbouring paragraphs into documents of 500 to 2500 characters.

    The model learns to begin after bos and to stop with eos, so documents are short enough
    for both to be seen often and vary in size so that length alone does not predict eos.
    """
    rng = random.Random(seed)
    documents: list[str] = []
    current: list[str] = []
    goal = rng.randint(500, 2500)
    for paragraph in paragraphs:
        current.append(paragraph)
        if sum(map(len, current)) >= goal:
            documents.append(separator.join(current))
            current, goal = [], rng.randint(500, 2500)
    return [*documents, separator.join(current)] if current else documents


def read_sources(corpora: Path, seed: int) -> dict[str, list[str]]:
    """Read, clean and group all four texts."""
    return {s.name: group_documents(read_paragraphs(corpora, s.name), s.separator, seed) for s in SOURCES}
