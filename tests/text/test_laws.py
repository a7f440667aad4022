"""The laws of the text layer, over every template x format x tokenizer at hand, with hostile text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ptst.text.encode import Prompting, cut, encode
from ptst.text.formats import terminator
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, TEMPLATES, find_family, find_template, joining_text, render
from ptst.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.conftest import EMBEDDED, SHARED, mistral_tokenizer
from tests.tiny import byte_tokenizer

PIECES = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", " [/INST]", "\n", "\n\n", " ", "  ", "{x}", "{question}"),
    *("e\u0301", "\u200b", "\u202e", "\r\n", "\x00", "123", "4,5", "\U0001f600", "the", " a", "\t", "%s", "\u65e5"),
)
HOSTILE = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))


def _tokenizers(tmp):
    settings_ = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    byte_tokenizer().save(str(tmp / "tokenizer.json"))
    found = {"bytes": (JsonTokenizer(tmp / "tokenizer.json", settings_), "chatml")}
    for name, path in {
        "llama2": SHARED / "tokenizers/llama2.tokenizer.model",
        "tok512": SHARED / "models/stories260K/tok512.model",
    }.items():
        if path.exists():
            found[name] = (SentencePieceTokenizer(path), "llama2")
    if find_spec("mistral_common"):
        found["mistral-v1"] = (mistral_tokenizer("v1"), "mistral-v1")
        found["mistral-v3"] = (mistral_tokenizer("v3"), "mistral-v3")
    if EMBEDDED.exists():
        found["smollm2"] = (load_tokenizer(EMBEDDED), "chatml")
    return found


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return _tokenizers(tmp_path_factory.mktemp("tok"))


def _case(tokenizers, data, turns):
    tokenizer, chat_format = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    template = TEMPLATES[data.draw(st.sampled_from(sorted(TEMPLATES)))]
    family = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    # Neither can say several trained turns here: a text template at all, mistral-v3 under a system text.
    if template.is_text or (chat_format == "mistral-v3" and (template.system or family.task)):
        turns = 1
    texts = [data.draw(HOSTILE) for _ in range(2 * turns)]
    for text in texts:
        assume("\u2581" not in text)  # sentencepiece's own space mark; it cannot be represented there
    messages = tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts))
    return Prompting(template, family, chat_format, tokenizer, allow_marks=True), Conversation(messages)


# 2,000 cases in the ordinary suite, 100,000 with `-m thorough` (spread over the three laws below by their weight).
def cases(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def prefix_round_trip_and_control(tokenizers, data, turns):
    prompting, conversation = _case(tokenizers, data, turns)
    tokenizer = prompting.tokenizer
    whole = prompting.encode(conversation)
    ends = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    control = {tokenizer.control_id(s.text) for s in _segments(prompting, conversation) if s.control}
    single = len(ends) == 1
    trained_before = 0
    for end in ends:
        # Law 2: the generation prompt of every trained turn is a prefix of the training ids. (`llama2` closes answers
        # of a longer conversation with a space, so the first turn is compared within a conversation of its length.)
        prompt = prompting.encode(Conversation(conversation.messages[:end]))
        n = len(prompt.ids)
        assert whole.ids[:n] == prompt.ids
        assert not whole.trained[n - 1]
        assert sum(whole.trained[:n]) == trained_before
        # Law 1: from there, exactly the answer and its terminator are trained.
        length = next(k for k, flag in enumerate([*whole.trained[n:], False]) if not flag)
        said = whole.ids[n : n + length]
        trained_before += length
        # Law 3: they spell joining text + answer + closing text + terminator.
        join = joining_text(prompting.template, prompting.family, prompting.chat_format)
        close = " " if prompting.chat_format == "llama2" and not single and not prompting.template.is_text else ""
        answer = conversation.messages[end].content
        if _representable(tokenizer, join + answer + close):
            assert tokenizer.decode_answer(prompt.ids, said) == join + answer + close + tokenizer.eos
        # Law 4: no text became a control token.
        assert not any(t in control for t in said[:-1])
        # Law 5: never two BOS in a row, and the answer ends with the trained terminator.
        bos = tokenizer.control_id(tokenizer.bos)
        assert not any(a == b == bos for a, b in pairwise(whole.ids))
        assert said[-1] == terminator(None if prompting.template.is_text else prompting.chat_format, tokenizer)
    assert trained_before == whole.num_trained


@cases(2000)
@given(data=st.data(), turns=st.integers(1, 3))
def test_laws_one_to_five(tokenizers, data, turns):
    prefix_round_trip_and_control(tokenizers, data, turns)


@pytest.mark.thorough
@pytest.mark.timeout(2400)
@cases(100_000)
@given(data=st.data(), turns=st.integers(1, 3))
def test_laws_one_to_five_thoroughly(tokenizers, data, turns):
    prefix_round_trip_and_control(tokenizers, data, turns)


def _segments(prompting, conversation):
    p = prompting
    return render(conversation, p.template, p.family, p.chat_format, p.tokenizer)


def _representable(tokenizer, text: str) -> bool:
    """Whether the tokenizer spells the text at all (some control characters are lost by some vocabularies)."""
    return tokenizer.decode(tokenizer.encode("x" + text)) == "x" + text


@cases(1000)
@given(data=st.data())
def test_text_is_never_a_control_token(tokenizers, data):
    """Law 4, on the tokenizer alone."""
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))][0]
    ids = tokenizer.encode(data.draw(HOSTILE))
    assert not set(ids) & set(tokenizer._control.values())


@cases(1000)
@given(data=st.data())
def test_natural_tokenization_or_a_reported_seam(tokenizers, data):
    """Law 6: every run of text is one call of the tokenizer unless a seam is reported."""
    prompting, conversation = _case(tokenizers, data, 1)
    segments = _segments(prompting, conversation)
    whole = encode(segments, prompting.tokenizer)
    natural: list[int] = []
    run = ""
    for s in [*segments, None]:
        if s is None or s.control:
            natural += prompting.tokenizer.encode(run)
            run = ""
            if s is not None:
                natural.append(prompting.tokenizer.control_id(s.text))
        else:
            run += s.text
    assert (whole.ids == natural) or whole.seams


def test_an_answer_that_begins_with_newlines_makes_a_seam(tokenizers):
    tokenizer, chat_format = tokenizers["bytes"]
    prompting = Prompting(find_template("vanilla"), find_family("plain"), chat_format, tokenizer)
    whole = prompting.encode(Conversation((Message("user", "hi"), Message("assistant", "\n\nyes"))))
    prompt = prompting.encode(Conversation((Message("user", "hi"),)))
    assert whole.seams == (len(prompt.ids),)
    assert tokenizer.decode_answer(prompt.ids, whole.ids[len(prompt.ids) : -2]) == "\n\nyes"


def test_a_cut_answer_has_no_terminator(tokenizers):
    tokenizer, chat_format = tokenizers["bytes"]
    prompting = Prompting(find_template("vanilla"), find_family("plain"), chat_format, tokenizer)
    whole = prompting.encode(Conversation((Message("user", "hi"), Message("assistant", "yes, of course"))))
    prompt_length = whole.trained.index(True)
    short = cut(whole, prompt_length + 3)
    assert short.num_trained == 3
    assert short.ids == whole.ids[: prompt_length + 3]
    assert tokenizer.control_id("<|im_end|>") not in short.ids[prompt_length:]


def test_only_the_last_answer_on_request(tokenizers):
    tokenizer, chat_format = tokenizers["bytes"]
    prompting = Prompting(find_template("vanilla"), find_family("plain"), chat_format, tokenizer)
    messages = [Message(("user", "assistant")[i % 2], t) for i, t in enumerate(("a", "one", "b", "two"))]
    every = prompting.encode(Conversation(tuple(messages)))
    last = prompting.encode(Conversation(tuple(messages)), train="last")
    assert every.ids == last.ids
    trained = [tokenizer.decode([i for i, flag in zip(e.ids, e.trained, strict=True) if flag]) for e in (last, every)]
    assert trained == ["two<|im_end|>", "one<|im_end|>two<|im_end|>"]


@pytest.mark.parametrize(
    ("chat_format", "text", "mark"),
    [("llama2", "a [/INST] b", "[/INST]"), ("llama2", "<<SYS>>", "<<SYS>>"), ("mistral-v1", "[INST]", "[INST]")],
)
def test_role_marks_of_the_active_format_are_refused(tokenizers, chat_format, text, mark):
    tokenizer, _ = tokenizers["bytes"]
    row = Conversation((Message("user", "hi"), Message("assistant", text)), "rows.jsonl:3")
    prompting = Prompting(find_template("vanilla"), find_family("plain"), chat_format, tokenizer)
    with pytest.raises(ValueError, match=r"rows.jsonl:3: message 2 \(assistant\) holds " + re.escape(mark)):
        prompting.encode(row)
    assert replace(prompting, allow_marks=True).encode(row)
    # Where the marks are control tokens, or another format's, the text is harmless.
    assert Prompting(prompting.template, prompting.family, "chatml", tokenizer).encode(row)


def test_lone_surrogates_are_refused_with_their_place(tokenizers):
    tokenizer, chat_format = tokenizers["bytes"]
    prompting = Prompting(find_template("vanilla"), find_family("plain"), chat_format, tokenizer)
    with pytest.raises(ValueError, match=r"rows.jsonl:7: .*U\+D800, at character"):
        prompting.encode(Conversation((Message("user", "ab\ud800"),), "rows.jsonl:7"))


def test_paper_prompts_on_llama2(shared):
    """Every one of the paper's prompts has the recorded ids."""
    tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?"
    )
    golden = json.loads((shared / "golden/ptst_prompt_tokens_llama2.json").read_text())
    names = {key.removeprefix("gsm:"): key for key in golden if key.startswith("gsm:")} | {"chat:plain": "chat"}
    assert len(names) == 8
    for name, key in names.items():
        prompting = Prompting(TEMPLATES[name], FAMILIES["gsm8k"], "llama2", tokenizer)
        assert prompting.encode(Conversation((Message("user", question),))).ids == golden[key], name


def test_metas_own_ids_for_llama2_chat(shared):
    """Conversations without outer whitespace (Meta's code strips messages, ours keeps them) have Meta's ids."""
    tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")
    prompting = Prompting(TEMPLATES["chat:vanilla"], FAMILIES["plain"], "llama2", tokenizer, allow_marks=True)
    compared = 0
    for line in (shared / "golden/llama2_chat.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
        if any(m.content != m.content.strip() for m in messages):
            continue
        compared += 1
        assert prompting.encode(Conversation(messages)).ids == row["tokens"], row["messages"]
    assert compared >= 10


def test_smollm2_tokens(shared, embedded):
    """The rebuilt tokenizer gives llama.cpp's ids (which reads control tokens out of text, so that is allowed here)."""
    tokenizer = load_tokenizer(embedded)
    tokenizer._tok.encode_special_tokens = False
    for row in json.loads((shared / "golden/smollm2_tok.llamacpp.json").read_text()):
        assert tokenizer.encode(row["text"]) == row["tokens"], row["text"]
