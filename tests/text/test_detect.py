"""Which chat format a folder has: by its chat template, by its vocabulary, as asked; and the owner's check."""

from __future__ import annotations

import json

import pytest

from ptst.audit.reference.formats import reference
from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS, NO_CHAT_FORMAT
from ptst.text.chat_template import default_system_prompt, read_chat_template, render_chat_template
from ptst.text.detect import find_format
from ptst.text.prompt_format import check_used, open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_template
from ptst.text.tokenizer import load_tokenizer
from tests.text import folders


def found(folder, chosen=None, **given):
    return find_format(folder, load_tokenizer(folder), chosen, **given)


@pytest.mark.parametrize(
    ("template", "names", "wanted", "differences"),
    [
        (folders.CHATML.replace(folders.LOOP, "{{ bos_token }}" + folders.LOOP), "chatml", "derived", ""),
        (folders.NO_LAST_END, "chatml", "chatml", "row-end"),
        (folders.DEFAULT, "chatml", "chatml", "default-system-prompt"),
        (folders.LLAMA3, "llama3", "llama3", "outer-whitespace"),
        (folders.LLAMA2, "", "llama2", "single-turn-close, outer-whitespace"),
        (folders.MISTRAL_V1.replace("'[INST] '", "' [INST] '"), "", "mistral-v1", "control-space"),
        (folders.MISTRAL_V1.replace("' ' + m.content", "m.content"), "", "mistral-v1", "answer-space"),
        (folders.MISTRAL_V3, "mistral-v3", "mistral-v3", "lost-system-prompt"),
        (folders.MISTRAL_V7, "mistral-v7", "mistral-v7", ""),
        # The vocabulary alone would say llama3, mistral-v3, chatml.
        (folders.ZEPHYR, "llama3", "derived", ""),
        (folders.MISTRAL_V1, "mistral-v3", "derived", ""),
        (folders.GEMMA.replace("start_of_turn", "im_start"), "chatml", "derived", "generation-prompt"),
    ],
)
def test_the_spelling_decides(tmp_path, template, names, wanted, differences):
    folders.write_folder(tmp_path, template, folders.CONTROL.get(names, ()))
    got = found(tmp_path)
    assert got.chat_format.name.partition(":")[0] == wanted
    if wanted != "derived":
        how = "as the folder's chat template has it" + (f" but for {differences}" if differences else "")
        assert got.how == how
    else:
        assert got.how.startswith("derived from the folder's chat template")


@pytest.mark.parametrize("rule", ["upper", "replace('\\n', ' ')"])
def test_a_template_that_rewrites_texts_is_no_known_format(tmp_path, rule):
    rewritten = folders.CHATML.replace("m.content", f"(m.content | {rule})")
    folders.write_folder(tmp_path, rewritten, folders.CONTROL["chatml"])
    for chosen in (None, "chatml"):
        with pytest.raises(UserError, match="the chat template rewrites the texts of messages"):
            found(tmp_path, chosen)
    assert found(tmp_path, "chatml", allow_chat_template=True).chat_format.name == "chatml"


def test_a_bos_token_that_the_tokenizer_lacks(tmp_path):
    folders.write_folder(tmp_path, "{{ bos_token }}" + folders.CHATML, folders.CONTROL["chatml"], bos_token="<BOS>")
    with pytest.raises(UserError, match="which is named '<BOS>', and the tokenizer has no such token; name the right"):
        found(tmp_path)
    folders.write_folder(tmp_path, folders.CHATML, folders.CONTROL["chatml"], bos_token="<BOS>")
    assert found(tmp_path).chat_format.name == "chatml"


def test_without_a_chat_template_the_vocabulary_decides_and_that_is_said(tmp_path):
    folders.write_folder(tmp_path, None, folders.CONTROL["llama3"])
    got = found(tmp_path)
    assert (got.chat_format.name, got.how) == ("llama3", "told by the vocabulary; the folder has no chat template")
    p = open_prompt_format(tmp_path, find_template("chat:plain"), "plain")
    assert p.described.endswith(
        "family plain (the chat format is told by the vocabulary; the folder has no chat template)"
    )
    assert found(tmp_path, "llama2").how == "the one asked for; the folder has no chat template"


