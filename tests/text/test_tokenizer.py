"""The two kinds of tokenizer files, where a folder has both, say the same."""

from __future__ import annotations

import json

import pytest

from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import SHARED, mistral_tokenizer
from tests.text import owners


@pytest.fixture(scope="module", params=["mistral-v1", "mistral-v3", "llama2"])
def both(request, tmp_path_factory):
    path = SHARED / "tokenizers/llama2.tokenizer.model"
    if request.param == "llama2" and not path.exists():
        pytest.skip("needs ../shared/tokenizers")
    model = SentencePieceTokenizer(path) if request.param == "llama2" else mistral_tokenizer(request.param[-2:])
    return model, owners.as_json(model, tmp_path_factory.mktemp("json") / "tokenizer.json")


def test_both_files_give_the_same_ids(both):
    ours, theirs = both
    texts = [m.content for _, turns in owners.conversations(11, 300) for m in turns]
    for text in (*texts, " a", "a ", "  ", "\n", "</s>", "[INST]", "<0x0A>", "\U00010348", "\x00", "\u200b", "1 2  3"):
        for continuation in (False, True):
            ids = ours.encode(text, continuation=continuation)
            assert theirs.encode(text, continuation=continuation) == ids, (text, continuation)
        assert theirs.decode(ids) == ours.decode(ids)


def test_both_files_give_the_same_conversations(both):
    ours, theirs = both
    for tokenizer in both:
        assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")
    template, family = find_template("chat:plain"), find_family("plain")
    for _, turns in owners.conversations(12, 100):
        row = Conversation(tuple(turns))
        one, two = (PromptFormat(template, family, CHAT_FORMATS["llama2"], t).encode(row) for t in (ours, theirs))
        assert one == two


def test_sentencepiece_is_taken_where_a_folder_has_both(both, tmp_path):
    ours, theirs = both
    (tmp_path / "tokenizer.json").write_text(theirs._tok.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert type(load_tokenizer(tmp_path)) is type(theirs)
    (tmp_path / "tokenizer.model").write_bytes(ours._sp.serialized_model_proto())
    assert type(load_tokenizer(tmp_path)) is SentencePieceTokenizer


def test_a_remembered_text_is_not_the_callers_to_change(both):
    for tokenizer in both:
        first = tokenizer.encode("Question: ")
        first.append(-1)
        assert tokenizer.encode("Question: ") == first[:-1]


def test_a_continuation_gets_no_dummy_space(both):
    for tokenizer in both:
        glued = tokenizer.encode("a") + tokenizer.encode("b", continuation=True)
        assert tokenizer.decode(glued) == "ab"
        assert tokenizer.encode("b") != tokenizer.encode("b", continuation=True)


def test_a_row_beyond_the_vocabulary_is_no_text(both):
    """Embeddings are often padded, and a model may draw such a row."""
    for tokenizer in both:
        ids = tokenizer.encode("Question: ")
        beyond = [ids[0], tokenizer.vocab_size, *ids[1:], tokenizer.vocab_size + 60]
        assert tokenizer.decode(beyond) == tokenizer.decode(ids)
