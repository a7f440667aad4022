"""Text as it grows and stop strings across token token_boundaries, against decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptst.generation.stop_strings import TextStream, find_stop
from ptst.text.tokenizer import load_tokenizer

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
