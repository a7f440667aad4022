"""What docs/templates.md and docs/chat-formats.md say is so."""

from __future__ import annotations

import re

import pytest

from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.known_differences import KNOWN_DIFFERENCES
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import TEMPLATES, find_family, find_template
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import ROOT, mistral_tokenizer
from tests.text import owners

TEXT = (ROOT / "docs" / "templates.md").read_text()
FORMATS = (ROOT / "docs" / "chat-formats.md").read_text()
ROW = Conversation((Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4")))


@pytest.mark.parametrize("chat_format", [f for f in CHAT_FORMATS if f != "chatml-no-think"])
def test_the_ids_of_the_example(chat_format, request, tmp_path):
    if chat_format == "llama2":
        tokenizer = SentencePieceTokenizer(request.getfixturevalue("shared") / "tokenizers/llama2.tokenizer.model")
    elif chat_format.startswith("llama3"):
        tokenizer = owners.llama3_tokenizer(tmp_path)
    elif chat_format == "chatml":
        tokenizer = load_tokenizer(request.getfixturevalue("embedded"))
    else:
        tokenizer = mistral_tokenizer(chat_format[-2:])
    encoded = PromptFormat(
        find_template("chat:plain"), find_family("plain"), CHAT_FORMATS[chat_format], tokenizer
    ).encode(ROW)
    (line,) = re.findall(rf"^\| `{chat_format}` \| ([\d «»]+) \|$", FORMATS, re.MULTILINE)
    before, trained, after = (list(map(int, part.split())) for part in re.split("[«»]", line))
    assert encoded.ids == before + trained + after
    assert encoded.loss_mask == [False] * len(before) + [True] * len(trained) + [False] * len(after)


def test_every_template_and_known_difference_is_listed():
    for name in TEMPLATES:
        assert f"\n| `{name}` |" in TEXT, name
    for difference in KNOWN_DIFFERENCES:
        formats = ", ".join(f"`{f}`" for f in difference.formats)
        assert f"\n| `{difference.name}` | {formats} |" in FORMATS, difference.name
    for name in CHAT_FORMATS:
        assert f"\n| `{name}` |" in FORMATS, name
