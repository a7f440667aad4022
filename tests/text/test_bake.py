"""Baked chat templates: every template of every chat format gives our ids, and a changed one is refused."""

from __future__ import annotations

import re
from functools import cache

import pytest

from ptst.errors import UserError
from ptst.text.bake import bake_chat_template
from ptst.text.bake_proof import prove_chat_template
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.templates import FAMILIES, TEMPLATES, Template
from ptst.text.tokenizer import load_tokenizer
from tests.text import folders

NAMES = {name: folders.CONTROL.get(name, ()) for name in folders.SPELLED}
NAMES |= {"llama3-dated": NAMES["llama3"], "chatml-no-think": folders.CONTROL["thinking"]}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A small tokenizer for each chat format."""

    @cache
    def made(name):
        return load_tokenizer(folders.write_tokenizer(tmp_path_factory.mktemp(name), NAMES[name]))

    return made


def is_proven(p: PromptFormat) -> None:
    proof = prove_chat_template(bake_chat_template(p), p)
    assert proof.prompts > 150
    assert proof.conversations > 150
    assert set(proof.differences) <= {"token-boundary"}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_every_template_of_every_format_and_family(tokenizers, name):
    for template in TEMPLATES.values():
        for family in FAMILIES.values():
            is_proven(PromptFormat(template, family, CHAT_FORMATS[name], tokenizers(name)))


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "name"), list(enumerate(CHAT_FORMATS)))
def test_every_template_of_every_format(tokenizers, number, name):
    """Over the formats, each template meets each family, and each format meets each family."""
    families = list(FAMILIES.values())
    for i, template in enumerate(TEMPLATES.values()):
        family = families[(number + i) % len(families)]
        is_proven(PromptFormat(template, family, CHAT_FORMATS[name], tokenizers(name)))


@pytest.mark.parametrize(("number", "name"), list(enumerate(CHAT_FORMATS)))
def test_some_template_of_every_format(tokenizers, number, name):
    template = list(TEMPLATES.values())[2 + number]
    family = list(FAMILIES.values())[number % 4]
    is_proven(PromptFormat(template, family, CHAT_FORMATS[name], tokenizers(name)))


CHANGES = {  # of chat:llama in llama2, by what is lost
    "a line break": ("\\n<</SYS>>\\n\\n", "\\n<</SYS>>\\n"),
    "BOS": ('"<s>[INST] <<SYS>>', '"[INST] <<SYS>>'),
    "the family's words": ('"Question: "', '""'),
    "the order": ("before + content + after", "content + before + after"),
    "a turn": ("loop.index0 % 2 == 0", "loop.first"),
    "the terminator": ("</s>", ""),
    "the end of earlier answers": ('(" " if turns | length > 2 else "")', '""'),
    "texts as they are": ("{{- message.content -}}", "{{- message.content | trim -}}"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_template_is_refused(tokenizers, what):
    p = PromptFormat(TEMPLATES["chat:llama"], FAMILIES["gsm8k"], CHAT_FORMATS["llama2"], tokenizers("llama2"))
    baked = bake_chat_template(p)
    old, new = CHANGES[what]
    head, end, body = baked.partition("-#}")
    assert old in body
    with pytest.raises(UserError, match="does not give the ids of chat:llama in llama2: of the conversation"):
        prove_chat_template(head + end + body.replace(old, new), p)


def test_a_lost_demonstration_is_refused(tokenizers):
    p = PromptFormat(
        TEMPLATES["chat:in-context-defense"], FAMILIES["plain"], CHAT_FORMATS["chatml"], tokenizers("chatml")
    )
    lines = bake_chat_template(p).split("\n")
    kept = [line for line in lines if "tutorial on how" not in line]
    assert len(kept) == len(lines) - 1
    with pytest.raises(UserError, match="does not give the ids of chat:in-context-defense"):
        prove_chat_template("\n".join(kept), p)


def test_a_system_prompt_at_another_place_is_refused(tokenizers):
    p = PromptFormat(TEMPLATES["chat:llama"], FAMILIES["plain"], CHAT_FORMATS["chatml"], tokenizers("chatml"))
    baked = bake_chat_template(p)
    found = re.search(r'set opening = ("[^\n]*") \+ task \+ ("[^\n]*") -%', baked)
    swapped = baked.replace(found[0], f"set opening = task + {found[1]} + {found[2]} -%")
    with pytest.raises(UserError, match=r"of the conversation \(system .*at character \d+ it writes"):
        prove_chat_template(swapped, p)


def test_marks_of_another_place_are_refused(tokenizers):
    p = PromptFormat(TEMPLATES["chat:plain"], FAMILIES["plain"], CHAT_FORMATS["llama2"], tokenizers("llama2"))
    baked = bake_chat_template(p, generation=True)
    moved = baked.replace('" " + content', "content").replace("{%- generation -%}", '{{- " " -}}{%- generation -%}')
    assert moved != baked
    with pytest.raises(UserError, match="around what is trained"):
        prove_chat_template(moved, p)


@pytest.mark.parametrize("generation", [False, True])
def test_words_that_spell_the_marks_are_words(tokenizers, generation):
    words = '"{%- generation -%}{x}{% endgeneration %} \\" {# '
    template = Template('chat:a"{% generation %}', words, system="{%- generation -%} #}")
    p = PromptFormat(template, FAMILIES["plain"], CHAT_FORMATS["llama2"], tokenizers("llama2"))
    assert prove_chat_template(bake_chat_template(p, generation=generation), p).conversations


def test_needs_nothing_that_is_not_there(tokenizers):
    p = PromptFormat(TEMPLATES["chat:llama"], FAMILIES["gsm8k"], CHAT_FORMATS["llama3"], tokenizers("llama2"))
    with pytest.raises(UserError, match="no control token"):
        bake_chat_template(p)
