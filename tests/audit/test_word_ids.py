"""The oracle's ids of remembered words are those of whole texts, and where they are not, none are remembered."""

from __future__ import annotations

import pytest

from ptst.audit.reference import word_ids
from ptst.audit.reference.tokenizer import open_reference_tokenizer
from ptst.audit.reference.word_ids import WordIds
from tests.text.test_word_cache import OTHERS, RULES, _added, _hostile, _tokenizer


def read(folder, changes, added=()):
    """A tokenizer.json as the oracle has it."""
    return open_reference_tokenizer(_tokenizer(folder, changes, added).origin).file


@pytest.mark.parametrize("changes", RULES.values(), ids=RULES)
def test_ids_of_words_are_those_of_the_text(tmp_path, changes, monkeypatch):
    file = read(tmp_path, changes)
    monkeypatch.setattr(word_ids, "EVERY", 10**9)
    for seed in range(3):  # later on, words are known from before
        texts = _hostile(seed, 300)
        assert file.encode(texts, False) == file._run(file._whole, texts)
    assert file._words is not None and file._words._holds and len(file._words._known) > 100


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_other_rules_encode_whole_texts(tmp_path, changes):
    assert read(tmp_path, changes)._words is None


@pytest.mark.parametrize("added", [_added("to be"), _added("x", lstrip=True), _added("x", single_word=True)])
def test_an_added_token_that_reaches_over_a_space(tmp_path, added):
    assert read(tmp_path, RULES["gpt2"], (added,))._words is None
    assert read(tmp_path, RULES["gpt2"], (_added("x"),))._words is not None


def test_where_words_are_no_tokens_of_a_text_all_are_encoded_whole(monkeypatch):
    def encode(texts):
        return [[len(text)] for text in texts]

    monkeypatch.setattr(word_ids, "EVERY", 4)
    words = WordIds(encode)
    texts = ["one", "two", "three", "four", "five", "six", "seven", "eight and nine", "ten of them"]
    assert words.encode(texts[:6]) == encode(texts[:6])
    assert words.encode(["one two", "three four", *texts]) == encode(["one two", "three four", *texts])
    assert not words._holds and words.encode(["a b"]) == [[3]]


def test_words_are_forgotten_and_long_ones_not_remembered(monkeypatch):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return [[ord(c) for c in text] for text in texts]

    monkeypatch.setattr(word_ids, "MOST", 3)
    monkeypatch.setattr(word_ids, "EVERY", 10**9)
    words = WordIds(encode)
    long = "x" * 70
    for text in ("a b c d", "a b", f"a {long}", "a  b\nc "):
        assert words.encode([text]) == [[ord(c) for c in text]]
    assert asked.count("a") == 2 and asked.count(f"a {long}") == 1  # forgotten in between; encoded whole
    assert long not in "".join(words._known) and len(words._known) < 8
