"""The two kinds of tokenizer files, where a folder has both, say the same."""

from __future__ import annotations

import json

import pytest

from ptst.audit.reference.tokenizer import open_reference_tokenizer
from ptst.errors import UserError
from ptst.text import json_tokenizer
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import SHARED, mistral_tokenizer
from tests.text import made, owners
from tests.tiny import CONTROL, byte_tokenizer


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


def tokenizer_file(folder, **changes):
    """A small tokenizer.json with some of its parts replaced, and its settings."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(byte_tokenizer().to_str()), **changes}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": CONTROL[0]}))
    return path


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", [{"String": "a"}, {"Regex": "a"}, {"Regex": ""}])
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_rules_that_fill_any_memory(tmp_path, part, kind):
    """A thousandfold three times; a few characters more are what published files have."""
    rules = [replace(kind, "a" * 1000)] * 3
    inner = f"{part}s"
    path = tokenizer_file(tmp_path, **{part: {"type": "Sequence", inner: rules}})
    with pytest.raises(UserError, match=f"{path.name}: its replacements make texts more than 64 times as long"):
        load_tokenizer(tmp_path)
    usual = [{"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")]
    tokenizer_file(tmp_path, normalizer={"type": "Sequence", "normalizers": usual})
    assert load_tokenizer(tmp_path).encode("a b")


@pytest.mark.parametrize("word", ["Replace", "Prepend"])
def test_rules_that_are_spelt_with_escapes(tmp_path, word):
    rule = replace({"String": "a"}, "a" * 1000) if word == "Replace" else {"type": "Prepend", "prepend": "a" * 1000}
    path = tokenizer_file(tmp_path, normalizer={"type": "Sequence", "normalizers": [rule] * 3})
    path.write_text(path.read_text().replace(f'"{word}"', f'"\\u{ord(word[0]):04x}{word[1:]}"'))
    assert f'"{word}"' not in path.read_text()
    with pytest.raises(UserError, match="make texts more than 64 times as long"):
        load_tokenizer(tmp_path)


def test_merges_that_are_left_out_at_random(tmp_path):
    path = tokenizer_file(tmp_path)
    rules = json.loads(path.read_text())
    rules["model"]["dropout"] = 0.1
    path.write_text(json.dumps(rules))
    with pytest.raises(UserError, match=r"its dropout leaves out merges at random; set it to null"):
        load_tokenizer(tmp_path)


def test_a_regular_expression_that_backtracks_for_ever(tmp_path):
    """The library panics: no Exception of Python's."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    levels = [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    tokenizer_file(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": levels})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("xxy")) == "xxy"
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer fails on a text"):
        tokenizer.encode("x" * 40)


def test_a_regular_expression_that_is_slow(tmp_path, monkeypatch):
    """Its time grows with the square of the text's length, which the library does not end."""
    split = {"type": "Split", "pattern": {"Regex": "a+b"}, "behavior": "Isolated", "invert": False}
    levels = [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    tokenizer_file(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": levels})
    monkeypatch.setattr(json_tokenizer, "SECONDS", 0.1)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"
    with pytest.raises(UserError, match=r"take more than 0\.1 s over a text of 24000 characters"):
        tokenizer.encode("a" * 24000)


def test_known_regular_expressions_need_no_watch(tmp_path):
    for pattern in (made.LLAMA3, made.LLAMA3.replace("{1,3}", "")):
        rules = made.byte_level(pattern)
        folder = made.write(tmp_path, rules=rules, tokenizer_config={"eos_token": "<|endoftext|>"})
        assert load_tokenizer(folder)._limit is None


def test_ctrl_c_in_the_library_is_not_its_fault(tmp_path, monkeypatch):
    tokenizer_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    class Interrupted:
        def encode_batch_fast(self, *_args, **_kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_tok", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("abc")


@pytest.fixture(scope="module")
def joining(tmp_path_factory):
    """A sentencepiece model whose line break is one piece with some words behind it."""
    folder = tmp_path_factory.mktemp("joining")
    model = made.sentencepiece_model(user_defined=("\nthe", "\n\n"))
    made.write(folder, model=model)
    return folder


def test_a_line_break_that_joins_what_follows(joining):
    """The audit's own tokenizer reads such texts as ours does, as continuations, too."""
    ours = load_tokenizer(joining)
    theirs = open_reference_tokenizer(ours.origin)
    assert ours.encode("\nthe sum")[1:] != ours.encode("\n") + ours.encode("the sum", continuation=True)
    for text in ("the sum", "\nx", "\nthe", "x\nthe", "of the\n\n", "\U0010fffd"):
        ids = ours.encode(text, continuation=True)
        assert ours.decode(ours.encode("a") + ids) == "a" + text
        assert theirs.encode([(text, True)])[text, True] == ids
        assert [i for i, *_ in theirs.spans(text, True)] == ids
