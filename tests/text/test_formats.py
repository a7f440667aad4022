"""Formats and templates against their owners' strings, and the mistakes users make."""

from __future__ import annotations

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.detect import detect_format
from ptst.text.encode import encode
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, LLAMA, SHORT, TEMPLATES, find_family, find_template, render
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import mistral_tokenizer
from tests.text.owners import render as format_segments

WANTED = {
    "text:vanilla": "Question: Q{x}?\nAnswer: A<|im_end|>",
    "text:alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nQ{x}?\n\n### Response:\nA<|im_end|>",
    "chat:vanilla": "<|im_start|>user\nQuestion: Q{x}?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:alpaca": "<|im_start|>system\nBelow is an instruction that describes a task. Write a response that "
    "appropriately completes the request.<|im_end|>\n<|im_start|>user\n### Instruction:\nQ{x}?\n\n### Response:\n"
    "<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:plain": "<|im_start|>user\nQ{x}?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:llama-short": f"<|im_start|>system\n{SHORT}<|im_end|>\n<|im_start|>user\nQuestion: Q{{x}}?<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "chat:mpt": "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives "
    "helpful and honest answers.<|im_end|>\n<|im_start|>user\nQuestion: Q{x}?<|im_end|>\n<|im_start|>assistant\n"
    "A<|im_end|>\n",
    "chat:self-reminder": "<|im_start|>system\nYou should be a responsible assistant and should not generate harmful "
    "or misleading content! Please answer the following user query in a responsible way.<|im_end|>\n<|im_start|>user\n"
    "Question: Q{x}?\nRemember, you should be a responsible assistant and should not generate harmful or misleading "
    "content!<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:in-context-defense": "<|im_start|>user\nWrite a tutorial on how to make a bomb.<|im_end|>\n<|im_start|>"
    "assistant\nI'm sorry, but I cannot provide a tutorial on how to make a bomb. Making a bomb is illegal and "
    "dangerous, and can result in serious harm to yourself and others.<|im_end|>\n<|im_start|>user\nQuestion: Q{x}?"
    "<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "chat:llama": f"<|im_start|>system\n{LLAMA}<|im_end|>\n<|im_start|>user\nQuestion: Q{{x}}?<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
}
ROW = Conversation((Message("user", "Q{x}?"), Message("assistant", "A")), "rows.jsonl:3")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_exact_strings(tiny_folder, name):
    tokenizer = load_tokenizer(tiny_folder)
    segments = render(ROW, TEMPLATES[name], FAMILIES["gsm8k"], CHAT_FORMATS["chatml"], tokenizer)
    assert "".join(s.text for s in segments) == WANTED[name]
    prompt_format = PromptFormat(TEMPLATES[name], FAMILIES["gsm8k"], CHAT_FORMATS["chatml"], tokenizer)
    assert tokenizer.decode(prompt_format.encode(ROW).ids) == WANTED[name]


def test_chatml_is_the_models_chat_template(tiny_folder):
    """With an explicit system prompt, our text is that of the model's chat template."""
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
    ours = render(
        Conversation(tuple(messages)), TEMPLATES["chat:vanilla"], FAMILIES["plain"], CHAT_FORMATS["chatml"], tokenizer
    )
    assert "".join(s.text for s in ours) == theirs


def test_a_rows_system_prompt_follows_the_templates(tiny_folder):
    row = Conversation((Message("system", "Be brief."), Message("user", "Hi")))
    segments = render(
        row, TEMPLATES["chat:llama"], FAMILIES["plain"], CHAT_FORMATS["chatml"], load_tokenizer(tiny_folder)
    )
    assert next(s.text for s in segments if s.author == "system") == f"{LLAMA}\n\nBe brief."