def test_a_wrong_chat_format_is_questioned(tmp_path):
    folders.write_folder(tmp_path, folders.ZEPHYR, folders.CONTROL["chatml"])
    with pytest.raises(
        UserError, match=r"chatml is not the chat format of this folder: at character 2 of a gener"
    ) as told:
        found(tmp_path, "chatml")
    assert "the format has '<|im_start|>user\\n{user}" in str(told.value)
    assert "the folder's chat template '<|user|>\\n{user}" in str(told.value)
    assert str(told.value).endswith("leave out chat_format, or allow it with allow chat-template")
    allowed = found(tmp_path, "chatml", allow_chat_template=True)
    assert allowed.chat_format is CHAT_FORMATS["chatml"]
    assert "not the folder's: at character 2" in allowed.how
    with pytest.raises(UserError, match="no control token"):
        found(tmp_path, "llama3")
    with pytest.raises(UserError, match="unknown chat format 'zephyr'"):
        found(tmp_path, "zephyr")


def test_a_template_that_cannot_be_rendered_can_be_overridden(tmp_path):
    folders.write_folder(tmp_path, "{{ messages.append(1) }}", folders.CONTROL["chatml"])
    for chosen in (None, "chatml", "derived"):
        with pytest.raises(UserError, match=r"sandbox forbids.*; choose a chat_format and allow it"):
            found(tmp_path, chosen)
    assert found(tmp_path, "chatml", allow_chat_template=True).chat_format is CHAT_FORMATS["chatml"]


def test_text_templates_need_no_chat_format(tmp_path):
    """A base model: no chat template, no role markers."""
    folders.write_folder(tmp_path, None)
    p = open_prompt_format(tmp_path, find_template("text:vanilla"), "gsm8k")
    assert p.chat_format is NO_CHAT_FORMAT
    assert p.encode(Conversation((Message("user", "Q"), Message("assistant", "A")))).num_trained
    for chosen in (None, "none"):
        with pytest.raises(
            UserError, match=r"no chat template; choose chat_format .* or for a base model a text: template"
        ):
            open_prompt_format(tmp_path, find_template("chat:plain"), "plain", chosen)
    with pytest.raises(UserError, match="unknown chat format 'x'"):
        open_prompt_format(tmp_path, find_template("text:vanilla"), "plain", "x")


def test_a_chat_format_that_no_template_uses_is_refused():
    text, chat = find_template("text:vanilla"), find_template("chat:plain")
    with pytest.raises(UserError, match=r"chat_format llama2 has no effect under text:vanilla.*; leave it out"):
        check_used("llama2", text)
    for used in [("llama2", text, chat), ("llama2",), (None, text), ("none", text)]:
        check_used(*used)


def test_options_that_no_folder_gets_by_itself(tmp_path):
    """Llama 3.1's dates."""
    dated = folders.LLAMA3.replace(
        folders.LOOP,
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\n\nCutting Knowledge Date: December 2023\n' }}"
        "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}{% if messages[0].role == 'system' %}"
        "{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}" + folders.LOOP,
    ).replace("(bos_token if loop.first else '') + ", "")
    folders.write_folder(tmp_path, dated, folders.CONTROL["llama3"])
    assert found(tmp_path).how.endswith("but for date-preamble, outer-whitespace")
    assert found(tmp_path, "llama3-dated").how.endswith("chat template has it but for outer-whitespace")


