"""Text as it grows and stop strings across token token_boundaries, against decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptst.generation.stop_strings import TextStream, find_stop
from ptst.text.tokenizer import load_tokenizer
from tests.text import made

TEXT = st.text(st.sampled_from("ab the\n\u00e9\u4f60\U0001f600 in"), max_size=24)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_tokenizer(tiny_folder)


def streamed(tokenizer, prompt: list[int], ids: list[int], stops: tuple[str, ...]) -> tuple[str, str, int, bool]:
    """(text, what was handed out, tokens taken, whether a stop string ended it)."""
    stream = TextStream(tokenizer.decode_answer, prompt, stops)
    said = ""
    for n, token in enumerate(ids, 1):
        if stream.add(token):
            return stream.text, said + stream.new_text(True), n, True
        piece = stream.new_text(False)
        assert "\ufffd" not in piece, "half a character was handed out"
        said += piece
    stopped = stream.finish()
    return stream.text, said + stream.new_text(True), len(ids), stopped


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT, st.lists(st.text(st.sampled_from("ab the\n\u00e9\u4f60"), min_size=1, max_size=4), max_size=3))
def test_the_stream_says_what_the_whole_says_up_to_the_first_stop_string(tokenizer, before, text, stops):
    prompt, ids = tokenizer.encode("x" + before), tokenizer.encode(text)
    got, said, taken, stopped = streamed(tokenizer, prompt, ids, tuple(stops))
    # The definition: as soon as a stop string is complete, the text ends where the first complete one begins.
    for n in range(len(ids) + 1):
        wanted = tokenizer.decode_answer(prompt, ids[:n])
        at = find_stop(wanted, stops)
        if at is not None:
            assert (got, said, taken, stopped) == (wanted[:at], wanted[:at], n, True)
            return
    assert (got, said, taken, stopped) == (text, text, len(ids), False)


def test_bytes_that_are_no_text_come_out_at_the_end(tokenizer):
    whole = tokenizer.encode("a\u4f60")
    text, said, _, stopped = streamed(tokenizer, [5], whole[:-1], ("zz",))
    assert text == said == tokenizer.decode_answer([5], whole[:-1])
    assert text.endswith("\ufffd")
    assert not stopped


def test_a_possible_start_of_a_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer.decode_answer, [5], ("abc",))
    given_out = []
    for token in tokenizer.encode("xabxabc"):
        stopped = stream.add(token)
        given_out.append(stream.new_text(stopped))
    assert given_out == ["x", "", "", "abx", "", "", ""]
    assert stopped
    assert stream.text == "xabx"


SCRIPTS = {
    "khmer": "\u1797\u17b6\u179f\u17b6\u1781\u17d2\u1798\u17c2\u179a",
    "lao": "\u0e9e\u0eb2\u0eaa\u0eb2\u0ea5\u0eb2\u0ea7",
    "amharic": "\u12a0\u121b\u122d\u129b",
    "rare chinese": "\U00020bb7\u4dae\u9f98",
    "emoji": "a \U0001f469\u200d\U0001f680 b\U0001f1e9\U0001f1ea",
    "mixed": "the \u1797 \u1797a\ufffdb\U0001f680\n\n  c",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("tokenizers"), made.sentencepiece_model()
    folders = {f"json, {s}": {"rules": made.converted(model, s)} for s in ("prepend", "first")}
    folders["sentencepiece"] = {"model": model}
    folders["unigram"] = {"rules": made.unigram(made.sentencepiece_model("unigram"))}
    folders["byte-level"] = {"rules": made.byte_level(), "tokenizer_config": {"eos_token": "<|endoftext|>"}}
    return {name: load_tokenizer(made.write(root / name, **files)) for name, files in folders.items()}


KINDS = ("sentencepiece", "json, prepend", "json, first", "unigram", "byte-level")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_characters_of_several_tokens_come_out_whole(tokenizers, kind, script):
    tokenizer, text = tokenizers[kind], SCRIPTS[script]
    prompt, ids = tokenizer.encode("x" + text), tokenizer.encode(text, continuation=True)
    stream, said = TextStream(tokenizer.decode_answer, prompt, ()), ""
    for n, token in enumerate(ids, 1):
        assert not stream.add(token)
        said += stream.new_text(False)
        assert text.startswith(said), "a piece of a character was handed out"
        decoded = tokenizer.decode_answer(prompt, ids[:n])
        assert decoded.rstrip("\ufffd") == said.rstrip("\ufffd"), "a complete character was held back"
    stream.finish()
    assert stream.text == said + stream.new_text(True) == text
    for stop in [text[i : i + 2] for i in range(len(text) - 2)] * ("\ufffd" not in text):
        got, handed_out, _, stopped = streamed(tokenizer, prompt, ids, (stop,))
        assert (got, handed_out, stopped) == (text[: text.find(stop)],) * 2 + (True,)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_tokens_come_out_as_they_are_decoded_at_once(tokenizers, kind, data):
    """Also bytes that are no text, one after another."""
    tokenizer = tokenizers[kind]
    # Unknown text is written with a space that depends on what is before it; no model says it.
    apart = {*tokenizer.control_names, tokenizer.tokens.get("<unk>")}
    any_id = st.sampled_from([i for i in range(tokenizer.vocab_size) if i not in apart])
    part = st.sampled_from(tokenizer.encode(SCRIPTS["khmer"])[1:])
    loop = st.builds(lambda token, n: [token] * n, part, st.integers(17, 40))
    ids = data.draw(st.one_of(st.lists(st.one_of(any_id, part), max_size=60), loop))
    prompt = data.draw(st.lists(any_id, min_size=1, max_size=10))
    stream, said = TextStream(tokenizer.decode_answer, prompt, ()), ""
    for token in ids:
        stream.add(token)
        said += stream.new_text(False)
    stream.finish()
    whole = tokenizer.decode_answer(prompt, ids)
    assert stream.text == whole
    assert said + stream.new_text(True) == whole


def test_decoding_costs_the_same_for_every_token(tokenizers):
    """Also while no character is complete."""
    tokenizer, longest = tokenizers["json, prepend"], 0

    def decode(prompt, ids):
        nonlocal longest
        longest = max(longest, len(prompt) + len(ids))
        return tokenizer.decode_answer(prompt, ids)

    stream = TextStream(decode, [5] * 50, ("zz",))
    for _ in range(300):
        stream.add(tokenizer.encode("\u1797", continuation=True)[0])
    assert longest <= 40
    assert len(stream.text) >= 297
