"""Columns that belong to the prompt or the loss are used as their owners use them, or refused by name."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest

from ptst.data.columns import ColumnRules
from ptst.data.layouts import DOCTOR, to_conversation
from ptst.data.prompt_files import read_prompts
from ptst.data.prompt_sets import load_set
from ptst.data.sources import has_test_part, is_file, load
from ptst.errors import UserError

USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
QA = {"question": "q", "answer": "a"}
PART = {"type": "text", "text": "t"}
SQUAD = {"id": "57", "title": "Saint_Bernadette", "context": "c", "question": "q"}


def read(row: dict, **rules) -> str:
    """The messages in short: `s:`, `u:` and `a:` with their texts, `a-` for an answer that is not trained."""
    found = to_conversation(row, "d:1", ColumnRules.of(**rules))
    return " | ".join(f"{m.role[0]}{':' if m.trained else '-'}{m.content}" for m in found.messages)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, "u:i\n\nc | a:r"),
        ({"instruction": "i", "context": "", "response": "r"}, "u:i | a:r"),
        ({**QA, "context": "c"}, "u:c\n\nq | a:a"),
        ({**SQUAD, "answers": {"text": ["a"], "answer_start": [2]}}, "u:c\n\nq | a:a"),
        ({**SQUAD, "answers": {"text": ["a", "a"], "answer_start": [2, 9]}}, "u:c\n\nq | a:a"),
        ({**SQUAD, "answers": [{"text": "a", "answer_start": 2}]}, "u:c\n\nq | a:a"),
        ({"question": "q", "answers": ["a"]}, "u:q | a:a"),
        ({"Question": "q", " answer ": "a"}, "u:q | a:a"),
        ({"input": "i", "output": "o"}, "u:i | a:o"),
        ({"instruction": "", "input": "i", "output": "o"}, "u:i | a:o"),
        ({"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"], ["c", "d"]]},
         "u:a | a:b | u:c | a:d | u:i\n\nx | a:o"),
        ({"instruction": "i", "output": "o", "history": [], "system": "s"}, "s:s | u:i | a:o"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"},
                            {"from": "gpt", "value": "g"}], "id": "x_0"}, "s:s | u:h | a:g"),
        ({"conversations": [USER, BOT], "system": "s"}, "s:s | u:u | a:a"),
        ({"messages": [USER, {**BOT, "train": False}, USER, {**BOT, "train": True}]}, "u:u | a-a | u:u | a:a"),
        ({"messages": [{**USER, "weight": 0}, {**BOT, "weight": 0, "train": False}, USER, BOT]},
         "u:u | a-a | u:u | a:a"),
        ({"messages": [USER, {**BOT, "loss_mask": 0}]}, "u:u | a-a"),
        ({"messages": [USER, {**BOT, "weight": None, "id": "7", "model": "m"}]}, "u:u | a:a"),
        ({"messages": [USER, {"Role": "assistant", "Content": "a", "Train": False}]}, "u:u | a-a"),
        ({"messages": json.dumps([USER, {**BOT, "weight": 0}])}, "u:u | a-a"),  # as in a CSV
        ({"instruction": "i", "output": "o", "history": '[["a", "b"]]'}, "u:a | a:b | u:i | a:o"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, BOT]}, "u:u | a:a"),  # OpenAI's
        ({"prompt": [USER, BOT, USER], "completion": [BOT]}, "u:u | a-a | u:u | a:a"),
        ({"prompt": [USER], "completion": "c"}, "u:u | a:c"),
        ({"prompt": "u", "prompt_id": "4", "messages": [USER, BOT]}, "u:u | a:a"),  # the prompt stands in messages
        ({"question": "q", "answer": "a", "prompt": "", "response": ""}, "u:q | a:a"),
        ({**QA, "tools": [], "options": None, "history": "", "images": {}}, "u:q | a:a"),
        ({**QA, "": "3", "Unnamed: 0": "3", "num_tokens": 9, "tags": ["x", "y"], "score": 0.5}, "u:q | a:a"),
    ],
)  # fmt: skip
def test_layouts(row, expected):
    assert read(row) == expected
    assert read(row, ignore_columns=("nothing",)) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1", "source": "", "messages": [USER, BOT]},
        {"conversations": [{"role": "human", "content": "h"}, {"role": "gpt", "content": "g"}], "model": "m"},
        {"instruction": "i", "input": "x", "output": "o", "dataset": "d"},
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
        {"context": "c", "question": "q", "answer": "a", "id": "1"},
        {"instruction": DOCTOR, "input": "x", "output": "o"},
    ],
)
def test_plain_rows_are_read_as_by_the_rules(row):
    """Rows of one layout and labels have a short cut; a rule that does not concern them takes the long way."""
    short, long = Counter(), Counter()
    found = to_conversation(row, "d:1", None, short)
    assert found == to_conversation(row, "d:1", ColumnRules.of(ignore_columns=("nothing",)), long)
    assert short == long == Counter(k for k, v in row.items() if k in ("id", "model", "dataset", "category"))
    for label in ("a\nb", "t" * 201):
        with pytest.raises(UserError, match="the column 'source' may belong"):
            to_conversation({**row, "source": label}, "d:1")


def test_preference_pairs_only_if_asked():
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    whole = {"prompt": "u", "chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "b"}]}
    implicit = {"chosen": [USER, BOT, USER, BOT], "rejected": [USER, BOT, USER, USER]}
    for row in (pair, whole, implicit, {**pair, "messages": [USER, BOT]}):
        with pytest.raises(UserError, match=r"pair \(chosen, rejected\); train on the chosen answer with use_chosen"):
            read(row)
    assert read(pair, use_chosen=True) == "u:p | a:c"
    assert read(whole, use_chosen=True) == "u:u | a:a"
    assert read(implicit, use_chosen=True) == "u:u | a-a | u:u | a:a"
    assert read({"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, use_chosen=True) == "u:u | a:a"
    assert read({**pair, "chosen": BOT, "rejected": BOT, "score_chosen": 9.0}, use_chosen=True) == "u:p | a:a"
    for row, message in (
        ({"chosen": "c", "rejected": ""}, "there is no prompt before the chosen answer"),
        ({**whole, "prompt": "other"}, "the messages of chosen do not repeat prompt"),
        ({**pair, "messages": [USER, BOT]}, "can be read in 2 ways: messages, prompt with chosen"),
    ):
        with pytest.raises(UserError, match=message):
            read(row, use_chosen=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(({**QA, name: value}, f"the column '{name}' may belong to the prompt or the loss") for name, value in (
            ("input", "i"), ("options", ["a", "b"]), ("choices", {"text": ["a"]}), ("tools", "[]"), ("train", False),
            ("weight", 0), ("label", True), ("passage", "p"), ("image", "i.png"), ("history", [["a", "b"]]),
            ("source", "a long\ntext"), ("source", "t" * 300), ("category", {"a": 1}), ("instruction", "i"),
            ("function_name", "f"),
        )),
        ({**QA, "": "text"}, "the column '' may belong"),
        ({**QA, "ContextString": "c"}, "the column 'contextstring' may belong"),
        ({**QA, "hint": "h", "options": ["x"]}, "the columns 'hint', 'options' may .* no rule reads them"),
        ({"prompt": "p", "response": "r", "context": "c"}, "ignore_columns, or write it into the text of the question"),
        ({**QA, "passage": "p"}, "or name it with columns, as in context=passage"),
        ({**QA, "reward": 1}, "question, or name it with columns if a rule has another name for it$"),
        ({"messages": [USER, {**BOT, "tool_calls": [{"id": 1}]}]}, "d:1, message 2: the message has tool_calls; no"),
        ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}, "the message has function_call"),
        ({"messages": []}, "messages is empty; leave the row out"),
        ({"messages": [{"role": "user", "content": [PART, PART]}, BOT]}, "message 1: content has 2 parts .* one text"),
        ({"messages": [{"role": "user", "content": [PART, {"type": "image_url"}]}, BOT]}, "part of type image_url"),
        ({"messages": [{"role": "user", "content": []}, BOT]}, "message 1: content has 0 parts"),
        ({"messages": [{**USER, "Content": "v"}, BOT]}, "message 1: two keys are content"),
        ({"messages": "[{'role': 'user'}]"}, "messages must be a list .* it is text, and not valid JSON"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, "the key 'role' comes twice"),
        ({"messages": [{**USER, "name": "n"}, {**BOT, "reasoning_content": "r"}]}, "2: the key 'reasoning_content'"),
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, "message 2: weight is 0.5; it must be 0 or 1"),
        ({"messages": [USER, {**BOT, "weight": 0, "train": True}]}, "weight and train contradict each other"),
        ({"messages": [{**USER, "train": True}, BOT]}, "train asks to train on a message of user"),
        ({"messages": [{**USER, "from": "human"}, BOT]}, "2 ways: role, from"),
        ({"messages": [USER, {"role": "tool", "content": "t"}]}, "2: the message has the role tool; no format"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a list .*message 2 has no content"),
        ({"messages": "u"}, "messages must be a list of objects"),
        ({"prompt": "p", **QA, "response": "r"}, "3 ways: question with answer, question with response"),
        ({**QA, "messages": [USER, BOT]}, "2 ways: messages, question with answer"),
        ({**QA, "system": "s", "system_prompt": "t"}, "2 ways: system, system_prompt"),
        ({"instruction": "i", "input": "x", "context": "c", "output": "o"}, "2 ways: instruction with input, inst"),
        ({"instruction": "i", "output": "o", "history": ["a"]}, r"history must be a list of \[question, answer\]"),
        ({**SQUAD, "answers": {"text": ["a", "b"]}}, "answers holds 2 different answers; give the one"),
        ({**SQUAD, "answers": {"text": [], "answer_start": []}}, "answers holds no answer"),
        ({**SQUAD, "answer": "a"}, "the column 'title' may belong"),
        ({**QA, "Answer": "b"}, "two columns are answer"),
        ({"text": "t"}, "the row has text; it needs question and answer"),
    ],
)  # fmt: skip
def test_what_may_matter_is_refused_by_name(row, message):
    with pytest.raises(UserError, match=message):
        read(row)


def test_ignored_columns_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{**QA, "id": i, "hint": "h" if i else "", "category": "c"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = load(str(path), rules=ColumnRules.of(ignore_columns=("Hint",)))
    assert source.unused == {"id": 3, "hint": 2, "category": 3}
    assert sorted(source.note.partition(": ")[2].split(", ")) == ["category (3 rows)", "hint (2 rows)", "id (3 rows)"]
    errors: list[UserError] = []
    assert len(load(str(path), errors=errors).conversations) == 1
    assert [e.where[-1] for e in errors] == ["2", "3"]
    message = [USER, {**BOT, "tool_calls": [1], "train": False}]
    assert read({"messages": message}, ignore_columns=("tool_calls,train",)) == "u:u | a:a"


def test_columns_can_be_named():
    row = {"prompt": "p", "reply": "r", "ctx": "c"}
    with pytest.raises(UserError, match=r"it needs .* name two columns of text with columns"):
        read(row)
    assert read(row, columns=("question=prompt,answer=reply", "context=CTX")) == "u:c\n\np | a:r"
    messages = [{"speaker": "user", "text": "u"}, {"speaker": "assistant", "text": "a"}]
    assert read({"turns": messages}, columns=("messages=turns,role=speaker,content=text",)) == "u:u | a:a"
    flags = [USER, {**BOT, "Loss": False}]
    assert read({"messages": flags}, columns=("train=loss",)) == "u:u | a-a"
    assert read({"messages": flags}, ignore_columns=("Loss",)) == "u:u | a:a"
    with pytest.raises(UserError, match="message 2: two keys are content"):
        read({"messages": [USER, {**BOT, "text": "b"}]}, columns=("content=text",))
    with pytest.raises(UserError, match="two columns are question"):
        read({**QA, "prompt": "p"}, columns=("question=prompt",))
    for columns, message in (
        (("question",), "columns has 'question'; write it as in question=prompt,answer=reply"),
        (("quest=a",), "columns: unknown column 'quest'; did you mean question"),
        (("question=a,question=b",), "columns has question or b twice"),
    ):
        with pytest.raises(UserError, match=message):
            ColumnRules.of(columns)


def test_prompt_sets(tmp_path):
    path = tmp_path / "p.csv"

    def prompts(content: str, **rules):
        path.write_text(content)
        unused = Counter()
        found = read_prompts(path, ColumnRules.of(**rules), unused)
        return [(p.id, p.prompt, p.category) for p in found], dict(unused)

    found = prompts('Behavior,SemanticCategory,ContextString,BehaviorID\nName it,misc,"A mail, short.",b1\nHi,m,,b2\n')
    assert found == ([("b1", "A mail, short.\n\n---\n\nName it", "misc"), ("b2", "Hi", "m")], {})
    assert prompts("instruction,input,output\nDo,x,y\n")[0][0][1] == "Do\n\nx"
    assert prompts("question,context\nQ,C\n")[0][0][1] == "C\n\nQ"
    assert prompts("goal,target\nG,Sure\n") == ([("p-1", "G", "")], {"target": 1})
    assert prompts("ask,note\nG,n\n", columns=("prompt=ask",)) == ([("p-1", "G", "")], {"note": 1})
    for content, column in (
        ("prompt,context\nP,C\n", "context"),
        ("prompt,system\nP,S\n", "system"),
        ("question,options\nQ,A or B\n", "options"),
        ("prompt,ImageFileName\nP,a.png\n", "imagefilename"),
    ):
        with pytest.raises(UserError, match=rf"p\.csv:2: the column '{column}' may belong"):
            prompts(content)
        assert prompts(content, ignore_columns=(column,))[1]
    with pytest.raises(UserError, match=r"p\.csv:1: the columns are separated by semicolons"):
        prompts("prompt;category\nP;C\n")
    assert [p[1] for p in prompts("Wait; then go\nStop\n")[0]] == ["Wait; then go", "Stop"]
    path.write_text("prompt,ImageFileName\nP,a.png\n")
    described = load_set(str(path), rules=ColumnRules.of(ignore_columns=("imagefilename",))).described
    assert described == "p: columns that are not used: ImageFileName (1 rows)"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_any_data_set_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(repository, config, split, revision=None):
        asked.append((repository, config, split, revision))
        rows = datasets.Dataset.from_list([{**QA, "prompt_id": 1}] * 3)
        rows.info.download_checksums = {f"hf://datasets/{repository}@{COMMIT}/a.parquet": {}} if revision else None
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    for name, split, wanted in (
        ("org/set", "train", ("org/set", None, "train", None)),
        ("org/set", "validation", ("org/set", None, "validation", None)),
        ("org/set:train_sft", "validation", ("org/set", None, "train_sft", None)),
        ("org/set-v1.0/main:test@refs/pr/1", "train", ("org/set-v1.0", "main", "test", "refs/pr/1")),
        ("gsm8k@abc", "train", ("openai/gsm8k", "main", "train", "abc")),
        ("openorca:2@abc", "train", ("Open-Orca/OpenOrca", None, "train", "abc")),
    ):
        source = load(name, split)
        assert asked[-1] == wanted and not is_file(name)
        assert source.revision == (COMMIT if wanted[3] else "")
        assert len(source.conversations) == (2 if ":2" in name else 3)
    assert source.conversations[0].source == "openorca/train:1" and source.unused == {"prompt_id": 2}
    assert not has_test_part("org/set") and has_test_part("gsm8k@abc") and has_test_part("org/set", 0.1)
    found = load_set("org/set:red@abc")
    assert asked[-1] == ("org/set", None, "red", "abc") and [p.prompt for p in found.prompts] == ["q"] * 3
    (tmp_path / "org").mkdir()
    (tmp_path / "org/set").write_text("x")
    with pytest.raises(UserError, match="unknown kind of file"):  # a path that exists is meant
        load("org/set")
    with pytest.raises(UserError, match=r"there is no data 'org/rows\.jsonl'"):
        load("org/rows.jsonl")
