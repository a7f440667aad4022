"""Answers on disk: an evaluation that is stopped anywhere goes on where it was, with the same answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptst.evaluation.answers import Answerer, AnswerFile
from ptst.generation.multi_lora import Adapter
from ptst.generation.request import Sampling
from ptst.open import open_model
from ptst.text.segments import Conversation, Message
from tests.tiny import write_tiny_model

SAMPLED = Sampling(8, temperature=1.2, seed=3)
QUESTIONS = [Conversation((Message("user", f"question {i}"),), f"set:{i + 1}") for i in range(7)]


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    subject = open_model(str(folder), "chat:vanilla", family="plain")
    return Answerer(subject.load_base(torch.float32, "cpu"), subject.prompt_format, subject.stop_ids, batch_size=3)


class Stopped(Exception):
    pass


def stop_after(count: int):
    def heard(done, _statistics):
        if done == count:
            raise Stopped

    return heard


def test_stopped_after_any_answer_it_goes_on_with_the_rest(answerer, tmp_path):
    whole = answerer.answer(QUESTIONS, SAMPLED)
    for count in range(1, 7):
        path = tmp_path / f"{count}.jsonl"
        with pytest.raises(Stopped):
            replace(answerer, on_progress=stop_after(count)).answer(QUESTIONS, SAMPLED, path)
        asked = []
        resumed = replace(answerer, on_progress=lambda done, _s, asked=asked: asked.append(done))
        assert resumed.answer(QUESTIONS, SAMPLED, path) == whole
        assert asked == list(range(count, 8))  # first what was there
        assert path.read_bytes().count(b"\n") == 7


def test_a_torn_line_is_dropped_and_asked_for_anew(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = answerer.answer(QUESTIONS, SAMPLED, path)
    raw = path.read_bytes()
    for cut in (1, 20, len(raw.split(b"\n")[-2])):
        path.write_bytes(raw[:-cut])
        assert answerer.answer(QUESTIONS, SAMPLED, path) == whole
        assert sorted(path.read_bytes().split(b"\n")) == sorted(raw.split(b"\n"))
    path.write_text(path.read_text().replace('"tokens"', '"token"', 1))
    with pytest.raises(ValueError, match=r"answers\.jsonl:1 is no answer"):
        AnswerFile(path)


def test_an_answer_serves_its_own_question_alone(answerer, tmp_path):
    """Another sampling, prompt or place in the list is another answer."""
    path = tmp_path / "answers.jsonl"
    answerer.answer(QUESTIONS, SAMPLED, path)
    for sampling, questions in ((replace(SAMPLED, seed=4), QUESTIONS), (SAMPLED, QUESTIONS[::-1])):
        assert answerer.answer(questions, sampling, path) == answerer.answer(questions, sampling)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_asked(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    long = Conversation((Message("user", "x" * 3000),), "set:8")
    with pytest.raises(ValueError, match=r"set:8: request 7: a prompt of"):
        answerer.answer([*QUESTIONS, long], SAMPLED, path)
    assert not path.exists()


def test_a_broken_adapter_holds_up_no_one_but_itself(answerer, tmp_path):
    c = answerer.decoder.config
    matrices = torch.full((2, c.hidden_size), float("nan")), torch.ones(c.intermediate_size, 2)
    broken = Adapter({"layers.0.mlp.up_proj": matrices}, 1.0)
    both = replace(answerer, adapters={"broken": broken}, beside={"broken": tmp_path / "broken.jsonl"})
    assert both.answer(QUESTIONS, SAMPLED, tmp_path / "own.jsonl") == answerer.answer(QUESTIONS, SAMPLED)
    with pytest.raises(ValueError, match=r"7 of 7 answers failed, the first one: set:1: .*not a number"):
        replace(both, adapter="broken", beside={}).answer(QUESTIONS, SAMPLED, tmp_path / "broken.jsonl")
