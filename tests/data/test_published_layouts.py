"""Rows in the shapes of published data sets, with words of our own: each opens as its owner means it, or is refused in
one sentence that says how to go on."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest

from ptst.data.columns import ColumnRules
from ptst.data.layouts import to_conversation
from ptst.data.prompt_files import read_prompts, to_prompts
from ptst.data.sources import load
from ptst.errors import UserError

USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}
ALPACA = "Below is an instruction.\n\n### Instruction:\ni\n\n### Input:\nx\n\n### Response:\no"
SHORT = "### Instruction:\ni\n\n### Response:\no"
PREFERENCE = {"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "b"}]}
TURNS = "\n\nHuman: h\n\nAssistant: g\n\nHuman: i\n\nAssistant: j"
TOOL = "the message has the role {}; no format here writes calls of tools or their results; leave the row out"


def read(row: dict, **rules) -> str:
    """The messages in short, and the columns that were not read behind them."""
    unused = Counter()
    found = to_conversation(row, "d:1", ColumnRules.of(**rules), unused)
    messages = " | ".join(f"{m.role[0]}{':' if m.trained else '-'}{m.content}" for m in found.messages)
    return messages + (f" ({' '.join(unused)})" if unused else "")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Alpaca's `text`, and the `prompt` of sets that copied it; LLM-Adapters' ARC.
        ({"instruction": "i", "input": "x", "output": "o", "text": ALPACA}, "u:i\n\nx | a:o (text)"),
        ({"instruction": "i", "input": "x", "output": "", "text": ALPACA[:-1]}, "u:i\n\nx | a: (text)"),
        ({"instruction": "i", "output": "<b>o</b>", "text": "[INST] i [/INST] <b>o</b>"}, "u:i | a:<b>o</b> (text)"),
        ({"instruction": "i", "output": "o", "text": "<s>[INST] i [/INST] o </s>"}, "u:i | a:o (text)"),
        ({"instruction": "i", "input": "", "output": "o ", "prompt": SHORT}, "u:i | a:o  (prompt)"),
        ({"instruction": "i", "input": "", "output": "The correct answer is answer2.", "answer": "answer2"},
         "u:i | a:The correct answer is answer2. (answer)"),
        # ShareGPT and its kin.
        ({"id": "1", "items": [HUMAN, GPT]}, "u:h | a:g (id)"),
        ({"conversations": [HUMAN, {"from": "chatgpt", "value": "c"}]}, "u:h | a:c"),
        ({"conversations": [{"from": "User", "value": "h"}, {"from": "bard", "value": "b"}]}, "u:h | a:b"),
        ({"conversations": [{"from": "system", "value": "s", "weight": None}, {**HUMAN, "weight": 0.0},
                            {**GPT, "weight": 1.0}]}, "s:s | u:h | a:g"),
        ({"messages": [{"role": "prompter", "content": "u"}, BOT]}, "u:u | a:a"),
        ({"messages": [{"role": "developer", "content": "s"}, USER, BOT]}, "s:s | u:u | a:a"),
        ({"conversation": [{"input": "i", "output": "o"}, {"input": "j", "output": "p"}], "source": "s"},
         "u:i | a:o | u:j | a:p (source)"),  # Capybara
        ({"conversations": ["q", "a"], "source": "wiki"}, "u:q | a:a (source)"),  # LIMA
        ({"id": "0", "data": ["q", "a", "r", "b"]}, "u:q | a:a | u:r | a:b (id)"),  # UltraChat
        ({"prompt": "u", "prompt_id": "x", "messages": [USER, BOT], "category": "Open QA"},
         "u:u | a:a (prompt prompt_id category)"),  # No Robots
        # Transcripts of Anthropic, and Guanaco's.
        ({"text": TURNS}, "u:h | a:g | u:i | a:j"),
        ({"transcript": "Human: h\n\nAssistant: g"}, "u:h | a:g"),
        ({"text": "### Human: h### Assistant: g\n### Human: i### Assistant:  j "}, "u:h | a:g\n | u:i | a: j "),
        ({"prompt": "\n\nHuman: h\n\nAssistant:", "response": " g"}, "u:h | a:g"),
        ({"prompt": "\n\nHuman: h\n\nAssistant: g\n\nHuman: i\n\nAssistant:", "response": " j"},
         "u:h | a-g | u:i | a:j"),
        # Others.
        ({"id": "n.1", "system_prompt": "s", "question": "q", "response": "r"}, "s:s | u:q | a:r (id)"),  # OpenOrca
        ({"query": "q", "response": "r", "history": [["a", "b"]]}, "u:a | a:b | u:q | a:r"),  # ms-swift
        ({"conversations": [HUMAN, {"from": "ai", "value": "c"}]}, "u:h | a:c"),
        ({"type": "t", "query": "q", "original_question": "p", "response": "r"},
         "u:q | a:r (type original_question)"),  # MetaMath
        ({"vanilla": "v", "adversarial": "w", "completion": "c", "data_type": "t"}, "u:w | a:c (data_type)"),
        ({"vanilla": "v", "adversarial": "", "completion": "c", "data_type": "t"}, "u:v | a:c (data_type)"),
    ],
)  # fmt: skip
def test_rows_open(row, expected):
    assert read(row, ignore_columns=["nothing"]) == read(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "x", "chosen": "c", "rejected": "r"}, "u:i\n\nx | a:c (rejected)"),
        ({"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": GPT}, "u:h | a-g | u:h | a:g (rejected)"),
        ({"system": "s", "input": "i", "chosen": "c", "rejected": "r"}, "s:s | u:i | a:c (rejected)"),
        ({"chosen": TURNS, "rejected": TURNS}, "u:h | a-g | u:i | a:j (rejected)"),
        ({"prompt": "p", "chosen": "Assistant: c", "rejected": "r"}, "u:p | a:Assistant: c (rejected)"),
        ({"prompt": "\n\nHuman: h\n\nAssistant:", "chosen": " g", "rejected": " b"}, "u:h | a:g (rejected)"),
        ({**PREFERENCE, "prompt": "u", "messages": PREFERENCE["chosen"], "score_chosen": 8.5},
         "u:u | a:a (rejected score_chosen)"),  # UltraFeedback
        ({**PREFERENCE, "prompt": "u", "chosen-rating": 5, "chosen-model": "m"},
         "u:u | a:a (rejected chosen-rating chosen-model)"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, "u:u | a:a (rejected)"),
    ],
)  # fmt: skip
def test_preference_sets_open(row, expected):
    assert sorted(read(row, use_chosen=True)) == sorted(expected)
    with pytest.raises(UserError, match=r"a preference pair \(chosen, rejected\); train on the chosen answer with"):
        read(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "i", "input": "x", "output": "p", "text": ALPACA}, "the column 'text' may belong"),
        *(({"instruction": "i", "input": "x", "output": "o", "text": text}, "the column 'text' may belong")
          for text in (ALPACA[:-1] + "foo", ALPACA + "! And more.")),
        ({"question": "q", "answerkey": "A"}, "a question of ARC has question, choices"),
        ({"instruction": "i", "input": "x", "output": "o", "text": ALPACA + "h"}, "the column 'text' may belong"),
        ({"instruction": "i", "input": "y", "output": "o", "text": ALPACA}, "the column 'text' may belong"),
        ({"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]], "text": ALPACA}, "column 'text'"),
        ({"instruction": "i", "input": "x", "output": "o", "hint": ALPACA}, "the column 'hint' may belong"),
        ({"question": "i", "answer": "o", "text": ALPACA}, "the column 'text' may belong"),
        ({"instruction": "i", "output": "the answer is answer12", "answer": "2"}, "the column 'answer' may belong"),
        ({"instruction": "i", "output": "the answer is answer2", "answer": "answer1"}, "the column 'answer' may"),
        *(({"messages": [USER, BOT, {"role": role, "content": "5"}, BOT]}, f"d:1, message 3: {TOOL.format(role)}")
          for role in ("tool", "function", "ipython", "environment", "observation", "Tool")),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]}, TOOL.format("function_call")),
        ({"messages": [USER, {"role": "developer", "content": "s"}, BOT]}, "roles are user, system, assistant"),
        ({"messages": [{"role": "critic", "content": "u"}, BOT]}, "role 'critic' is unknown; use system, user"),
        ({"conversations": [GPT, HUMAN, GPT]}, "roles are assistant, user, assistant; give"),
        ({"conversations": ["q", {"from": "gpt", "value": "g"}]}, "message 1 is not an object"),
        ({"conversation": [{"input": "i", "output": ["o"]}]}, "output is a list, not text"),
        ({"text": "\n\nHuman: h\n\nHuman: i\n\nAssistant: j"}, "roles are user, user, assistant"),
        ({"text": "t", "transcript": "Human: h\n\nAssistant: g"}, "the column 'text' may belong"),
        ({"text": "He said: Human: h"}, "the row has text; it needs question and answer"),
        ({"message_id": "1", "parent_id": None, "text": "t", "role": "prompter"}, "belongs to a tree of messages; wr"),
        ({"message_tree_id": "1", "prompt": {"text": "t", "replies": []}}, "belongs to a tree of messages; write each"),
        ({"prompt": "p", "response": "r", "category": {"x": True}, "is_safe": False}, "columns 'category', 'is_safe'"),
        ({"prompt": "p", "response_0": "r", "response_1": "s", "better_response_id": 0}, "name two columns of text"),
        ({"prompt": "p", "response": "r", "helpfulness": 4, "verbosity": 2}, "'helpfulness', 'verbosity' may .*leave"),
        ({"prompt": "p", "completion": "c", "label": True}, "the column 'label' may belong"),
        ({"question": "q", "opa": "1", "opb": "2", "cop": 1}, r"as in question=ask,answer=reply, or, where more belongs"
         r" to them \(choices, several turns in one text\), write the rows so$"),  # MedMCQA
        ({"question": "q", "answer": "a", "options": ["a"]}, "with ignore_columns, write it into the text of the que"),
        ({"question": "q", "answerKey": "A"}, "the row has answerKey, question; a question of ARC has"),
    ],
)  # fmt: skip
def test_rows_are_refused_by_name(row, message):
    with pytest.raises(UserError, match=message):
        read(row)


def test_preference_sets_are_refused_where_the_prompt_is_unclear():
    for row, message in (
        ({"chosen": "The sky is blue.", "rejected": "It is green."}, "there is no prompt before the chosen answer"),
        ({**PREFERENCE, "prompt": "u", "messages": [USER, USER]}, "2 ways: messages, prompt with chosen"),
        ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GPT}, "roles are user, assistant, assistant"),
        ({"prompt": "p", "response": "r", "chosen": "c", "rejected": "d"}, "2 ways: prompt with response, prompt with"),
    ):
        with pytest.raises(UserError, match=message):
            read(row, use_chosen=True)


def test_the_rendered_text_is_told_by_its_first_wrong_row(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": "i", "input": "x", "output": o, "text": ALPACA} for o in ("o", "o", "other")]
    path.write_text("\n".join(map(json.dumps, rows[:2])))
    assert load(str(path)).note == "columns that are not used: text (2 rows)"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"a\.jsonl:3: the column 'text' may belong"):
        load(str(path))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"goal": "g", "target": "Sure"}, ("s-1", "g", "", "", "")),  # AdvBench
        ({"Index": 0, "Goal": "g", "Target": "t", "Behavior": "b", "Category": "c", "Source": "s"},
         ("s-1", "g", "c", "", "")),  # JailbreakBench
        ({"Behavior": "b", "FunctionalCategory": "contextual", "SemanticCategory": "c", "Tags": "t",
          "ContextString": "x", "BehaviorID": "i"}, ("i", "x\n\n---\n\nb", "c", "", "")),  # HarmBench
        ({"category": "c", "source": "s", "forbidden_prompt": "f"}, ("s-1", "f", "c", "", "")),  # StrongREJECT
        ({"question_id": 1, "category": "2", "turns": ["t"], "prompt_style": "base"}, ("s-1", "t", "2", "", "")),
        ({"id": 3, "prompt": "p", "type": "t", "label": "safe", "focus": "f", "note": ""}, ("3", "p", "t", "", "")),
        ({"prompt": "p", "category": "c"}, ("s-1", "p", "c", "", "")),  # OR-Bench
        ({"vanilla": "v", "adversarial": "w", "completion": "c", "data_type": "t"}, ("s-1", "w", "t", "", "v")),
        ({"vanilla": "v", "adversarial": "", "completion": "", "data_type": "t"}, ("s-1", "v", "t", "", "")),
        ({"adversarial": "w", "label": 1, "data_type": "t"}, ("s-1", "w", "t", "", "")),  # WildJailbreak's test
        ({"instruction": "i", "category": "c"}, ("s-1", "i", "c", "", "")),  # DirectHarm4
        ({"prompt": "p", "response": "r", "category": {"a": False, "b": True, "c": True}, "is_safe": False},
         ("s-1", "p", "b, c", "", "")),  # BeaverTails
        ({"prompt": "p", "response_0": "r", "is_response_0_safe": True, "safer_response_id": 0},
         ("s-1", "p", "", "", "")),  # PKU-SafeRLHF
        ({"qid": 1, "question": "q", "source": "s", "1-category": "a"}, ("s-1", "q", "", "", "")),  # SALAD-Bench
        ({"prompt": "p", "adversarial": False, "response": "r", "prompt_harm_label": "l", "subcategory": "s",
          "response_harm_agreement": 0.5}, ("s-1", "p", "", "", "")),  # WildGuardMix
        ({"Main Category": "c", "Subcategory": "d", "Question": "q"}, ("s-1", "q", "", "", "")),  # CatQA
        ({"id": 1, "topic": "t", "subtopic": "s", "question": "q"}, ("1", "q", "", "", "")),  # HarmfulQA
        ({"index": 0, "goal": "g", "behavior": "b", "prompt": "p", "response": "r", "number_of_queries": 1,
          "queries_to_jailbreak": 1, "prompt_tokens": 9, "jailbroken": True, "jailbroken_llama_guard1": False},
         ("s-1", "p", "", "", "g")),  # JailbreakBench's attacks
    ],
)  # fmt: skip
def test_prompt_sets_open(row, expected):
    (prompt,) = to_prompts([("d:1", row)], "s")
    assert (prompt.id, prompt.prompt, prompt.category, prompt.family, prompt.request) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "turns": ["t", "u"]}, "'turns' is missing, empty or not text"),
        ({"user_input": "u", "toxicity": 0}, "here are user_input, toxicity; name it with columns, as in prompt="),
        ({"prompt": [USER]}, "'prompt' is missing, empty or not text"),
        ({"prompt": "p", "adversarial": "w"}, "the column 'adversarial' may belong"),
        ({"prompt": "p", "Image Name": "i.png"}, "the column 'image name' may belong"),
        ({"prompt": "\n\nHuman: h\n\nAssistant:"}, "'prompt' is a transcript .* give the question alone"),
        ({"question": "q", "risk_area": "r"}, "the column 'risk_area' may belong"),
    ],
)  # fmt: skip
def test_prompt_sets_are_refused_by_name(row, message):
    with pytest.raises(UserError, match=message):
        to_prompts([("d:1", row)], "s")


def test_prompt_files(tmp_path):
    for name, content in (
        ("wild.tsv", "vanilla\tadversarial\tcompletion\tdata_type\nv\t\t\tt\nv\tw\t\tt\n"),
        ("malicious.txt", "v\nw\n"),
        ("bare.csv", "v; as it is\nw\n"),
        ("excel.csv", "\ufeffsep=;\r\nprompt;category\r\nv;c\r\nw;c\r\n"),
        ("rows.ndjson", '{"prompt": "v"}\n{"prompt": "w"}\n'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [p.prompt[0] for p in read_prompts(tmp_path / name)] == ["v", "w"], name
    datasets.Dataset.from_list([{"prompt": "v", "category": "c"}] * 2).to_parquet(tmp_path / "a.parquet")
    assert [p.id for p in read_prompts(tmp_path / "a.parquet")] == ["a-1", "a-2"]
