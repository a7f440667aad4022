"""A folder with a baked chat template opens as before: it is read through to the model's own chat template."""

from __future__ import annotations

import pytest

from ptst.errors import UserError
from ptst.text.bake import bake_chat_template
from ptst.text.baked import read_baked
from ptst.text.chat_template import baked_into, default_system_prompt, read_chat_template, written_chat_template
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import Template, find_template
from tests.text import folders

ROW = Conversation((Message("system", "S"), Message("user", "Q"), Message("assistant", "A")))
OWN = {  # chat template (None: there is none), control tokens, chat format asked for
    "chatml": (folders.CHATML, folders.CONTROL["chatml"], None),
    "derived": (folders.ZEPHYR, (), None),
    "default": (folders.DEFAULT, folders.CONTROL["chatml"], None),
    "none": (None, folders.CONTROL["llama3"], "llama3-dated"),
    "another": (folders.ZEPHYR, folders.CONTROL["chatml"], "chatml"),
}


def opened(folder, template, chat_format=None):
    return open_prompt_format(
        folder, find_template(template), "gsm8k", chat_format, allow_chat_template=chat_format is not None
    )


@pytest.mark.parametrize("own", OWN)
def test_a_baked_folder_opens_as_before(tmp_path, own):
    template, names, chat_format = OWN[own]
    folders.write_folder(tmp_path, template, names)
    default = default_system_prompt(tmp_path)
    before = {name: opened(tmp_path, name, chat_format) for name in ("chat:llama", "chat:plain", "text:alpaca")}
    text = bake_chat_template(before["chat:llama"])
    (tmp_path / "chat_template.jinja").write_text(text)
    assert written_chat_template(tmp_path) == text
    assert read_chat_template(tmp_path) == template
    assert default_system_prompt(tmp_path) == default
    for name, p in before.items():
        again = opened(tmp_path, name)
        if name == "text:alpaca":
            row = Conversation(ROW.turns)
        else:
            row = ROW
            assert again.chat_format == p.chat_format
            assert "chat_template.jinja is chat:llama for gsm8k, baked by ptst" in again.described
        assert again.encode(row) == p.encode(row)
    assert bake_chat_template(opened(tmp_path, "chat:llama")) == text  # as often as one likes


def test_the_model_default_is_the_own_templates(tmp_path):
    folders.write_folder(tmp_path, folders.DEFAULT, folders.CONTROL["chatml"])
    (tmp_path / "chat_template.jinja").write_text(bake_chat_template(opened(tmp_path, "chat:llama")))
    template = Template("chat:own", "{x}", system="model-default")
    assert open_prompt_format(tmp_path, template, "plain").template.system == "It is 26 Jul 2024."


def test_what_is_not_as_it_was_baked_is_told(tmp_path):
    folders.write_folder(tmp_path, folders.CHATML, folders.CONTROL["chatml"])
    text = bake_chat_template(opened(tmp_path, "chat:llama"))
    assert read_baked(text).template == "chat:llama"
    assert read_baked(text + "\n") == read_baked(text.replace("\n", "\r\n")) == read_baked(text)
    assert baked_into(tmp_path) is None
    for changed, says in (
        (text.replace("set turns", "set  rounds"), "is chat:llama, baked by ptst, and was edited since; bake it again"),
        (text.replace('"version":1', '"version":7'), "another version"),
        (text.replace('"own":"', '"own":"!'), "head of the baked chat template is damaged"),
        (text.replace('"family":"gsm8k",', ""), "head of the baked chat template is damaged"),
        (text.replace('"version":1', '"version":[' + "[" * 5000), "head of the baked chat template is damaged"),
    ):
        (tmp_path / "chat_template.jinja").write_text(changed)
        with pytest.raises(UserError, match=says) as told:
            opened(tmp_path, "chat:llama")
        assert str(told.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name", ['-#}{{ "x" }}', "ptst-baked {}", '"\n    ptst-baked {} -#}', "{%- generation -%}"])
def test_a_head_cannot_end_early(tmp_path, name):
    """Whatever a template is called, and whatever the model's own template spells."""
    own = folders.CHATML + "{# a comment -#}"
    folders.write_folder(tmp_path, own, folders.CONTROL["chatml"])
    p = open_prompt_format(tmp_path, Template(f"chat:{name}", "{x}"), "plain")
    text = bake_chat_template(p)
    assert text.index("-#}") == text.index("-#}\n{%- if not messages -%}")
    assert (read_baked(text).own, read_baked(text).template) == (own, f"chat:{name}")
    (tmp_path / "chat_template.jinja").write_text(text)
    assert opened(tmp_path, "chat:plain").encode(ROW).ids
