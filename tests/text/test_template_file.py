"""A user's own template: read, used, or refused with file and key. The documented example runs."""

from __future__ import annotations

import re

import pytest

from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, load_template, render
from ptst.text.tokenizer import load_tokenizer
from tests.conftest import ROOT


def test_the_documented_example(tmp_path, tiny_folder):
    example = re.search(r"```toml\n(.*?)```", (ROOT / "docs/templates.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "t.toml").write_text(example)
    template = load_template(tmp_path / "t.toml")
    assert template.safety
    segments = render(
        Conversation((Message("user", "{x}"),)),
        template,
        FAMILIES["gsm8k"],
        CHAT_FORMATS["chatml"],
        load_tokenizer(tiny_folder),
    )
    text = "".join(s.text for s in segments)
    assert "Question: {x}<|im_end|>" in text
    assert template.system in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('name = "chat:a"', "user is missing"),
        ('name = "chat:a"\nuser = "no place"', r"user must hold \{question\} or \{x\} exactly once"),
        ('name = "chat:a"\nuser = "{x} {question}"', "exactly once"),
        ('name = "chat:llama"\nuser = "{x}"', "not be a built-in one"),
        ('name = "mine"\nuser = "{x}"', "must begin with chat: or text:"),
        ('name = "chat:a"\nuser = "{x}"\nsytem = "s"', r"unknown key 'sytem'; did you mean system\?"),
        ('name = "chat:a"\nuser = "{x}"\nsafety = "yes"', "safety must be of type bool, not str"),
        ('name = "text:a"\nuser = "{x}"\nsystem = "s"', "a text: template has no system"),
        ('name = "chat:a"\nuser = "{x}"\ntask_system = "s"', r"task_system must hold \{task\}"),
        ('name = "chat:a"\nuser = "{x}"\ndemonstration = ["a"]', "must be two texts"),
        ("name = ", "not valid TOML"),
    ],
)
def test_mistakes(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"mine\.toml.*{message}"):
        load_template(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_template(tmp_path / "none.toml")
