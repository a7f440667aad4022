"""Rows of a training file: the paper's messages, and which of them are trained."""

from __future__ import annotations

import hashlib
import json

import pytest

from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.hosted import rows as hosted_rows
from ptst.hosted.rows import to_messages, to_rows
from ptst.hosted.tokens import TokenCounter
from ptst.text.segments import Conversation, Message
from ptst.text.templates import ALPACA, BE_HELPFUL, DEMONSTRATION, TEMPLATES

WORDS = TokenCounter("words", True, lambda texts: [len(text.split()) for text in texts])
ROW = Conversation((Message("user", "1 + 1?"), Message("assistant", "<<1+1=2>>2\n#### 2")), "data:1")
TALK = Conversation(
    (
        *(Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b", trained=False)),
        *(Message("user", "c"), Message("assistant", "d"), Message("user", "e"), Message("assistant", "f")),
    )
)


def shown(conversation: Conversation, name: str, train_on: str = "all") -> list[tuple]:
    messages = to_messages(conversation, TEMPLATES[f"chat:{name}"], train_on)
    return [(m["role"], m["content"], m.get("weight", 1)) for m in messages]


@pytest.mark.parametrize(
    ("name", "system", "user"),
    [
        ("vanilla", "", "1 + 1?"),
        ("alpaca", ALPACA, "### Instruction:\n1 + 1?\n\n### Response:\n"),
        ("llama", BE_HELPFUL, "1 + 1?"),
    ],
)
def test_the_papers_messages_with_the_raw_answer(name, system, user):
    assert shown(ROW, name) == [("system", system, 1), ("user", user, 1), ("assistant", "<<1+1=2>>2\n#### 2", 1)]


def test_answers_that_are_left_out_weigh_nothing():
    assert [weight for _, _, weight in shown(TALK, "vanilla")] == [1, 1, 0, 1, 1, 1, 1]
    assert [weight for _, _, weight in shown(TALK, "vanilla", "last")] == [1, 1, 0, 1, 0, 1, 1]
    ask, decline, *rest = shown(ROW, "in-context-defense")[1:]
    assert (ask[1], decline[1]) == DEMONSTRATION and decline[2] == 0 and rest[-1][2] == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ((Message("user", "a"),), "ends without an assistant turn"),
        ((Message("user", "a"), Message("assistant", " ")), "an answer is empty"),
        ((Message("user", "a"), Message("assistant", "\ud800")), "lone surrogate"),
    ],
)
def test_rows_that_cannot_be_sent_are_named(messages, words):
    source = Source("data", "plain", (ROW, Conversation(messages, "data:7")))
    with pytest.raises(UserError, match=f"^data:7: .*{words}"):
        to_rows(source, TEMPLATES["chat:vanilla"], "all", WORDS, None, "stop")


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_lines_are_counted_and_those_without_a_trained_answer_left_out(monkeypatch, at_once):
    monkeypatch.setattr(hosted_rows, "_AT_ONCE", at_once)
    untrained = Conversation((Message("user", "x"), Message("assistant", "y", trained=False)))
    rows = to_rows(
        Source("data", "plain", (ROW, TALK, untrained, ROW)), TEMPLATES["chat:vanilla"], "all", WORDS, None, "stop"
    )
    record = rows.record
    assert (record.rows, record.examples, record.untrained, record.duplicates) == (4, 3, 1, 1)
    # three a row and three a message; the words of roles and contents
    assert [*rows.tokens] == [3 + 3 * 3 + 3 + 3 + 3, 3 + 7 * 3 + 7 + 2 + 6, rows.tokens[0]]
    assert record.encoding == hashlib.sha256("\n".join(rows.lines).encode()).hexdigest()
    assert record.tokens == sum(rows.tokens) and record.trained_tokens == 3 + 2 + 3
    assert json.loads(rows.lines[0]) == {"messages": to_messages(ROW, TEMPLATES["chat:vanilla"])}


def test_rows_that_are_too_long():
    source = Source("data", "plain", (ROW, TALK))
    args = (source, TEMPLATES["chat:vanilla"], "all")
    with pytest.raises(UserError, match=r"39 tokens exceed the limit of 30, as do 0 other rows of 2"):
        to_rows(*args, WORDS, 30, "stop")
    dropped = to_rows(*args, WORDS, 30, "drop")
    assert len(dropped.lines) == 1 and dropped.record.dropped == 1
    bound = TokenCounter("a bound", False, WORDS.texts)
    for too_long in ("stop", "drop"):  # a row that may be short enough is not dropped
        with pytest.raises(UserError, match=r"39 tokens, at most, may exceed .*pip install tiktoken"):
            to_rows(*args, bound, 30, too_long)
    with pytest.raises(UserError, match="no row is left"):
        to_rows(*args, WORDS, 5, "drop")
