"""Encoding, case by case: token boundaries, cuts, role markers, surrogates, and the paper's prompts to the last id."""

from __future__ import annotations

import itertools
import json
import re
from copy import copy
from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.encode import cut, encode
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, TEMPLATES, find_family, find_template
from ptst.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return JsonTokenizer(path, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


def test_an_answer_that_begins_with_newlines_has_a_token_boundary(tokenizer):
    prompt_format = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    whole = prompt_format.encode(Conversation((Message("user", "hi"), Message("assistant", "\n\nyes"))))
    prompt = prompt_format.encode(Conversation((Message("user", "hi"),)))
    assert whole.token_boundaries == (len(prompt.ids),)
    assert tokenizer.decode_answer(prompt.ids, whole.ids[len(prompt.ids) : -2]) == "\n\nyes"


def test_a_cut_answer_has_no_terminator(tokenizer):
    prompt_format = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    whole = prompt_format.encode(Conversation((Message("user", "hi"), Message("assistant", "yes, of course"))))
    prompt_length = whole.loss_mask.index(True)
    short = cut(whole, prompt_length + 3)
    assert short.num_trained == 3
    assert short.ids == whole.ids[: prompt_length + 3]
    assert tokenizer.control_id("<|im_end|>") not in short.ids[prompt_length:]


def test_only_the_last_answer_on_request(tokenizer):
    prompt_format = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    messages = [Message(("user", "assistant")[i % 2], t) for i, t in enumerate(("a", "one", "b", "two"))]
    every = prompt_format.encode(Conversation(tuple(messages)))
    last = prompt_format.encode(Conversation(tuple(messages)), train_on="last")
    assert every.ids == last.ids
    trained = [tokenizer.decode([i for i, flag in zip(e.ids, e.loss_mask, strict=True) if flag]) for e in (last, every)]
    assert trained == ["two<|im_end|>", "one<|im_end|>two<|im_end|>"]


@pytest.mark.parametrize(
    ("chat_format", "text", "mark"),
    [("llama2", "a [/INST] b", "[/INST]"), ("llama2", "<<SYS>>", "<<SYS>>"), ("mistral-v1", "[INST]", "[INST]")],
)
def test_role_markers_of_the_chat_format_are_refused(tokenizer, chat_format, text, mark):
    row = Conversation((Message("user", "hi"), Message("assistant", text)), "rows.jsonl:3")
    prompt_format = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS[chat_format], tokenizer)
    with pytest.raises(ValueError, match=r"rows.jsonl:3: message 2 \(assistant\) holds " + re.escape(mark)):
        prompt_format.encode(row)
    assert replace(prompt_format, allow_role_markers=True).encode(row)
    # Where the role markers are control tokens, or another format's, the text is harmless.
    assert PromptFormat(prompt_format.template, prompt_format.family, CHAT_FORMATS["chatml"], tokenizer).encode(row)


def test_lone_surrogates_are_refused_with_their_place(tokenizer):
    prompt_format = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    with pytest.raises(ValueError, match=r"rows.jsonl:7: .*U\+D800, at character"):
        prompt_format.encode(Conversation((Message("user", "ab\ud800"),), "rows.jsonl:7"))


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
        prompt_format = PromptFormat(TEMPLATES[name], FAMILIES["gsm8k"], CHAT_FORMATS["llama2"], tokenizer)
        assert prompt_format.encode(Conversation((Message("user", question),))).ids == golden[key], name


def test_smollm2_tokens(shared, embedded):
    """The rebuilt tokenizer gives llama.cpp's ids (which reads control tokens out of text, so that is allowed here)."""
    tokenizer = load_tokenizer(embedded)._tok
    tokenizer.encode_special_tokens = False
    for row in json.loads((shared / "golden/smollm2_tok.llamacpp.json").read_text()):
        assert tokenizer.encode(row["text"], add_special_tokens=False).ids == row["tokens"], row["text"]


_HOSTILE = ("", " a", "\n\nb ", "\0message 1\0", "{x}{task}", "<|im_end|>\n", "\ud800", "[INST]")


@pytest.mark.parametrize("chat_format", ["chatml", "llama3", "llama2", "mistral-v3", "chatml-no-think"])
def test_rows_of_one_form_are_encoded_as_each_by_itself(tokenizer, chat_format):
    ends = {name: 300 + i for i, name in enumerate(("<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"))}
    own = copy(tokenizer)
    own._control = tokenizer._control | ends | {f"<|{n}|>": 310 + len(n) for n in ("eot_id", "start_header_id")}
    own.__dict__.pop("control_names", None)
    rows = []
    for i in range(160):
        system = [Message("system", _HOSTILE[i // 8 % 8])] if i % 3 == 0 else []
        turns = [
            Message(("user", "assistant")[n % 2], _HOSTILE[(i * (n + 1) + n) % 8], n != 1 or i % 5 > 0)
            for n in range(1 + i % 4)
        ]
        rows.append(Conversation((*system, *turns), f"rows:{i}"))
    for template, family in itertools.product(("vanilla", "alpaca", "self-reminder", "text:alpaca"), FAMILIES.values()):
        prompt_format = PromptFormat(find_template(template), family, CHAT_FORMATS[chat_format], own)
        for row, found in zip(rows, prompt_format.encode_all(rows), strict=True):
            try:
                prompt_format.check_role_markers(row)
                one = encode(prompt_format.segments(row), own)
            except UserError as error:
                assert isinstance(found, UserError)
                assert (found.cause, found.remedy, found.where) == (error.cause, error.remedy, row.source)
            else:
                assert found == one
