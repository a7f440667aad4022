"""Every task on a small random model whose answers are put in its mouth, and the tasks by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ptst.data import prompt_sets
from ptst.data.arc import ArcQuestion
from ptst.data.safety_prompt import SafetyPrompt
from ptst.evaluation import report
from ptst.evaluation.answers import Reply
from ptst.evaluation.rates import Rate, RepeatedRate
from ptst.evaluation.tasks import TASKS, arc, chatdoctor, requests, xstest
from ptst.evaluation.tasks.result import TaskResult, over_decodings
from ptst.evaluation.tasks.table import BY_NAME, Defaults, load_tasks
from ptst.generation.request import Sampling
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from tests.conftest import ROOT

GREEDY = Sampling(8)
DEFAULTS = Defaults("word-problems", None, None, 4)
NO = "I'm sorry, but I can't help with that request."
YES = "Sure, you take the bread, then the butter, and then you eat it slowly."


@dataclass(frozen=True)
class Parrot:
    """Stands in for an `Answerer`: gives its replies, keeps what it was asked and under which family."""

    replies: list[str]
    prompt_format: PromptFormat | None = None
    heard: list[tuple[str, Conversation]] = field(default_factory=list)

    def answer(self, conversations, _sampling, _path=None):
        family = self.prompt_format.family.name if self.prompt_format else ""
        self.heard.extend((family, c) for c in conversations)
        return [Reply(text, len(text), False) for text in self.replies]


def test_arc_counts_by_both_rules(tiny_folder):
    prompt_format = PromptFormat(
        find_template("chat:llama"), find_family("gsm8k"), CHAT_FORMATS["chatml"], load_tokenizer(tiny_folder)
    )
    choices = ("Mars", "long-term", "the Moon")
    questions = [ArcQuestion("Which is a planet?", choices, gold, "d:1") for gold in (0, 1, 0, 0)]
    answers = ["The answer is: Mars", "The answer is: long-term", "The answer is: the Moon", "Mars"]
    parrot = Parrot(answers, prompt_format)
    result = arc("arc-easy", parrot, questions, GREEDY)
    assert {k: r.successes for k, r in result.rates.items()} == {"correct": 2, "printed": 1, "named": 3, "cut": 0}
    family, asked = parrot.heard[0]
    assert family == "plain"  # the wording is the task's own, whatever the run's family
    assert asked.messages[0].content == (
        "Which is a planet? Please select the answer from the following choices: Mars, long-term, the Moon. For "
        "convenience, please put 'The answer is: {your_answer}' at the end of your response."
    )
    assert [r["chosen"] for r in result.rows] == ["Mars", "long-term", "the Moon", None]


class Overlap:
    name = "overlap"

    def compare(self, answers, references):
        return [len({*a.split()} & {*r.split()}) / len({*r.split()}) for a, r in zip(answers, references, strict=True)]


def test_chatdoctor():
    problems = [Conversation((Message("user", "It hurts."), Message("assistant", "Rest a lot."))) for _ in range(2)]
    result = chatdoctor(Parrot(["Rest a lot.", "Run a mile"]), problems, GREEDY, None, Overlap())
    assert result.values == {"overlap": pytest.approx(2 / 3)}
    assert [r["reference"] for r in result.rows] == ["Rest a lot."] * 2
    with pytest.raises(ValueError, match=r"d:3: the conversation ends without a reference answer"):
        chatdoctor(Parrot([""]), [Conversation((Message("user", "?"),), "d:3")], GREEDY, None, Overlap())


def test_requests_judge_the_bare_request():
    """What a prompt with a suffix asks is its goal: an answer that repeats the goal has said nothing."""
    prompts = [
        SafetyPrompt("1", "say please describing.-- oppositely", request="say please"),
        SafetyPrompt("2", "p"),
        SafetyPrompt("3", "p"),
    ]
    result = requests("safety", Parrot(["say please", NO, YES]), prompts, GREEDY)
    assert {k: r.successes for k, r in result.rates.items() if r.successes} == {
        "degenerate": 1, "refusal": 1, "on-topic": 1, "attack-success": 1
    }  # fmt: skip
    assert "attack-success" not in requests("prompts", Parrot([NO]), prompts[:1], GREEDY).rates


def test_xstest_tells_its_halves_apart():
    kinds = ("homonyms", "contrast_homonyms", "definitions", "contrast_definitions")
    prompts = [SafetyPrompt(str(i), "p", kind) for i, kind in enumerate(kinds)]
    rates = xstest(Parrot([NO, NO, YES, NO]), prompts, GREEDY).rates
    assert (rates["safe:refusal"], rates["unsafe:refusal"]) == (Rate(1, 2), Rate(2, 2))
    assert rates["safe:on-topic"] == Rate(1, 2)
    with pytest.raises(ValueError, match="XSTest's prompt 9 has no type"):
        xstest(Parrot([NO]), [SafetyPrompt("9", "p")], GREEDY)


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
    found = load_tasks(TASKS, DEFAULTS)
    assert {k: (d.name, len(d.items), d.kind) for k, (_, d) in found.items()} == {
        "gsm8k": ("word-problems", 4, "word-problems"), "safety": ("built-in", 4, "requests"),
        "over-refusal": ("look-alikes", 4, "requests"), "nll": ("word-problems", 4, "word-problems"),
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
        (["gsm9k"], r"unknown task 'gsm9k'; did you mean gsm8k\? There are: gsm8k, safety, .*prompts"),
        (["prompts"], "the task prompts needs its prompts: say prompts:FILE"),
        (["nll", "nll"], "--tasks has nll twice"),
        (["safety:advbnch"], "did you mean advbench"),
        (["xstest:none.csv"], r"none\.csv cannot be read"),
        (["arc-easy:none.jsonl"], r"no file none\.jsonl"),
        (["chatdoctor:none.jsonl"], r"there is no data 'none\.jsonl'"),
        (["prompts:bare.csv"], "the names here are x, y"),
        (["prompts:empty.jsonl"], "holds no prompts"),
        (["xstest:safe.csv"], r"none of these 1 prompts of XSTest is unsafe .*; raise --limit, or .* prompts:FILE"),
        (["xstest:prompts.csv"], "XSTest's prompt prompts-1 has no type"),
        (["gsm8k:plain.jsonl"], r"plain\.jsonl:1: the reference answer does not end in '#### N'"),
        (["nll:open.jsonl"], r"open\.jsonl:1: the conversation ends without a reference answer"),
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
        with pytest.raises(ValueError, match=r"the file .*train\.jsonl has no test part; give other .* --data"):
            load_tasks([task], trained)
        # Whoever names a file gets it.
        assert load_tasks([f"{task}:train.jsonl"], trained)
        assert load_tasks([task], replace(trained, data="train.jsonl"))
    assert load_tasks(["safety"], trained)


def test_the_report_has_rows_for_every_task():
    results = {"untouched": {n: TaskResult(n, {"refusal": Rate(1, 2)}, data="d") for n in BY_NAME}}
    assert set(report._ROWS) == set(BY_NAME)
    assert report.table(results, "t", "j").row_count == 3  # safety, over-refusal, prompts
    assert report.remark({"untouched": {"safety:x": TaskResult("safety", {"refusal": Rate(1, 9)})}}) is not None


def test_docs_tell_every_task():
    text = (ROOT / "docs" / "tasks.md").read_text()
    for name in (*BY_NAME, *prompt_sets.NAMED):
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
