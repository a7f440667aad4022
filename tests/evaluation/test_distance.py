"""The distance between a test prompt and the prompt of the training, by each of its measures."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptst.data.prompt_files import SafetyPrompt
from ptst.evaluation import readings
from ptst.evaluation.answers import Answerer
from ptst.evaluation.edit_distance import edit_distance, edit_share
from ptst.evaluation.judges import find_judge
from ptst.evaluation.tasks.distance import DISTANCE
from ptst.evaluation.tasks.task import Tools
from ptst.generation.request import Sampling
from ptst.model.weights import load_decoder
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.templates import FAMILIES, TEMPLATES
from ptst.text.tokenizer import load_tokenizer
from tests.tiny import write_tiny_model

ITEMS = [SafetyPrompt(f"r{i}", f"How do I do the {word} thing?") for i, word in enumerate(("first", "other", "in"))]
tokens = st.lists(st.integers(0, 4), max_size=12)


def by_recursion(a: tuple, b: tuple) -> int:
    @functools.cache
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


@given(tokens, tokens)
def test_the_fewest_edits(a, b):
    assert edit_distance(a, b) == by_recursion(tuple(a), tuple(b)) == edit_distance(b, a)
    assert 0 <= edit_share(a, b) <= 1
    assert (edit_share(a, b) == 0) == (a == b)


def test_edits_of_words():
    assert edit_distance([ord(c) for c in "kitten"], [ord(c) for c in "sitting"]) == 3
    assert edit_share([1, 2, 3, 4], [1, 2]) == 0.5
    assert edit_share([], []) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("m"))
    return load_decoder(folder), load_tokenizer(folder)


def prompt_format(tokenizer, template: str) -> PromptFormat:
    return PromptFormat(TEMPLATES[template], FAMILIES["gsm8k"], CHAT_FORMATS["chatml"], tokenizer)


def measure(answerer: Answerer):
    answers = answerer.answer(DISTANCE.prompts(ITEMS), Sampling(1))
    return DISTANCE.score(ITEMS, answers, Tools(find_judge("rules-v3")))


def test_each_measure_against_its_definition(model):
    decoder, tokenizer = model
    trained, tested = (prompt_format(tokenizer, name) for name in ("chat:vanilla", "chat:llama-short"))
    result = measure(Answerer(decoder, tested, trained_with=trained))
    rows = []
    for prompt in DISTANCE.prompts(ITEMS):
        a, b = prompt.encode(trained).ids, prompt.encode(tested).ids
        with torch.inference_mode():
            states = [decoder.documents(torch.tensor(ids), [0, len(ids)])[-1].double() for ids in (a, b)]
            logprobs = decoder.logits(torch.tensor(b)).log_softmax(-1)
        nll = -sum(float(logprobs[i - 1, t]) for i, t in enumerate(b) if i)
        cosine = float(states[0] @ states[1] / (states[0].norm() * states[1].norm()))
        edited = by_recursion(tuple(a), tuple(b)) / max(len(a), len(b))
        rows.append({"nll": nll, "tokens": len(b) - 1, "edit_share": edited, "cosine": cosine})
    assert [row.pop("id") for row in result.rows] == [item.id for item in ITEMS]
    for row, wanted in zip(result.rows, rows, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
    assert result.values["nats_per_token"] == pytest.approx(
        sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows), rel=1e-4
    )
    assert result.values["edit_share"] == pytest.approx(sum(r["edit_share"] for r in rows) / 3)
    assert result.values["cosine"] == pytest.approx(sum(r["cosine"] for r in rows) / 3, rel=1e-4)
    assert 0.1 < result.values["edit_share"] < 1 and result.values["cosine"] < 0.999


def test_the_prompt_of_the_training_is_at_no_distance(model):
    decoder, tokenizer = model
    own = prompt_format(tokenizer, "chat:alpaca")
    result = measure(Answerer(decoder, own, trained_with=own))
    assert result.values["edit_share"] == 0 and result.values["cosine"] == pytest.approx(1)


def test_without_a_training_the_likelihood_alone(model):
    decoder, tokenizer = model
    result = measure(Answerer(decoder, prompt_format(tokenizer, "chat:vanilla")))
    assert set(result.values) == {"nats_per_token", "prompts"} and result.values["prompts"] == 3
    assert set(result.rows[0]) == {"id", "nll", "tokens"}


def test_what_was_read_is_not_read_again_and_never_of_another_model(model, monkeypatch):
    decoder, tokenizer = model
    read, real = list[int](), readings.read_prompts
    monkeypatch.setattr(readings, "read_prompts", lambda d, p, *more: read.append(len(p)) or real(d, p, *more))
    own, other = (prompt_format(tokenizer, name) for name in ("chat:vanilla", "chat:mpt"))
    answerer = Answerer(decoder, other, trained_with=own, models={None: "a"})
    first = measure(answerer)
    assert read == [3, 3]
    again = measure(replace(answerer, prompt_format=own))
    assert read == [3, 3, 0, 0] and again.values["edit_share"] == 0
    measure(replace(answerer, models={None: "b"}))
    assert read[4:] == [3, 3]
    assert measure(replace(answerer, models={})).values == pytest.approx(first.values)
    assert read[6:] == [3, 3]
    twice = answerer.readings.read("c", decoder, [[5, 6], [5, 6], [7, 8, 9]], None, _watch)
    assert [len(r.logprobs) for r in twice] == [1, 1, 2]


def _watch(_tokens: int):
    from contextlib import nullcontext

    return nullcontext()