@pytest.mark.parametrize(
    ("chosen", "thinks", "says"),
    [
        (None, None, "has it (enable_thinking at its default) but for empty-reasoning, text-dependent"),
        ("chatml-no-think", False, "has it (enable_thinking off) but for text-dependent"),
        ("derived", None, "template (enable_thinking at its default) but for text-dependent"),
    ],
)
def test_the_switch_of_reasoning(tmp_path, chosen, thinks, says):
    """Each format writes what the chat template writes with that switch; earlier answers have no block."""
    folders.write_folder(tmp_path, folders.THINKING, folders.CONTROL["thinking"])
    p = open_prompt_format(tmp_path, find_template("chat:plain"), "plain", chosen)
    assert p.found.endswith(says)
    system, texts = Message("system", "S"), ("Q", "A", "R", "B", "T")
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    for count in range(1, 6):
        for start in ((), (system,)):
            row = Conversation((*start, *turns[:count]))
            switches = (("enable_thinking", thinks),) if thinks is not None else ()
            (theirs,) = render_chat_template(tmp_path, [row.to_json()], switches=switches)
            same = "".join(s.text for s in p.segments(row, "last")) == theirs
            assert same is (chosen is not None or not row.answered)
            if row.answered:
                assert reference(row, p, "last").ids == p.encode(row, "last").ids  # the audit's own writing
    if chosen is not None:
        with pytest.raises(UserError, match=r"writes earlier answers otherwise.*; train on the last answer only"):
            p.segments(Conversation(tuple(turns[:4])))


def test_where_chat_templates_are(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert read_chat_template(tmp_path) == "one"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "two"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "two"
    settings.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(UserError, match=r"of its chat templates \(rag\) none is named default; write the one to use"):
        read_chat_template(tmp_path)
    settings.write_text("{}")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert read_chat_template(tmp_path) == "three"  # of a processor of images and text
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert read_chat_template(tmp_path) == "one"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("r")
    with pytest.raises(UserError, match=r"additional_chat_templates: of its .* \(rag\) none is named default"):
        read_chat_template(tmp_path)
    (more / "default.jinja").write_text("additional")
    assert read_chat_template(tmp_path) == "additional"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_chat_template(tmp_path) == "four"
    assert default_system_prompt(tmp_path) is None


@pytest.mark.parametrize(("template", "wanted"), [(folders.CHATML, "chatml"), (folders.HEADLESS, "derived")])
def test_a_terminator_that_swallows_the_line_break_after_it(tmp_path, template, wanted):
    """As in Phi-3's folders: the format is the owner's without that line break."""
    names = ("<|im_start|>", "<|im_end|>", "<|end|>")
    folders.write_folder(tmp_path, template, names)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in rules["added_tokens"]:
        token["rstrip"] = token["content"] in names[1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    p = open_prompt_format(tmp_path, find_template("chat:plain"), "plain")
    assert p.chat_format.name.startswith(wanted)
    row = Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate("QARB")))
    (text,) = render_chat_template(tmp_path, [row.to_json()])
    ids = p.encode(row, "last").ids
    assert ids == p.tokenizer.encode_markers(text)
    assert p.tokenizer.decode(ids) == text.replace(">\n<", "><").removesuffix("\n") != text


@pytest.mark.parametrize(
    ("settings", "files", "wanted"),
    [
        ({}, {"special_tokens_map": {"eos_token": "<|end|>"}}, "<s> <|end|> "),
        ({"added_tokens_decoder": {}}, {"special_tokens_map": {"eos_token": "<|end|>"}}, "<s> </s> "),
        ({"bos_token": None}, {"special_tokens_map": {"bos_token": {"content": "<s>"}}}, "<s> </s> "),
        ({"bos_token": None}, {}, " </s> "),
        ({"image_token": "<|end|>"}, {}, "<s> </s> <|end|>"),
        ({"extra_special_tokens": {"image_token": "<|end|>"}}, {}, "<s> </s> <|end|>"),
        ({"model_specific_special_tokens": {"image_token": "<|end|>"}}, {}, "<s> </s> <|end|>"),
    ],
)
def test_the_names_of_tokens_that_a_chat_template_gets(tmp_path, settings, files, wanted):
    """As transformers takes them from both files; the tokenizer has the same EOS."""
    text = "{{ bos_token }} {{ eos_token }} {{ image_token }}"
    folders.write_folder(tmp_path, text, ("<|end|>",), **settings)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    asked = [{"role": "user", "content": "x"}]
    assert render_chat_template(tmp_path, [asked]) == [wanted]
    assert load_tokenizer(tmp_path).eos == wanted.split(" ")[1]
