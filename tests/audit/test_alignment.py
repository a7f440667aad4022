"""A training sequence and a test prompt aligned: every token is there once, and what differs is told as different."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptst.audit.output.alignment import align, token_texts
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

IDS = st.lists(st.integers(3, 9), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def llama2(tokenizer):
    """A tokenizer of another kind, where there is one."""
    path = ROOT.parent / "shared/tokenizers/llama2.tokenizer.model"
    return SentencePieceTokenizer(path) if path.exists() else tokenizer


@given(training=IDS, answer=IDS, test=IDS)
def test_the_stretches_are_both_sequences(tokenizer, training, answer, test):
    loss_mask = [False] * len(training) + [True] * len(answer)
    found = align(training + answer, loss_mask, test, tokenizer)
    assert [i for s in found if s.kind != "test" for i in s.ids] == training + answer
    assert [i for s in found if s.kind in ("same", "test") for i in s.ids] == test
    assert [i for s in found if s.kind == "answer" for i in s.ids] == answer
    assert all(s.ids and len(s.ids) == len(s.texts) for s in found)
    for s in found:
        own, start = ((test, s.test), (training + answer, s.training))[s.kind != "test"]
        assert own[start : start + len(s.ids)] == s.ids
        if s.kind == "same":
            assert test[s.test : s.test + len(s.ids)] == s.ids
    assert all(a.kind != b.kind for a, b in pairwise(found))


def test_what_differs_and_what_does_not(tokenizer):
    training, test = [5, 6, 7, 8, 20, 21, 9, 10], [5, 6, 30, 7, 8, 9, 10]
    found = align([*training, 40, 41, 11], [False] * 8 + [True, True, False], test, tokenizer)
    assert [(s.kind, s.ids, s.training, s.test) for s in found] == [
        ("same", [5, 6], 0, 0),
        ("test", [30], 2, 2),
        ("same", [7, 8], 2, 3),
        ("training", [20, 21], 4, 5),
        ("same", [9, 10], 6, 5),
        ("answer", [40, 41, 11], 8, 7),
    ]


def test_only_the_last_answer_is_the_answer(tokenizer):
    found = align([5, 6, 7, 8], [False, True, False, True], [5, 6, 7], tokenizer)
    assert [(s.kind, s.ids) for s in found] == [("same", [5, 6, 7]), ("answer", [8])]
    assert [(s.kind, s.ids) for s in align([5, 6], [False, False], [5], tokenizer)] == [
        ("same", [5]),
        ("training", [6]),
    ]


def test_long_sequences_without_anything_in_common(tokenizer):
    """Whose tokens occur again and again, which is the slow case of a search for blocks."""
    training, test = [3 + i % 7 for i in range(8000)], [3 + i * i % 7 for i in range(8000)]
    start = time.process_time()
    align(training, [False] * 8000, test, tokenizer)
    assert time.process_time() - start < 20


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_the_texts_of_tokens_are_the_text(tokenizer, llama2, text):
    for each in (tokenizer, llama2):
        ids = each.encode(text)
        texts = token_texts(ids, each)
        assert len(texts) == len(ids)
        if each.decode_text(ids) == text:  # nothing was lost
            assert "".join(texts) == text


def test_a_character_of_several_tokens_is_shown_at_the_first(tokenizer):
    ids = tokenizer.encode("a\U0001f600b")
    assert token_texts(ids, tokenizer) == ["a", "\U0001f600", "", "", "", "b"]
