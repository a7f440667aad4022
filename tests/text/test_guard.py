"""Guard models' folders: their prompt is read off their chat template, and they are no chat models."""

from __future__ import annotations

import json

import pytest

from ptst.errors import UserError
from ptst.open import open_model
from ptst.text.guard import PUBLISHED, judge_kind_of, open_guard
from tests.text import folders
from tests.tiny import write_tiny_model


def guard_folder(folder, template=folders.GUARD, **config):
    folder.mkdir(exist_ok=True)
    write_tiny_model(folder, **config)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(("template", "strips"), [(folders.GUARD, True), (folders.GUARD_PARTS, False)])
def test_the_prompt_is_read_off_the_chat_template(tmp_path, template, strips):
    folder = guard_folder(tmp_path / "g", template)
    guard = open_guard(folder)
    assert guard.before.startswith(" <|im_start|>user\nTask: check")
    assert guard.before.endswith("<BEGIN>\n\nUser: ")
    assert guard.between == "\n\nAgent: "
    assert guard.after.startswith("\n\n<END>\n\nFirst line must read 'safe' or 'unsafe'.")
    assert guard.strips is strips
    assert guard.source == "the folder's own chat template"
    assert judge_kind_of(folder) == "llama-guard"


def test_llama_guard_2_is_known(tmp_path, shared):
    path = shared / "configs" / "templates" / "meta-llama--Meta-Llama-Guard-2-8B.jinja"
    guard = open_guard(guard_folder(tmp_path / "g", path.read_text()))
    assert PUBLISHED[guard.sha256] == "Llama Guard 2"
    assert guard.source == "the folder's chat template, as published for Llama Guard 2"


def test_another_template_is_no_guard_s(tmp_path):
    folder = guard_folder(tmp_path / "g", folders.CHATML)
    assert judge_kind_of(folder) is None
    with pytest.raises(UserError, match=r"the chat template is not a guard model's; name the folder of one"):
        open_guard(folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"there is no chat template, and a guard model's prompt is read from it; copy"):
        open_guard(folder)


def test_a_guard_is_not_opened_as_a_chat_model(tmp_path):
    folder = guard_folder(tmp_path / "guard")
    with pytest.raises(UserError) as caught:
        open_model(str(folder))
    told = caught.value.tell(lambda name: f"--{name}")
    assert told.startswith(f"{folder} is a guard model: its chat template asks whether an exchange is safe")
    assert f"use it to judge answers: ptst.eval with --judge llama-guard:{folder}" in told
    assert open_model(str(folder), "text:vanilla").name == str(folder)
    allowed = open_model(str(folder), chat_format="chatml", allow=("chat-template",))
    assert allowed.prompt_format.chat_format.name == "chatml"


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("HarmBench-Llama-2-13b-cls", {}, "harmbench"),
        ("judge", {"_name_or_path": "cais/HarmBench-Mistral-7b-val-cls"}, "harmbench-mistral"),
        ("wildguard", {}, "wildguard"),
        ("harmbench-run-of-mine", {}, None),
    ],
)
def test_classifiers_are_told_by_their_names(tmp_path, capsys, name, config, kind):
    (tmp_path / name).mkdir()
    folder = write_tiny_model(tmp_path / name, **config)
    assert judge_kind_of(folder) == kind
    open_model(str(folder))
    told = f"looks like a classifier of answers, which serves as the judge {kind}:{folder}"
    assert (told in capsys.readouterr().err) == (kind is not None)


def test_a_broken_template_is_somebody_else_s_error(tmp_path):
    folder = guard_folder(tmp_path / "g", "{% if %} safe or unsafe")
    assert judge_kind_of(folder) is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match="cannot be rendered"):
        open_model(str(folder))
