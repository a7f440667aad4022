"""Baked templates on published chat templates and tokenizers (in ../shared), and with a template of one's own."""

from __future__ import annotations

import re
import shutil

import pytest

from ptst.errors import UserError
from ptst.text.bake import bake_chat_template
from ptst.text.bake_proof import prove_chat_template
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.templates import FAMILIES, TEMPLATES, find_template, load_template
from ptst.text.tokenizer import load_tokenizer
from tests.conftest import mistral_tokenizer
from tests.text import folders

PUBLISHED = {  # control tokens that the template spells; markers of the others are text
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0": False,
    "codellama--CodeLlama-34b-Instruct-hf": False,
    "deepseek-ai--DeepSeek-R1-Distill-Llama-8B": True,
    "meta-llama--Llama-2-7b-chat-hf": False,
    "meta-llama--Llama-3.1-8B-Instruct": True,
    "meta-llama--Meta-Llama-3-8B-Instruct": True,
    "mistralai--Mistral-7B-Instruct-v0.1": False,
    "mistralai--Mistral-7B-Instruct-v0.3": True,
    "mistralai--Mistral-Nemo-Instruct-2407": True,
}
_NAMES = re.compile("<\\|[a-z_]+\\|>|\\[/?INST\\]|<\uff5c[^<>]+\uff5c>")
OWN = r"""
name = "chat:own"
system = "Say \"{{ no }}\" to harm, 100 %} of the time.\\n\tCaf\u00e9 {# or not #}."
user = "{question}\n<end of the question>\\"
task_system = "{task}\r\nAnd: {task}"
task_user = "{task}: {x} -%}"
demonstration = ["Who are you?", "A 'model', {{ messages }}."]
safety = true
"""


def is_proven(p: PromptFormat, *differences: str) -> None:
    for generation in (False, True):
        proof = prove_chat_template(bake_chat_template(p, generation=generation), p)
        assert set(proof.differences) <= {"token-boundary", *differences}
        assert proof.prompts > 150
        assert proof.conversations > 150


@pytest.mark.thorough
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_chat_templates(tmp_path, shared, name):
    template = (shared / "configs" / "templates" / f"{name}.jinja").read_text()
    names = tuple(dict.fromkeys(_NAMES.findall(template))) if PUBLISHED[name] else ()
    folders.write_folder(tmp_path, template, names)
    for chosen, family in (("chat:llama", "gsm8k"), ("chat:alpaca", "openorca"), ("chat:in-context-defense", "plain")):
        is_proven(open_prompt_format(tmp_path, find_template(chosen), family))


def test_the_tokenizer_of_llama_2(tmp_path, shared):
    shutil.copyfile(shared / "tokenizers" / "llama2.tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    is_proven(PromptFormat(TEMPLATES["chat:llama"], FAMILIES["gsm8k"], CHAT_FORMATS["llama2"], tokenizer))


@pytest.mark.thorough
def test_the_tokenizer_of_llama_2_under_every_template(tmp_path, shared):
    shutil.copyfile(shared / "tokenizers" / "llama2.tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    for template in TEMPLATES.values():
        for family in ("gsm8k", "chatdoctor"):
            is_proven(PromptFormat(template, FAMILIES[family], CHAT_FORMATS["llama2"], tokenizer))


@pytest.mark.thorough
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistrals_tokenizers(version):
    pytest.importorskip("mistral_common", reason="needs the package mistral-common")
    tokenizer = mistral_tokenizer(version)
    for template in ("chat:llama", "chat:alpaca", "chat:self-reminder"):
        is_proven(
            PromptFormat(TEMPLATES[template], FAMILIES["openorca"], CHAT_FORMATS[f"mistral-{version}"], tokenizer)
        )


@pytest.mark.thorough
def test_the_default_model(embedded):
    for template in ("chat:llama", "chat:alpaca", "text:vanilla"):
        is_proven(open_prompt_format(embedded, find_template(template), "gsm8k"))


@pytest.mark.parametrize(
    ("name", "family"), [("chatml", "gsm8k"), ("llama2", "chatdoctor"), ("mistral-v3", "openorca")]
)
def test_a_template_of_ones_own(tmp_path, name, family):
    """Whatever its words spell, in every place that a template has."""
    (tmp_path / "own.toml").write_text(OWN)
    template = load_template(tmp_path / "own.toml")
    tokenizer = load_tokenizer(folders.write_tokenizer(tmp_path, folders.CONTROL.get(name, ())))
    is_proven(PromptFormat(template, FAMILIES[family], CHAT_FORMATS[name], tokenizer))


def test_words_that_never_give_our_ids_are_refused(tmp_path):
    """A line break of the answer prefix joins that of the prompt in every conversation."""
    (tmp_path / "own.toml").write_text('name = "text:own"\nuser = "{x}\\n"\njoin = "\\n"\n')
    template = load_template(tmp_path / "own.toml")
    tokenizer = load_tokenizer(folders.write_tokenizer(tmp_path))
    p = PromptFormat(template, FAMILIES["plain"], CHAT_FORMATS["llama2"], tokenizer)
    with pytest.raises(UserError, match=r"does not give the ids of text:own in none.*at token \d+ its text is read as"):
        prove_chat_template(bake_chat_template(p), p)
