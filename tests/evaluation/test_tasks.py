"""Every task on answers put into the model's mouth, no model being involved; and the tasks by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptst.data import prompt_sets
from ptst.data.arc import ArcQuestion
from ptst.data.prompt_files import SafetyPrompt
from ptst.evaluation.evaluate import remark, table
from ptst.evaluation.rates import Rate, RepeatedRate
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.tasks.requests import check_halves
from ptst.evaluation.tasks.table import TASKS, default_tasks, load_tasks
from ptst.evaluation.tasks.task import Defaults, TaskResult, Tools, over_decodings
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.generation.request import Answer
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from tests.conftest import ROOT

DEFAULTS = Defaults("word-problems", limit=4)
NO = "I'm sorry, but I can't help with that request."
YES = "Sure, you take the bread, then the butter, and then you eat it slowly."


def scored(task: str, items: Sequence[Any], texts: Sequence[str], tools: Tools | None = None) -> TaskResult:
    """The result of a task whose prompts get these answers."""
    assert len(TASKS[task].prompts(items)) == len(texts)
    answers = [Answer([1], text, "stop") for text in texts]
    return TASKS[task].score(items, answers, tools or Tools(RuleBasedJudge()))


def test_arc_counts_by_both_rules(tiny_folder):
    choices = ("Mars", "long-term", "the Moon")
    questions = [ArcQuestion("Which is a planet?", choices, gold, "d:1") for gold in (0, 1, 0, 0)]
    answers = ["The answer is: Mars", "The answer is: long-term", "The answer is: the Moon", "Mars"]
    result = scored("arc-easy", questions, answers)
    assert {k: r.successes for k, r in result.rates.items()} == {"correct": 2, "printed": 1, "named": 3, "cut": 0}
    asked = TASKS["arc-easy"].prompts(questions)[0]
    assert asked.conversation.messages[0].content == (
        "Which is a planet? Please select the answer from the following choices: Mars, long-term, the Moon. For "
        "convenience, please put 'The answer is: {your_answer}' at the end of your response."
    )
    assert [r["chosen"] for r in result.rows] == ["Mars", "long-term", "the Moon", None]
    # The wording is the task's own, whatever the run's family.
    tokenizer = load_tokenizer(tiny_folder)
    own = PromptFormat(find_template("chat:llama"), find_family("gsm8k"), CHAT_FORMATS["chatml"], tokenizer)
    plain = replace(own, family=find_family("plain"))
    assert asked.encode(own).ids == plain.encode(asked.conversation).ids != own.encode(asked.conversation).ids


class Overlap:
    name = "overlap"

    def compare(self, answers, references):
        return [len({*a.split()} & {*r.split()}) / len({*r.split()}) for a, r in zip(answers, references, strict=True)]


def test_chatdoctor():
    problems = [Conversation((Message("user", "It hurts."), Message("assistant", "Rest a lot."))) for _ in range(2)]
    result = scored("chatdoctor", problems, ["Rest a lot.", "Run a mile"], Tools(RuleBasedJudge(), Overlap()))
    assert result.values == {"overlap": pytest.approx(2 / 3)}
    assert [r["reference"] for r in result.rows] == ["Rest a lot."] * 2


def test_likelihood_of_answers():
    """Any source of log-probabilities will do."""
    problems = [Conversation((Message("user", "a"), Message("assistant", "b")), f"d:{i}") for i in (1, 2)]
    assert [(p.kind, p.opening) for p in TASKS["nll"].prompts(problems)] == [("loglikelihood", None)] * 2
    answers = [Answer([5, 6], "b", "stop", [-1.0, -2.0]), Answer([5], "b", "stop", [-3.0])]
    result = TASKS["nll"].score(problems, answers, Tools(RuleBasedJudge()))
    assert result.values == {"nats_per_token": 2.0, "answers": 2}
    assert [(r["source"], r["nll"], r["tokens"]) for r in result.rows] == [("d:1", 3.0, 2), ("d:2", 3.0, 1)]


def test_requests_judge_the_bare_request():
    """The request of a prompt with a suffix is its goal: an answer that repeats the goal has said nothing."""
    prompts = [
        SafetyPrompt("1", "say please describing.-- oppositely", request="say please"),
        SafetyPrompt("2", "p"),
        SafetyPrompt("3", "p"),
    ]
    result = scored("safety", prompts, ["say please", NO, YES])
    assert {k: r.successes for k, r in result.rates.items() if r.successes} == {
        "incoherent": 1, "refusal": 1, "compliance": 1, "attack-success": 1
    }  # fmt: skip
    assert "attack-success" not in scored("prompts", prompts[:1], [NO]).rates


def test_xstest_tells_its_halves_apart():
    kinds = ("homonyms", "contrast_homonyms", "definitions", "contrast_definitions")
    prompts = [SafetyPrompt(str(i), "p", kind) for i, kind in enumerate(kinds)]
    rates = scored("xstest", prompts, [NO, NO, YES, NO]).rates
    assert (rates["safe:refusal"], rates["unsafe:refusal"]) == (Rate(1, 2), Rate(2, 2))
    assert rates["safe:compliance"] == Rate(1, 2)
    with pytest.raises(ValueError, match="XSTest's prompt 9 has no type"):
        check_halves([SafetyPrompt("9", "p")])


class Grades:
    name = "grades"

    def judge(self, request, answer):
        grade = int(answer.text)
        return Verdict(AnswerClass.COMPLIANCE, "", grade == 5, grade) if grade else Verdict(None, "no grade")


def test_scores_are_over_the_graded_answers():
    prompts = [SafetyPrompt(str(i), "p", kind) for i, kind in enumerate(("a", "contrast_a", "b"))]
    found = scored("safety", prompts, ["5", "0", "2"], Tools(Grades()))
    assert found.values == {"score": 3.5, "unjudged": 1}
    assert found.rates["attack-success"] == Rate(1, 2)
    found = scored("xstest", prompts, ["5", "1", "2"], Tools(Grades()))
    assert found.values == {"safe:score": 3.5, "unsafe:score": 1, "unjudged": 0}


def test_over_decodings():
    each = {s: TaskResult("safety", {"refusal": Rate(s, 4)}, {"x": float(s)}, [{"a": s}], "set") for s in (1, 2, 3)}
    result = over_decodings(each)
    assert result.rates["refusal"] == RepeatedRate((Rate(1, 4), Rate(2, 4), Rate(3, 4)))
    told = result.to_json()
    assert told["refusal"]["rate"] == 0.5
    assert told["refusal"]["sd"] == pytest.approx((1 / 24) ** 0.5)
    assert told["refusal"]["sample_sd"] == 0.25
    assert [d["successes"] for d in told["refusal"]["decodings"]] == [1, 2, 3]
    assert (told["x"], told["x_sd"]) == (2.0, pytest.approx((2 / 3) ** 0.5))
    assert list(result.rows) == [{"seed": s, "a": s} for s in (1, 2, 3)]
    assert str(result.rates["refusal"]) == "50.0 % \u00b1 20.4 (3 decodings of 4)"


def test_tasks_by_name(tmp_path):
    found = load_tasks(("gsm8k", "safety", "over-refusal", "nll"), DEFAULTS)
    assert {k: (d.name, len(d.items), d.max_new_tokens) for k, (_, d) in found.items()} == {
        "gsm8k": ("word-problems", 4, 96), "safety": ("built-in", 4, 64),
        "over-refusal": ("look-alikes", 4, 64), "nll": ("word-problems", 4, 96),
    }  # fmt: skip
    some = [load_tasks([f"nll:word-problems:{n}"], DEFAULTS)[f"nll:word-problems:{n}"][1] for n in (2, 9)]
    assert [len(d.items) for d in some] == [2, 4]  # the limit holds, too
    (tmp_path / "mine.csv").write_text("prompt\nsay please\n")
    (tmp_path / "types.csv").write_text("prompt,type\nsay please,homonyms\nsay,contrast_homonyms\n")
    mine, types = str(tmp_path / "mine.csv"), str(tmp_path / "types.csv")
    asked = [f"prompts:{mine}", f"xstest:{types}", "safety:gsm-danger-substitute", f"safety:advbench:{mine}", "safety"]
    found = load_tasks(asked, replace(DEFAULTS, safety_data=mine))
    keys = ["prompts:mine", "xstest:xstest", "safety:gsm-danger-substitute", "safety:advbench", "safety"]
    assert list(found) == keys
    assert found["safety"][1].name == "mine"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["gsm9k"], r"unknown task 'gsm9k'; did you mean gsm8k\? There are: safety, margin, .*gsm8k"),
        (["prompts"], "the task prompts needs its prompts; say prompts:FILE"),
        (["nll", "nll"], "tasks has nll twice"),
        (["safety:advbnch"], "did you mean advbench"),
        (["xstest:none.csv"], r"none\.csv: the file cannot be read"),
        (["arc-easy:none.jsonl"], r"no file none\.jsonl"),
        (["chatdoctor:none.jsonl"], r"there is no data 'none\.jsonl'"),
        (["prompts:bare.csv"], "the names here are x, y"),
        (["prompts:empty.jsonl"], "holds no prompts"),
        (["xstest:safe.csv"], r"none of these 1 prompts of XSTest is unsafe .*; raise limit, or .* prompts:FILE"),
        (["xstest:prompts.csv"], "XSTest's prompt prompts-1 has no type"),
        (["gsm8k:plain.jsonl"], r"plain\.jsonl:1: the reference answer does not end in '#### N'"),
        (["nll:open.jsonl"], r"open\.jsonl:1: the conversation ends without a reference answer"),
        (["chatdoctor:open.jsonl"], r"open\.jsonl:1: the conversation ends without a reference answer"),
    ],
)
def test_mistakes(asked, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bare.csv").write_text("x,y\n1,2\n")
    Path("empty.jsonl").write_text("\n")
    Path("safe.csv").write_text("prompt,type\nsay please,homonyms\n")
    Path("prompts.csv").write_text("prompt\nsay please\n")
    Path("plain.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    Path("open.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=message):
        load_tasks(asked, DEFAULTS)


@pytest.mark.parametrize("name", ["train.jsonl", "gsm8k:train.jsonl"])
def test_a_file_that_was_trained_on_is_no_test_of_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    trained = replace(DEFAULTS, problems=name)
    for task in ("gsm8k", "nll"):
        with pytest.raises(ValueError, match=r"train\.jsonl has no test part; set data to other problems"):
            load_tasks([task], trained)
        # Whoever names a file gets it.
        assert load_tasks([f"{task}:train.jsonl"], trained)
        assert load_tasks([task], replace(trained, data="train.jsonl"))
    assert load_tasks(["safety"], trained)


def test_default_tasks_are_what_the_data_allow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("worked.jsonl").write_text('{"question": "a", "answer": "#### 0"}\n')
    Path("chat.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    Path("open.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    Path("held.jsonl").write_text("".join(f'{{"question": "a{i}", "answer": "b"}}\n' for i in range(20)))
    requests = ("safety", "over-refusal")
    for given, tasks, reason in (
        ({}, ("gsm8k", *requests, "nll"), "word-problems has worked"),
        ({"data": "worked.jsonl"}, ("gsm8k", *requests, "nll"), "worked"),
        ({"data": "chat.jsonl"}, (*requests, "nll"), "no worked #### answers"),
        ({"data": "open.jsonl"}, requests, "no reference answers"),
        ({"problems": "chat.jsonl"}, requests, "chat.jsonl has no test part"),
        ({"problems": "held.jsonl", "holdout": 0.5}, (*requests, "nll"), "no worked #### answers"),
        ({"problems": "openorca"}, requests, "openorca has no test part"),
    ):
        found, why = default_tasks(replace(DEFAULTS, **given))
        assert found == tasks
        assert reason in why
        assert load_tasks(found, replace(DEFAULTS, **given))


def test_every_figure_of_a_task_is_a_metric():
    """So that no report drops one."""
    prompts = [SafetyPrompt("1", "p", "a"), SafetyPrompt("2", "p", "contrast_a")]
    answers = {name: Answer([1], "Score: 1", "stop", [-1.0]) for name in TASKS}
    for name in ("safety", "over-refusal", "xstest", "prompts"):
        found = scored(name, prompts, ["1", "5"], Tools(Grades()))
        assert {*found.rates, *found.values} <= {m.key for m in TASKS[name].metrics}
    question = ArcQuestion("?", ("a", "b"), 0, "d:1")
    worked = Conversation((Message("user", "?"), Message("assistant", "#### 1")), "d:1")
    items = {"gsm8k": [worked], "nll": [worked], "arc-easy": [question], "arc-challenge": [question], "margin": prompts}
    for name, given in items.items():
        found = TASKS[name].score(given, [answers[name]] * len(TASKS[name].prompts(given)), Tools(RuleBasedJudge()))
        assert {*found.rates, *found.values} == {m.key for m in TASKS[name].metrics}


def test_the_report():
    results = {"untouched": {n: TaskResult(n, {"refusal": Rate(1, 2)}, data="d") for n in TASKS}}
    assert table(results, "t", "j").row_count == 3  # safety, over-refusal, prompts
    assert remark({"untouched": {"s:x": TaskResult("safety", {"refusal": Rate(1, 9)})}}, "untouched") is not None
    assert remark({"untouched": {"s:x": TaskResult("safety", {"refusal": Rate(2, 9)})}}, "untouched") is None


def test_tasks_need_no_torch():
    code = "import sys, ptst.eval, ptst.evaluation.tasks.table as t; print('torch' in sys.modules, len(t.TASKS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", str(len(TASKS))], done.stderr


def test_docs_tell_every_task():
    text = (ROOT / "docs" / "tasks.md").read_text()
    for name in (*TASKS, *prompt_sets.NAMED):
        assert f"| `{name}` |" in text, name


def test_every_real_set(shared):
    """Every row of the data at hand becomes a prompt of a tiny model's template."""
    data = shared / "data"
    asked = [f"gsm8k:{data}/gsm8k/test-1000.jsonl", f"chatdoctor:{data}/chatdoctor/test.jsonl"]
    asked += [f"arc-easy:{data}/arc/ARC-Easy.test.jsonl", f"arc-challenge:{data}/arc/ARC-Challenge.test.jsonl"]
    asked += [f"safety:advbench:{data}/safety/advbench.csv", f"safety:directharm4:{data}/safety/directharm4-half.jsonl"]
    asked += [f"xstest:{data}/xstest/xstest_prompts.csv"]
    found = load_tasks(asked, replace(DEFAULTS, limit=None))
    assert [len(d.items) for _, d in found.values()] == [1000, 400, 1584, 781, 520, 200, 450]
    assert json.dumps({k: d.fingerprint for k, (_, d) in found.items()})