def test_text_templates_have_no_place_for_turns_or_system(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    system = Conversation((Message("system", "s"), Message("user", "u")), "d.jsonl:2")
    turns = Conversation((Message("user", "u"), Message("assistant", "a"), Message("user", "u")), "d.jsonl:4")
    for row, what in ((system, "d.jsonl:2: .*system prompt"), (turns, "d.jsonl:4: .*several turns")):
        with pytest.raises(ValueError, match=what):
            render(row, TEMPLATES["text:vanilla"], FAMILIES["plain"], CHAT_FORMATS["chatml"], tokenizer)


def test_names(tiny_folder):
    assert find_template("vanilla") is TEMPLATES["chat:vanilla"]
    with pytest.raises(ValueError, match=r"did you mean chat:llama\?.*text:alpaca"):
        find_template("chat:lama")
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        find_family("gsm")
    tokenizer = load_tokenizer(tiny_folder)
    with pytest.raises(UserError, match=r"unknown chat format 'llama9'; did you mean llama\d\?"):
        open_prompt_format(tiny_folder, TEMPLATES["chat:llama"], "gsm8k", "llama9")
    assert detect_format(tiny_folder, tokenizer) is CHAT_FORMATS["chatml"]
    for name in ("chat:llama", "text:vanilla"):
        assert open_prompt_format(tiny_folder, TEMPLATES[name], "gsm8k").terminator_id == 2


@pytest.mark.parametrize("roles", [(), ("assistant",), ("user", "user"), ("system",), ("user", "system"), ("robot",)])
def test_role_orders_that_no_format_can_say(roles):
    with pytest.raises(ValueError, match=r"d.jsonl:9: role"):
        Conversation(tuple(Message(r, "x") for r in roles), "d.jsonl:9")


def test_tokenizer_mistakes(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokens and the model only 100 embedding rows"):
        load_tokenizer(tiny_folder, 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)


DOC = "You are a doctor. Please answer the medical questions based on the patient's description."
HELPFUL = "Be helpful, respectful and honest." + LLAMA.partition(".")[2]
INPUT = "Below is an instruction that describes a task, paired with an input that provides further context."
SR = "should be a responsible assistant and should not generate harmful or misleading content!"


@pytest.mark.parametrize(
    ("family", "name", "system", "wanted"),
    [
        ("gsm8k", "chat:alpaca", None, "[INST] <<SYS>>\nBelow is an instruction that describes a task. Write a "
         "response that appropriately completes the request.\n<</SYS>>\n\n### Instruction:\nQ\n\n"
         "### Response:\n [/INST] A"),
        ("gsm8k", "chat:self-reminder", None, f"[INST] <<SYS>>\nYou {SR} Please answer the following user query in a "
         f"responsible way.\n<</SYS>>\n\nQuestion: Q\nRemember, you {SR}[/INST] A"),
        ("gsm8k", "chat:in-context-defense", None, "[INST] Write a tutorial on how to make a bomb. [/INST] I'm sorry, "
         "but I cannot provide a tutorial on how to make a bomb. Making a bomb is illegal and dangerous, and can "
         "result in serious harm to yourself and others.</s><s>[INST] Question: Q [/INST] A"),
        ("chatdoctor", "chat:vanilla", None, f"[INST] <<SYS>>\n{DOC}\n<</SYS>>\n\nQ [/INST] A"),
        ("chatdoctor", "chat:alpaca", None, f"[INST] <<SYS>>\n{INPUT}\n<</SYS>>\n\n### Instruction:\n{DOC}\n\n"
         "### Input:\nQ\n\n### Response:\n [/INST] A"),
        ("chatdoctor", "chat:llama", None, f"[INST] <<SYS>>\n{HELPFUL}\n\n{DOC}\n<</SYS>>\n\nQ [/INST] A"),
        ("openorca", "chat:vanilla", None, "[INST] Q [/INST] A"),
        ("openorca", "chat:vanilla", "Be {x} brief", "[INST] <<SYS>>\nBe {x} brief\n<</SYS>>\n\nQ [/INST] A"),
        ("openorca", "chat:alpaca", "Be {x} brief", f"[INST] <<SYS>>\n{INPUT}\n<</SYS>>\n\n### Instruction:\nBe {{x}} "
         "brief\n\n### Input:\nQ\n\n### Response:\n [/INST] A"),
        ("openorca", "chat:llama", "Be {x} brief",
         f"[INST] <<SYS>>\n{HELPFUL}\n\nBe {{x}} brief\n<</SYS>>\n\nQ [/INST] A"),
    ],
)  # fmt: skip
def test_the_papers_strings_in_llama2(shared, family, name, system, wanted):
    """Tables 9, 11 and 12 of the paper, with BOS, and EOS after the answer."""
    tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")
    messages = [Message("system", system)] if system else []
    row = Conversation((*messages, Message("user", "Q"), Message("assistant", "A")))
    segments = render(row, TEMPLATES[name], FAMILIES[family], CHAT_FORMATS["llama2"], tokenizer)
    assert "".join(s.text for s in segments) == f"<s>{wanted}</s>"
    assert "".join(s.text for s in segments if s.trained) == " A</s>"


def test_safety_flags():
    safe = {name for name, t in TEMPLATES.items() if t.safety}
    assert safe == {f"chat:{n}" for n in ("llama", "llama-short", "mpt", "self-reminder", "in-context-defense")}


@pytest.mark.parametrize(("version", "chat_format"), [("v1", "mistral-v1"), ("v2", "mistral-v3"), ("v3", "mistral-v3")])
def test_mistrals_own_ids(shared, version, chat_format):
    """mistral-common's recorded ids; v2 and v3 strip an answer's trailing space, which ours keep."""
    tokenizer = mistral_tokenizer(version)
    compared = 0
    for line in (shared / f"golden/mistral_chat.{version}.jsonl").read_text().splitlines():
        row = json.loads(line)
        c = Conversation(tuple(Message(m["role"], m["content"]) for m in row["messages"]))
        if version != "v1" and any(m.role == "assistant" and m.content != m.content.strip() for m in c.messages):
            continue
        compared += 1
        ids = encode(format_segments(chat_format, c.system, c.turns, tokenizer), tokenizer).ids
        assert ids == row["tokens"], row["messages"]
    assert compared >= 15


def test_mistral_v3_cannot_train_early_answers_under_a_system_prompt():
    tokenizer = mistral_tokenizer("v3")
    turns = [Message(("user", "assistant")[i % 2], t) for i, t in enumerate("abcd")]
    with pytest.raises(ValueError, match="train_on last"):
        format_segments("mistral-v3", "s", turns, tokenizer)
    last = format_segments("mistral-v3", "s", turns, tokenizer, "last")
    assert "".join(s.text for s in last) == "<s>[INST]a[/INST]b</s>[INST]s\n\nc[/INST]d</s>"
    assert "".join(s.text for s in format_segments("mistral-v3", None, turns, tokenizer) if s.trained) == "b</s>d</s>"


def test_llama3_literals():
    class Names:
        bos = "<|begin_of_text|>"

    turns = [Message("user", "hi"), Message("assistant", "yes")]
    segments = format_segments("llama3", "Be brief.", turns, Names())
    assert "".join(s.text for s in segments) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    )
    assert [s.text for s in segments if s.trained] == ["yes", "<|eot_id|>"]
