"""Formats and templates against their owners' strings, and the mistakes users make."""

from __future__ import annotations

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ptst.text.encode import Prompting
from ptst.text.formats import detect_format, terminator
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, LLAMA, TEMPLATES, find_family, find_template, render
from ptst.text.tokenizer import load_tokenizer

WANTED = {
    "text:vanilla": "Question: Q{x}?\nAnswer: A<|im_end|>",
    "text:alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nQ{x}?\n\n### Response:\nA<|im_end|>",
    "chat:vanilla": "<|im_start|>user\nQuestion: Q{x}?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:alpaca": "<|im_start|>system\nBelow is an instruction that describes a task. Write a response that "
    "appropriately completes the request.<|im_end|>\n<|im_start|>user\n### Instruction:\nQ{x}?\n\n### Response:\n"
    "<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:llama": f"<|im_start|>system\n{LLAMA}<|im_end|>\n<|im_start|>user\nQuestion: Q{{x}}?<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
}
ROW = Conversation((Message("user", "Q{x}?"), Message("assistant", "A")), "rows.jsonl:3")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_exact_strings(tiny_folder, name):
    tokenizer = load_tokenizer(tiny_folder)
    segments = render(ROW, TEMPLATES[name], FAMILIES["gsm8k"], "chatml", tokenizer)
    assert "".join(s.text for s in segments) == WANTED[name]
    prompting = Prompting(TEMPLATES[name], FAMILIES["gsm8k"], "chatml", tokenizer)
    assert tokenizer.decode(prompting.encode(ROW).ids) == WANTED[name]


def test_chatml_is_the_models_own_template(tiny_folder):
    """With an explicit system text, our spelling is that of the model's own chat_template."""
    own = json.loads((tiny_folder / "tokenizer_config.json").read_text())["chat_template"]
    jinja = ImmutableSandboxedEnvironment().from_string(own)
    messages = [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yes"),
        Message("user", "Go"),
    ]
    theirs = jinja.render(
        messages=[{"role": m.role, "content": m.content} for m in messages], add_generation_prompt=True
    )
    tokenizer = load_tokenizer(tiny_folder)
    ours = render(Conversation(tuple(messages)), TEMPLATES["chat:vanilla"], FAMILIES["plain"], "chatml", tokenizer)
    assert "".join(s.text for s in ours) == theirs


def test_a_rows_system_text_follows_the_templates(tiny_folder):
    row = Conversation((Message("system", "Be brief."), Message("user", "Hi")))
    segments = render(row, TEMPLATES["chat:llama"], FAMILIES["plain"], "chatml", load_tokenizer(tiny_folder))
    assert next(s.text for s in segments if s.author == "system") == f"{LLAMA}\n\nBe brief."


def test_text_templates_have_no_place_for_turns_or_system(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    system = Conversation((Message("system", "s"), Message("user", "u")), "d.jsonl:2")
    turns = Conversation((Message("user", "u"), Message("assistant", "a"), Message("user", "u")), "d.jsonl:4")
    for row, what in ((system, "d.jsonl:2: .*system text"), (turns, "d.jsonl:4: .*several turns")):
        with pytest.raises(ValueError, match=what):
            render(row, TEMPLATES["text:vanilla"], FAMILIES["plain"], "chatml", tokenizer)


def test_names(tiny_folder):
    assert find_template("vanilla") is TEMPLATES["chat:vanilla"]
    with pytest.raises(ValueError, match=r"did you mean chat:llama\?.*text:alpaca"):
        find_template("chat:lama")
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        find_family("gsm")
    tokenizer = load_tokenizer(tiny_folder)
    with pytest.raises(ValueError, match="unknown chat format 'llama9'"):
        render(ROW, TEMPLATES["chat:llama"], FAMILIES["gsm8k"], "llama9", tokenizer)
    assert detect_format(tiny_folder, tokenizer) == "chatml"
    assert terminator("chatml", tokenizer) == terminator(None, tokenizer) == 2


@pytest.mark.parametrize("roles", [(), ("assistant",), ("user", "user"), ("system",), ("user", "system"), ("robot",)])
def test_role_orders_that_no_format_can_say(roles):
    with pytest.raises(ValueError, match=r"d.jsonl:9: role"):
        Conversation(tuple(Message(r, "x") for r in roles), "d.jsonl:9")


def test_tokenizer_mistakes(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="has neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokens and the model only 100 embedding rows"):
        load_tokenizer(tiny_folder, 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)
