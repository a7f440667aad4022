"""The bytes of single tokens: joined, they are the bytes of the text."""

from __future__ import annotations

import pytest

from ptst.text.tokenizer import load_tokenizer
from tests.conftest import mistral_tokenizer

TEXTS = ("Hello, world\n\n the\tend", "caf\u00e9 \u4f60\u597d", "\U0001f600\U0001f468\u200d\U0001f469", "  two")
TEXTS += ("\x00\x7f<0x0A>",)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_of_sentencepiece(version):
    tokenizer = mistral_tokenizer(version)
    for text in TEXTS:
        joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
        assert joined.decode() == f" {text}"  # the dummy space is a part of the first token
    assert tokenizer.token_bytes(tokenizer.control_id("</s>")) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize("folder", ["tiny_folder", "embedded"])
def test_of_byte_level(folder, request):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(tokenizer.control_id("<|im_end|>")) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""
    euro = tokenizer.encode("\u20ac")
    assert b"".join(map(tokenizer.token_bytes, euro)) == b"\xe2\x82\xac"
