"""An answer that the data leave out of the loss is read as any other, and none of its tokens is trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from ptst.audit.reference.formats import reference
from ptst.data.examples import prepare
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, TEMPLATES
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import SHARED, mistral_tokenizer

MESSAGES = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(("q1", "a1", "q2", "a2")))
LLAMA2 = SHARED / "tokenizers/llama2.tokenizer.model"


def conversation(*trained: bool, turns: tuple[Message, ...] = MESSAGES) -> Conversation:
    flags = iter(trained)
    return Conversation(tuple(replace(m, trained=next(flags)) if m.role == "assistant" else m for m in turns), "r")


@pytest.fixture(params=["chatml", "mistral-v1", "mistral-v3", "llama2"])
def chat_format(request, tiny_folder):
    name = request.param
    if name == "llama2" and not LLAMA2.exists():
        pytest.skip("needs ../shared/tokenizers")
    if name == "chatml":
        return CHAT_FORMATS[name], load_tokenizer(tiny_folder)
    return CHAT_FORMATS[name], (
        SentencePieceTokenizer(LLAMA2) if name == "llama2" else mistral_tokenizer("v1" if name[-1] == "1" else "v3")
    )


def test_under_every_template(chat_format):
    found, tokenizer = chat_format
    for template, family, train_on in product(TEMPLATES.values(), FAMILIES.values(), ("all", "last")):
        turns = MESSAGES[:2] if template.is_text else MESSAGES
        p = PromptFormat(template, family, found, tokenizer)
        flags = [(False,)] if template.is_text else [(False, True), (True, False), (False, False)]
        try:
            whole = p.encode(conversation(True, True, turns=turns), train_on)
        except UserError:  # mistral-v3 with a system prompt trains the last answer only
            whole = p.encode(conversation(True, True, turns=turns), "last")
            flags, train_on = [(False, True)], "all"
        for trained in flags:
            row = conversation(*trained, turns=turns)
            example, expected = p.encode(row, train_on), reference(row, p, train_on)
            assert example.ids == whole.ids == expected.ids
            assert example.loss_mask == expected.loss_mask
            assert p.encode(row.prompt()).ids == p.encode(conversation(True, True, turns=turns).prompt()).ids
            text = tokenizer.decode([i for i, t in zip(example.ids, example.loss_mask, strict=True) if t])
            for answer, read in zip(("a1", "a2"), trained, strict=False):
                assert (answer in text) == (read and (train_on == "all" or answer == "a2" or template.is_text))


def test_a_row_without_a_trained_answer_is_counted(chat_format):
    p = PromptFormat(TEMPLATES["chat:plain"], FAMILIES["plain"], *chat_format)
    rows = (conversation(False, False), conversation(True, False), conversation(True, True))
    examples, record = prepare(Source("d", "plain", rows), p, 10**6, "stop", "all")
    assert (len(examples), record.untrained) == (2, 1)
    assert examples[0].num_trained < examples[1].num_trained
    fingerprints = {Source("d", "plain", (row,)).fingerprint for row in rows}
    assert len(fingerprints) == 3  # another loss mask is other data
