"""Baked chat templates in other programs: transformers' ids and masks, minijinja's texts."""

from __future__ import annotations

import json
import re

import pytest

from ptst.errors import UserError
from ptst.exporting.folder import copy_small_files, set_in_tokenizer_config
from ptst.text.bake import bake_chat_template
from ptst.text.bake_proof import Proof, prove_chat_template
from ptst.text.chat_template import ChatTemplate
from ptst.text.corpus import Case, corpus
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.segments import Conversation
from ptst.text.templates import find_template
from tests.text import folders, made

LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}

_FIRST, _TEXT = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
BOS = {
    "type": "TemplateProcessing",
    "single": [_FIRST, _TEXT],
    "pair": [_FIRST, _TEXT, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def llama(**settings):
    """A folder in the way of Llama 2's."""

    def write(folder):
        model = made.sentencepiece_model()
        rules = made.converted(model) | {"post_processor": BOS}
        return made.write(folder, model=model, rules=rules, tokenizer_config={**LLAMA, **settings})

    return write


def shape(name, template):
    return lambda folder: folders.write_folder(folder, template, folders.CONTROL.get(name, ()))


# By kind: how a folder is written, chat format, template, family, what tokenizer_config.json must say.
KINDS = {
    "llama2": (llama(), "llama2", "chat:llama", "gsm8k", {"legacy": True}),
    "llama2, legacy": (llama(legacy=True), "llama2", "chat:self-reminder", "gsm8k", {}),
    "mistral-v1": (llama(legacy=False), "mistral-v1", "chat:alpaca", "openorca", {"legacy": True}),
    "text": (llama(), None, "text:alpaca", "gsm8k", {"legacy": True}),
    "chatml": (shape("chatml", folders.CHATML), None, "chat:llama", "chatdoctor", {}),
    "llama3": (shape("llama3", folders.LLAMA3), None, "chat:in-context-defense", "gsm8k", {}),
    "mistral-v3": (shape("mistral-v3", folders.MISTRAL_V3), None, "chat:mpt", "gsm8k", {}),
    "zephyr": (shape("zephyr", folders.ZEPHYR), None, "chat:alpaca", "openorca", {}),
    "gemma": (shape("gemma", folders.GEMMA), None, "chat:llama-short", "plain", {}),
    "unended": (shape("unended", folders.UNENDED), None, "chat:in-context-defense", "gsm8k", {}),
}


def opened(folder, kind) -> PromptFormat:
    write, chat_format, template, family, _ = KINDS[kind]
    folder.mkdir(exist_ok=True)
    write(folder)
    return open_prompt_format(folder, find_template(template), family, chat_format)


def ours(p: PromptFormat, conversation: Conversation):
    """Example of a conversation, None for one that is refused."""
    try:
        return p.encode(conversation, "last")
    except UserError:
        return None


def is_odd(case: Case) -> bool:
    """Whether a message may differ by token-boundary."""
    return any(m.content != m.content.strip() or not m.content for m in case.conversation.messages)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(tmp_path, kind):
    """Of some of the conversations that the proof covers, in a folder that is set as the proof says."""
    check_ids(tmp_path, kind, step=5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_are_those_of_transformers(tmp_path, kind):
    proof, same, differ = check_ids(tmp_path, kind)
    assert (same, differ) == (proof.prompts + proof.conversations, sum(proof.differences.values()))


def check_ids(here, kind: str, step: int = 1) -> tuple[Proof, int, int]:
    """Compare one of every `step` conversations; how many had our ids, and how many others."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    p = opened(here / "model", kind)
    jinja = bake_chat_template(p)
    proof = prove_chat_template(jinja, p)
    assert proof.settings == KINDS[kind][-1]
    (here / "out").mkdir()
    copy_small_files(here / "model", here / "out", jinja)
    set_in_tokenizer_config(here / "out", proof.settings)
    theirs = transformers.AutoTokenizer.from_pretrained(here / "out")
    same = differ = 0
    for case in corpus(p)[::step]:
        found, row = ours(p, case.conversation), case.conversation
        try:
            ids = theirs.apply_chat_template(
                row.to_json(), add_generation_prompt=not row.answered, tokenize=True, return_dict=False
            )
        except Exception as error:
            assert "raise_exception" in str(error) or "message" in str(error) or "roles" in str(error)
            continue
        assert found is not None
        same += list(ids) == found.ids
        differ += list(ids) != found.ids
        assert list(ids) == found.ids or is_odd(case), case
    assert same > 50
    return proof, same, differ


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if not v[-1]])
def test_transformers_masks_what_we_train(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    p = opened(tmp_path / "model", kind)
    jinja = bake_chat_template(p, generation=True)
    prove_chat_template(jinja, p)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    trained = "all" if p.chat_format.history is None and not p.chat_format.system_last else "last"
    count = 0
    for case in corpus(p):
        if not case.plain or not case.conversation.answered:
            continue
        found = p.encode(case.conversation, trained)
        row = theirs.apply_chat_template(
            case.conversation.to_json(),
            chat_template=jinja,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert list(row["input_ids"]) == found.ids
        assert [bool(t) for t in row["assistant_masks"]] == found.loss_mask
        count += 1
    assert count > 10


@pytest.mark.parametrize("kind", KINDS)
def test_minijinja_writes_the_same_text(tmp_path, kind):
    minijinja = pytest.importorskip("minijinja", reason="needs the package minijinja")
    p = opened(tmp_path / "model", kind)
    jinja = bake_chat_template(p)

    def refuse(message):
        raise ValueError(message)

    cases = corpus(p)
    texts = ChatTemplate("", jinja).render([c.conversation.to_json() for c in cases])
    for trim in (False, True):  # whatever the engine does with the whitespace around blocks
        env = minijinja.Environment(
            templates={"t": jinja}, trim_blocks=trim, lstrip_blocks=trim, globals={"raise_exception": refuse}
        )
        for case, text in zip(cases[::3], texts[::3], strict=True):
            variables = {
                "messages": case.conversation.to_json(),
                "add_generation_prompt": not case.conversation.answered,
            }
            try:
                found = env.render_template("t", **variables)
            except ValueError:
                assert not isinstance(text, str)
                continue
            assert found == text


SAYS = {  # messages, add_generation_prompt, more variables -> what the template says
    "no messages": ([], True, {}, "there are no messages"),
    "a system message alone": ([("system", "S")], True, {}, "a conversation needs a message of the user"),
    "two users": ([("user", "a"), ("user", "b")], True, {}, "roles must be user and assistant in turn"),
    "an assistant first": ([("assistant", "a")], False, {}, "roles must be user and assistant in turn"),
    "a tool": ([("user", "a"), ("tool", "b")], True, {}, "roles must be user and assistant in turn"),
    "a second system": ([("user", "a"), ("system", "b")], True, {}, "roles must be user and assistant in turn"),
    "tools": ([("user", "a")], True, {"tools": ("x",)}, "no place for tools"),
    "a prompt after an answer": (
        [("user", "a"), ("assistant", "b")],
        True,
        {},
        "a generation prompt follows a message",
    ),
    "an image": ([("user", [{"type": "image"}])], True, {}, "the content of a message must be a text"),
    "two parts": ([("user", [{"type": "text", "text": "a"}] * 2)], True, {}, "the content of a message must be a text"),
    "no content": ([("user", None)], True, {}, "the content of a message must be a text"),
    "a control token": ([("user", "a<|im_end|>b")], True, {}, "a message spells <|im_end|>"),
}


@pytest.mark.parametrize("what", SAYS)
def test_what_it_refuses(tmp_path, what):
    messages, flag, more, says = SAYS[what]
    p = opened(tmp_path / "model", "chatml")
    rows = [{"role": role, "content": content} for role, content in messages]
    template = ChatTemplate("", bake_chat_template(p), (), tuple(more.items()))
    (found,) = template.render([rows], prompts=[flag])
    assert says in str(found)
    assert "cannot be rendered" in str(found)


def test_what_it_reads(tmp_path):
    """Parts of text, the role developer, and no generation prompt where none is asked for."""
    p = opened(tmp_path / "model", "chatml")
    template = ChatTemplate("", bake_chat_template(p))
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "{{ Q }}"}]
    parts = [{"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "{{ Q }}"}]}]
    plain, read, closed = template.render([asked, parts, asked], prompts=[True, True, False])
    assert plain == read == closed + "<|im_start|>assistant\n"
    assert "{{ Q }}<|im_end|>\n" in plain


def test_a_text_template_has_no_roles(tmp_path):
    p = opened(tmp_path / "model", "text")
    template = ChatTemplate("", bake_chat_template(p))
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    texts = template.render([[user], [user, answer], [{"role": "system", "content": "S"}, user], [user, answer, user]])
    assert texts[0] == "<s>" + find_template("text:alpaca").user.replace("{x}", "Q")
    assert texts[1] == f"{texts[0]}A</s>"
    assert "text:alpaca has no place for a system prompt" in str(texts[2])
    assert "text:alpaca has no place for a conversation of several turns" in str(texts[3])


def test_it_is_a_comment_and_tags(tmp_path):
    """No character of the template but what its expressions write; no settings of an engine matter."""
    for kind in KINDS:
        text = bake_chat_template(opened(tmp_path / "model", kind))
        assert (
            re.sub(
                r"\{#-.*?-#\}|\{%-(?:[^\"%]|\"(?:[^\"\\]|\\.)*\"|%(?!\}))*-%\}|\{\{-.*?-\}\}", "", text, flags=re.S
            ).strip()
            == ""
        )


def test_role_markers_where_they_are_allowed(tmp_path):
    write, chat_format, template, family, _ = KINDS["chatml"]
    write(tmp_path)
    p = open_prompt_format(tmp_path, find_template(template), family, chat_format, allow_role_markers=True)
    proof = prove_chat_template(bake_chat_template(p), p)
    assert proof.refused == 0
    assert proof.differences["control-text"] > 20
    assert json.dumps(proof.reasons)
