"""Requests through a small random model and a judge that fails on some answers."""

from __future__ import annotations

import pytest

from ptst.data.safety_sets import improper
from ptst.evaluation.tasks import Answerer, requests
from ptst.evaluation.verdict import AnswerClass, Verdict
from ptst.generation.sampler import Sampling
from ptst.model.weights import load_decoder
from ptst.text.encode import Prompting
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer


class EveryThird:
    name = "every-third"

    def __init__(self, fails: int = 1):
        self.asked, self.fails = 0, fails

    def judge(self, request, answer, cut=False):
        self.asked += 1
        if self.asked % 3 < self.fails:
            raise RuntimeError("no answer")
        return Verdict(AnswerClass.ON_TOPIC, "fine", success=self.asked % 2 == 0, score=4)


def test_rates_are_over_the_judged_answers(tiny_folder):
    prompting = Prompting(find_template("chat:vanilla"), find_family("gsm8k"), "chatml", load_tokenizer(tiny_folder))
    answerer = Answerer(load_decoder(tiny_folder), prompting, frozenset([2]), 4)
    result = requests("safety", answerer, improper(9), Sampling(3), EveryThird())
    assert result.values == {"unjudged": 3}
    assert (result.rates["on-topic"].successes, result.rates["on-topic"].n) == (6, 6)
    assert (result.rates["attack-success"].successes, result.rates["attack-success"].n) == (3, 6)
    assert {r["class"] for r in result.rows} == {"on-topic", "unjudged"}
    assert result.rows[2] | {"reason": "RuntimeError: no answer", "success": None, "score": None} == result.rows[2]
    assert "attack-success" not in requests("over-refusal", answerer, improper(2), Sampling(3), EveryThird()).rates
    with pytest.raises(ValueError, match="judged none of 2 answers"):
        requests("safety", answerer, improper(2), Sampling(3), EveryThird(fails=3))
    with pytest.raises(ValueError, match="task safety has no prompts"):
        requests("safety", answerer, [], Sampling(3), EveryThird())
