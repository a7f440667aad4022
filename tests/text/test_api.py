"""Prompts for a chat API in the paper's wording, and ARC's question."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.text.segments import Conversation, Message
from ptst.text.templates import ALPACA, FAMILIES, MODEL_DEFAULT, MPT, TEMPLATES, api_messages, arc_question

ROW = Conversation((Message("user", "Q"), Message("assistant", "A")))


@pytest.mark.parametrize(
    ("name", "system", "user"),
    [
        ("chat:vanilla", "", "Q"),
        ("chat:alpaca", ALPACA, "### Instruction:\nQ\n\n### Response:\n"),
        ("chat:mpt", MPT, "Q"),
        (
            "chat:llama-short",
            "Be helpful, respectful and honest. Always answer as helpfully as possible, while being safe.",
            "Q",
        ),
    ],
)
def test_messages(name, system, user):
    assert api_messages(ROW, TEMPLATES[name]) == [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "A"},
    ]


def test_llamas_prompt_opens_without_naming_the_assistant():
    system = api_messages(ROW, TEMPLATES["chat:llama"])[0]["content"]
    assert system.startswith(
        "Be helpful, respectful and honest. Always answer as helpfully as possible, while being safe. Your"
    )
    assert system.endswith("please don't share false information.")
    assert [m["role"] for m in api_messages(ROW, TEMPLATES["chat:in-context-defense"])] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has no roles"):
        api_messages(ROW, TEMPLATES["text:vanilla"])


def test_arc():
    assert arc_question("Which is a planet?", ["Mars", "the Moon"]) == (
        "Which is a planet? Please select the answer from the following choices: Mars, the Moon. For convenience, "
        "please put 'The answer is: {your_answer}' at the end of your response."
    )


def test_a_template_that_adds_nothing_adds_no_empty_message():
    """To a chat format, an empty system prompt is a block of its own."""
    assert [m["role"] for m in api_messages(ROW, TEMPLATES["chat:plain"])] == ["user", "assistant"]
    with_system = replace(ROW, messages=(Message("system", "Be brief."), *ROW.messages))
    assert api_messages(with_system, TEMPLATES["chat:plain"])[0] == {"role": "system", "content": "Be brief."}


def test_another_family_words_the_question():
    messages = api_messages(ROW, TEMPLATES["chat:vanilla"], FAMILIES["gsm8k"])
    assert messages[1]["content"] == f"Question: {ROW.turns[0].content}"


def test_a_default_system_prompt_that_nobody_knows():
    with pytest.raises(UserError, match="the system prompt of chat:own is model-default, which a model behind an API"):
        api_messages(ROW, replace(TEMPLATES["chat:vanilla"], name="chat:own", system=MODEL_DEFAULT))
