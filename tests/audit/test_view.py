"""The text and the author of every token that is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.audit.view import view
from ptst.text.segments import Conversation, Message
from ptst.text.tokenizer import JsonTokenizer
from tests.audit import more_faults
from tests.audit.faults import spliced
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return JsonTokenizer(path, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


def bench(tokenizer, chat_format="chatml", template="chat:plain", family="plain"):
    return more_faults.bench(tokenizer, tokenizer, chat_format, template, family)


def text_of(tokens, author):
    return "".join(t.text for t in tokens if t.author == author)


@pytest.mark.parametrize("chat_format", ["chatml", "llama2", "mistral-v1"])
@pytest.mark.parametrize("row", [more_faults.WIDE, more_faults.ODD, more_faults.BOUNDARY])
def test_characters_of_several_tokens(tokenizer, chat_format, row):
    """All of a character's tokens have its author, and the first of them shows it."""
    b = bench(tokenizer, chat_format)
    tokens = view(b.good(row), b.rows[row], b.setup)
    user, assistant = (m.content for m in b.rows[row].messages)
    assert text_of(tokens, "user").strip() == user.strip()
    assert text_of(tokens, "assistant").strip() == assistant.strip()
    texts = "".join(t.text for t in tokens)
    assert texts == b.tokenizer.decode(b.good(row).ids) and "\ufffd" not in texts
    wide = [i for i, t in enumerate(tokens) if t.text and ord(t.text[-1]) > 127]
    assert all(tokens[i + 1].text == "" and tokens[i + 1].author == tokens[i].author for i in wide)
    assert {t.author for t in tokens} == {"control", "scaffold", "user", "assistant"}


def test_words_of_the_template_within_a_users_turn(tokenizer):
    b = bench(tokenizer, template="chat:self-reminder", family="gsm8k")
    tokens = view(b.good(more_faults.SYSTEM), b.rows[more_faults.SYSTEM], b.setup)
    assert text_of(tokens, "user") == "how many?"
    assert "Question: " in text_of(tokens, "scaffold") and "Remember" in text_of(tokens, "scaffold")
    assert text_of(tokens, "system").endswith("Be terse.")


def test_a_prompt_without_an_answer(tokenizer):
    b = bench(tokenizer, template="chat:mpt")
    prompt = b.rows[more_faults.WIDE].prompt()
    tokens = view(b.setup.prompt_format.encode(prompt), prompt, b.setup)
    assert text_of(tokens, "user") == prompt.messages[0].content
    assert not text_of(tokens, "assistant") and "unknown" not in {t.author for t in tokens}


def test_tokens_that_are_not_the_rows(tokenizer):
    """What is put in is nobody's; what is the row's on both sides keeps its author."""
    b = bench(tokenizer)
    e, start = b.good(more_faults.SINGLE), b.start(more_faults.SINGLE)
    bad = spliced(e, start, 1, b.ids("\u65e5 x"))
    tokens = view(bad, b.rows[more_faults.SINGLE], b.setup)
    assert text_of(tokens, "unknown") == "\u65e5 x"
    assert text_of(tokens, "assistant") == " tin is in the bin." and text_of(tokens, "user") == "what is in the tin?"
    assert "".join(t.text for t in tokens) == b.tokenizer.decode(bad.ids)
    two = spliced(bad, 3, 0, [2])  # and a control token within the question
    tokens = view(two, b.rows[more_faults.SINGLE], b.setup)
    assert tokens[3].author == "control" and text_of(tokens, "user").endswith("hat is in the tin?")


def test_a_row_that_cannot_be_written(tokenizer):
    b = bench(tokenizer, template="text:vanilla")
    row = Conversation((Message("system", "s"), Message("user", "u"), Message("assistant", "a")))
    example = replace(b.good(more_faults.SINGLE), ids=b.ids("u a"), loss_mask=[False] * len(b.ids("u a")))
    assert {t.author for t in view(example, row, b.setup)} == {"unknown"}
