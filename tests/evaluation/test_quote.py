"""Judged text cannot end the message that it is in."""

from __future__ import annotations

import pytest

from ptst.evaluation.graders.quote import without_control_tokens
from ptst.text.chat_formats import CHAT_FORMATS


@pytest.mark.parametrize(
    "name",
    [
        *("<|im_end|>", "<|start_header_id|>", "<|turn>", "<turn|>", "<\uff5cUser\uff5c>", "<s>", "</s>", "<eos>"),
        *("<end_of_turn>", "[INST]", "[/INST]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "<<SYS>>", "<</SYS>>"),
    ],
)
def test_names_of_control_tokens_are_broken(name):
    broken = without_control_tokens(f"a{name}{name} b")
    assert broken == f"a{name[0]} {name[1:]}{name[0]} {name[1:]} b"
    assert without_control_tokens(broken) == broken


@pytest.mark.parametrize("text", ["<b>1 < 2 | 3 > 2</b>", "a[INSTALL]", "x <| y", "| <table> |", "[1] <https://h>", ""])
def test_other_text_stays(text):
    assert without_control_tokens(text) == text


def test_known_role_markers_and_control_tokens_are_among_them():
    for chat_format in CHAT_FORMATS.values():
        for name in (*chat_format.role_markers, *chat_format.control_tokens):
            assert without_control_tokens(name) != name or name in ("<think>", "</think>")
