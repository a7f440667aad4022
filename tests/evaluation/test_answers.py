"""Answers on disk: an evaluation that is stopped anywhere goes on where it was, with the same answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ptst.errors import UserError
from ptst.evaluation.answers import Answerer, AskedSet
from ptst.evaluation.tasks.task import Prompt
from ptst.generation.multi_lora import Adapter
from ptst.generation.request import Sampling
from ptst.open import open_model
from ptst.settings import EngineSettings
from ptst.text.segments import Conversation, Message
from tests.tiny import write_tiny_model

SAMPLED = Sampling(8, temperature=1.2, seed=3)
QUESTIONS = [Prompt(Conversation((Message("user", f"question {i}"),), f"set:{i + 1}")) for i in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def answerer(folder):
    subject = open_model(str(folder), "chat:vanilla", family="plain")
    return Answerer(subject.load_base(torch.float32, "cpu"), subject.prompt_format, EngineSettings(batch_size=3))


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
        assert sorted(set(asked)) == list(range(count, 8))  # first what was there
        assert asked == sorted(asked)
        assert len(asked) > 8 - count, "progress moves with every step, too"
        assert path.read_bytes().count(b"\n") == 7


def test_a_torn_line_is_dropped_and_asked_for_anew(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = answerer.answer(QUESTIONS, SAMPLED, path)
    raw = path.read_bytes()
    for cut in (1, 20, len(raw.split(b"\n")[-2])):
        path.write_bytes(raw[:-cut])
        assert answerer.answer(QUESTIONS, SAMPLED, path) == whole
        assert sorted(path.read_bytes().split(b"\n")) == sorted(raw.split(b"\n"))
    path.write_text(path.read_text().replace('"token_ids"', '"tokens"', 1))
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: is not a valid record; delete the line to regenerate it"):
        answerer.answer(QUESTIONS, SAMPLED, path)


def test_a_file_holds_the_answers_of_several_seeds(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    by_seed = {seed: answerer.answer(QUESTIONS, replace(SAMPLED, seed=seed), path) for seed in (3, 4)}
    assert by_seed[3] != by_seed[4]
    raw = path.read_bytes()
    for seed, answers in by_seed.items():
        assert answerer.answer(QUESTIONS, replace(SAMPLED, seed=seed), path) == answers
    assert path.read_bytes() == raw


@pytest.mark.parametrize(
    ("questions", "sampling", "model", "message"),
    [
        (
            QUESTIONS[::-1],
            SAMPLED,
            "a",
            r"is an answer to another prompt, or drawn with other settings; delete the file",
        ),
        (QUESTIONS[:3], SAMPLED, "a", r"is an answer to another prompt"),
        (QUESTIONS, replace(SAMPLED, temperature=0.5), "a", r"is an answer to another prompt"),
        (QUESTIONS, SAMPLED, "b", r"is an answer of other weights \(a\) than those measured now \(b\); put those back"),
    ],
)
def test_answers_that_do_not_belong_are_refused(answerer, tmp_path, questions, sampling, model, message):
    path = tmp_path / "answers.jsonl"
    replace(answerer, models={None: "a"}).answer(QUESTIONS, SAMPLED, path)
    raw = path.read_bytes()
    with pytest.raises(UserError, match=rf"answers\.jsonl:\d: {message}"):
        replace(answerer, models={None: model}).answer(questions, sampling, path)
    assert path.read_bytes() == raw


BY_HAND = [
    *("{}", "[]", "null", "1", '"x"', "", "x", "[" * 100_000, b"\xff\xfe"),
    '{"key": "k", "model": "", "index": 0, "seed": 3, "token_ids": [], "text": "mine", "finish_reason": "stop"}',
    '{"key": "k", "model": "", "index": 0, "seed": 3, "text": "mine", "finish_reason": "stop", "check": "0"}',
]


@pytest.mark.parametrize("line", BY_HAND, ids=range(len(BY_HAND)))
def test_a_line_by_hand_is_one_sentence(answerer, tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_bytes((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=r"answers\.jsonl:1: is not a valid record; delete the line"):
        answerer.answer(QUESTIONS, SAMPLED, path)


def test_an_answer_that_was_edited_is_refused(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    answerer.answer(QUESTIONS, SAMPLED, path)
    first, *rest = path.read_text("utf-8").split("\n")
    for name, value in (("text", "mine"), ("token_ids", [1]), ("model", "b"), ("index", 1), ("seed", 4)):
        path.write_text("\n".join([json.dumps({**json.loads(first), name: value}), *rest]))
        with pytest.raises(UserError, match=r"answers\.jsonl:1: is not a valid record"):
            answerer.answer(QUESTIONS, SAMPLED, path)


def test_answers_of_an_earlier_version_are_refused_with_what_to_do(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "k", "token_ids": [], "text": "", "finish_reason": "stop"}\n')
    with pytest.raises(UserError, match=r":1: was written by an earlier version of ptst.*; delete the file"):
        answerer.answer(QUESTIONS, SAMPLED, path)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_asked(answerer, tmp_path):
    path = tmp_path / "answers.jsonl"
    long = Prompt(Conversation((Message("user", "x" * 3000),), "set:8"))
    with pytest.raises(ValueError, match=r"set:8: request 7: a prompt of"):
        answerer.answer([*QUESTIONS, long], SAMPLED, path)
    assert not path.exists()


def test_a_broken_adapter_holds_up_no_one_but_itself(answerer, tmp_path):
    c = answerer.decoder.config
    matrices = torch.full((2, c.hidden_size), float("nan")), torch.ones(c.intermediate_size, 2)
    broken = Adapter({"layers.0.mlp.up_proj": matrices}, 1.0)
    other = AskedSet("broken", QUESTIONS, answerer.prompt_format, SAMPLED, tmp_path / "broken.jsonl")
    both = replace(answerer, adapters={"broken": broken}, besides=[other])
    assert both.answer(QUESTIONS, SAMPLED, tmp_path / "own.jsonl") == answerer.answer(QUESTIONS, SAMPLED)
    with pytest.raises(ValueError, match=r"7 of 7 answers failed, the first: set:1: .*not a number"):
        replace(both, adapter="broken", besides=()).answer(QUESTIONS, SAMPLED, tmp_path / "broken.jsonl")


def test_what_is_asked_besides_is_answered_as_it_is_alone(answerer, folder, tmp_path):
    """Other prompts under another template, ended by other tokens, with other sampling, in one batch."""
    form = open_model(str(folder), "chat:llama", family="plain").prompt_format
    drawn, path = replace(SAMPLED, seed=4, max_new_tokens=5), tmp_path / "other.jsonl"
    said = replace(answerer, prompt_format=form).answer(QUESTIONS[2:], drawn)[0].token_ids[1]
    form = replace(form, eos_ids=form.eos_ids | {said})
    other = replace(answerer, prompt_format=form)
    besides = AskedSet(None, QUESTIONS[2:], form, drawn, path)
    together = replace(answerer, engine=EngineSettings(batch_size=12), besides=[besides])
    assert together.answer(QUESTIONS, SAMPLED) == answerer.answer(QUESTIONS, SAMPLED)
    raw = path.read_bytes()
    assert other.answer(QUESTIONS[2:], drawn, path) == other.answer(QUESTIONS[2:], drawn)
    assert path.read_bytes() == raw, "all were there"


def test_given_answers_are_scored_in_place(answerer):
    """Log-probabilities are those of a plain forward pass, whatever else is asked in the same call."""
    whole = Conversation((Message("user", "question"), Message("assistant", "An answer.")), "set:9")
    prompts = [QUESTIONS[0], Prompt(whole, "loglikelihood"), Prompt(whole, "loglikelihood", "An"), QUESTIONS[1]]
    answers = answerer.answer(prompts, SAMPLED)
    assert [answers[0], answers[3]] == answerer.answer([QUESTIONS[0], QUESTIONS[1]], SAMPLED)
    assert [a.text for a in answers[1:3]] == ["An answer.", "An"]
    for prompt, answer in zip(prompts[1:3], answers[1:3], strict=True):
        example = prompt.encode(answerer.prompt_format)
        log_p = answerer.decoder.logits(torch.tensor(example.ids)).log_softmax(-1)
        places = [i for i, flag in enumerate(example.loss_mask) if flag]
        assert answer.token_ids == [example.ids[i] for i in places]
        assert answer.logprobs == pytest.approx([float(log_p[i - 1, example.ids[i]]) for i in places], abs=1e-4)
    assert len(answers[2].token_ids) < len(answers[1].token_ids), "an opening has no terminator"
    with pytest.raises(ValueError, match="set:1: there is no reference answer to score"):
        answerer.answer([replace(QUESTIONS[0], kind="loglikelihood")], SAMPLED)


@pytest.mark.parametrize(
    "damage",
    [
        (b'"token_ids": [', b'"token_ids": ["x", '),
        (b'"token_ids": [', b'"token_ids": [true, '),
        (b'"text": "', b'"text": "\xff'),
        (b'"text": "', b'"text": 3, "error": "'),
        (b'"text": "', b'"logprobs": ' + b"[" * 5000 + b', "text": "'),
    ],
)
def test_a_line_that_no_model_wrote_is_named(answerer, tmp_path, damage):
    path = tmp_path / "answers.jsonl"
    answerer.answer(QUESTIONS[:1], SAMPLED, path)
    path.write_bytes(path.read_bytes().replace(*damage))
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: is not a valid record"):
        answerer.answer(QUESTIONS[:1], SAMPLED, path)
