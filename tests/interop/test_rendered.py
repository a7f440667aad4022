"""Prompts as text for another tool: the ids are those of training and testing under every template and format."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.interop.rendered import render_prompt
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import TEMPLATES, find_template
from tests.text import folders

HOSTILE = ("Say </s> [INST] <|im_end|>.", " the a\n\n", "{x}")
ANSWERS = ("yes", " yes", "\n\nyes", "the\n", ": a")


def prompt_format(folder, name: str, template: str) -> PromptFormat:
    folder.mkdir(exist_ok=True)
    folders.write_folder(folder, folders.SPELLED[name], folders.CONTROL.get(name, ()))
    return open_prompt_format(folder, find_template(template), "gsm8k", allow_role_markers=True)


@pytest.mark.parametrize("name", folders.SPELLED)
def test_ids_are_those_of_training(tmp_path, name):
    own = prompt_format(tmp_path / "model", name, "chat:plain")
    for template in TEMPLATES.values():
        p = replace(own, template=template)
        for question in HOSTILE:
            asked = Conversation((Message("user", question),))
            rendered = render_prompt(p, asked.messages)
            prompt = p.encode(asked).ids
            assert rendered.ids(p.tokenizer) == prompt
            for answer in ANSWERS:
                whole = p.encode(Conversation((*asked.messages, Message("assistant", answer)))).ids
                given, scored = rendered.pair(answer, p.tokenizer)
                assert given == prompt
                assert whole[: len(given + scored)] == given + scored, (template.name, answer)
                assert set(whole[len(given + scored) :]) & p.stop_ids  # what is left is the end of the answer


def test_answer_that_is_begun(tmp_path):
    p = prompt_format(tmp_path / "model", "llama2", "chat:llama")
    messages = [Message("user", "Why?"), Message("assistant", "Because the")]
    rendered = render_prompt(p, messages, begun=True)
    assert rendered.endswith("[/INST] Because the")
    given, scored = rendered.pair(" a", p.tokenizer)
    assert p.tokenizer.decode(given).endswith("[/INST] Because the")
    assert p.tokenizer.decode_answer(given, scored) == " a"
    given, scored = rendered.pair("re is", p.tokenizer)  # goes on inside a word
    assert given == rendered.ids(p.tokenizer)
    assert p.tokenizer.decode_answer(given, scored) == "re is"
    with pytest.raises(UserError, match="no answer is begun"):
        render_prompt(p, messages[:1], begun=True)
    with pytest.raises(UserError, match="an answer is to follow an answer"):
        render_prompt(p, messages)


def test_survives_a_cache(tmp_path):
    p = prompt_format(tmp_path / "model", "chatml", "chat:llama")
    rendered = render_prompt(p, [Message("user", "Say <|im_end|>.")])
    for again in (pickle.loads(pickle.dumps(rendered)), copy.deepcopy(rendered)):
        assert again == rendered
        assert again.ids(p.tokenizer) == rendered.ids(p.tokenizer)
