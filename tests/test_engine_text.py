"""Streaming text: whole characters only, and stop strings cut exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adaptrt.engine import template as renderer
from adaptrt.engine.chat import render
from adaptrt.engine.text import REPLACEMENT, Detokenizer, StopMatcher, Tokenizer
from adaptrt.errors import ModelError, RequestError

CORPUS = ["the quick brown fox", "jumps over the lazy dog", "čeština, русский, 日本語, 🦊🦊 and ünïcödé"]


def byte_level_json() -> str:
    hf = HfTokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return str(hf.to_str())


def sentencepiece_like() -> Tokenizer:
    """Llama 2's way: ▁ for spaces, bytes as <0xNN>, a leading space that the decoder strips."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for letter in sorted({c for text in CORPUS[:2] for c in text.replace(" ", "▁")}):
        vocab[letter] = len(vocab)
    hf = HfTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(hf.to_str().encode())


TOKENIZERS = {"byte-level": Tokenizer(byte_level_json().encode()), "sentencepiece": sentencepiece_like()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.characters(exclude_characters=REPLACEMENT, exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_stream_is_the_text_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt, ids = tokenizer.encode("the fox"), tokenizer.encode("the fox" + text)
    if ids[: len(prompt)] != prompt:
        return  # the text merged into the prompt's last token: no such stream exists
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in ids[len(prompt) :]]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_incomplete_character_at_the_end_is_shown_as_replacement() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("鬱")  # not in the corpus: three byte tokens
    assert len(ids) == 3
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("fox"))
    assert [detokenizer.push(token) for token in ids[:2]] == ["", ""]
    assert set(detokenizer.flush()) == {REPLACEMENT}


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_at_the_first_match_however_the_text_arrives(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """The cut is where a stop string first becomes complete, reading letter by letter."""
    matcher, shown = StopMatcher(stops), ""
    rest = text
    while rest and not matcher.stopped:
        shown += matcher.push(rest[0])
        rest = rest[1:]
    shown += matcher.flush()
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert shown == text and not matcher.stopped
        return
    complete = text[: ends[0]]
    longest = max(len(stop) for stop in stops if complete.endswith(stop))
    assert matcher.stopped and shown == complete[:-longest]


def test_stop_string_spanning_pieces_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("keep E") == "keep "
    assert matcher.push("N") == ""
    assert matcher.push("T") == "ENT"
    assert matcher.push("END tail") == "" and matcher.stopped


def test_unreadable_tokenizer_is_one_error() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(b"{}")


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # the library panics over it
NO_SUCH_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
UNKNOWN = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"fox": 0}}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"normalizer": PRECOMPILED}, "cannot be read"),
        ({"post_processor": NO_SUCH_TOKEN}, "cannot encode"),
        ({"model": UNKNOWN, "pre_tokenizer": None}, "cannot encode"),
    ],
    ids=["panic at load", "panic at use", "error at use"],
)
def test_a_tokenizer_that_fails_in_the_library_is_one_error(changes: dict[str, object], what: str) -> None:
    broken = json.loads(byte_level_json()) | changes
    with pytest.raises(ModelError, match=rf"tokenizer\.json: {what}"):
        Tokenizer(json.dumps(broken).encode()).encode("the quick fox")


def test_truncation_and_padding_do_not_act_as_in_transformers() -> None:
    hf = HfTokenizer.from_str(byte_level_json())
    whole = hf.encode("the quick brown fox").ids
    hf.enable_truncation(2)
    hf.enable_padding(length=64)
    assert len(hf.encode("the quick brown fox").ids) == 64
    oracle = PreTrainedTokenizerFast(tokenizer_object=hf)
    assert Tokenizer(hf.to_str().encode()).encode("the quick brown fox") == whole
    assert oracle("the quick brown fox").input_ids == whole


@pytest.mark.parametrize("text", ["a\ud83d", "\udcff"])
def test_text_that_is_not_unicode_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=rf"character {len(text) - 1} is '.ud"):
        TOKENIZERS["byte-level"].encode(text)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(RequestError, match="text: found a bytes, expected text"):
        TOKENIZERS["byte-level"].encode(b"abc")  # type: ignore[arg-type]


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_chat_template_matches_transformers(tmp_path: object) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "a <b> & 'c'"}, {"role": "assistant", "content": "d"}]
    template = (
        CHATML
        + "{{ {'k': 'é<'} | tojson }}{% for i in [1,2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        + "{% if tools is not none %}tools{% endif %}{{ documents is defined }}{{ eos_token is defined }}"
        + "{{ {'b': [1, 2], 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
        + "{% generation %}said {{ messages[1].content }}{% endgeneration %}."
    )
    expected, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(template, messages, {"bos_token": "<s>"}) == expected[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ '{0.x} {1}'.format(5) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_chat_templates_are_one_error(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        render(template, [{"role": "user", "content": "x"}], {})


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{{ 'x'.ljust(10**10) }}", "needs more than 512 MiB"),
        (
            "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "needs more",
        ),
        ("{{ 'x' * 17000000 }}", "made 17000000 characters, expected at most 16777216"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "did not finish in 1 s",
        ),
    ],
)
def test_a_chat_template_has_limits(template: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "SECONDS", 1 if "finish" in limit else 60)
    with pytest.raises(ModelError, match=f"chat template: {limit}"):
        render(template, [], {})


def test_a_path_among_python_s_paths_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.path", [tmp_path, *sys.path])  # as notebooks do
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "x"}], {}) == "x"


def test_a_chat_template_that_cannot_be_run_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"messages: found \['x'\], expected a list of"):
        render("", ["x"], {})  # type: ignore[list-item]
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ModelError, match=r"^chat template: ended with code 1$"):
        render("", [], {})
    monkeypatch.setattr("sys.executable", "/nowhere")
    with pytest.raises(
        ModelError, match=r"^chat template: cannot start /nowhere: No such file or directory$"
    ):
        render("", [], {})
