"""What the exams share."""

from __future__ import annotations

import pytest

from ptst.text.tokenizer import JsonTokenizer
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A byte-level tokenizer of ours, and one that reads control tokens out of text, as most do."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours, raw = JsonTokenizer(path, settings), JsonTokenizer(path, settings)
    raw._tok.encode_special_tokens, raw._kept_out = False, frozenset()
    return ours, raw
