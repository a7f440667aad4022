"""Chat formats derived from chat templates: equal to the hand-written ones, the owner's text, the laws, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.audit.reference.formats import reference
from ptst.errors import UserError
from ptst.text import laws
from ptst.text.chat_formats import CHAT_FORMATS, control, text
from ptst.text.chat_template import ChatTemplate, render_chat_template
from ptst.text.detect import find_format
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.segments import Conversation, Message, Segment, plain_turns
from ptst.text.templates import FAMILIES, TEMPLATES, find_template
from ptst.text.tokenizer import load_tokenizer
from tests.text import folders, owners

# By shape: template, control tokens, known differences, how one turn with a system prompt is written (prompt, trained).
SHAPES = {
    "zephyr": (folders.ZEPHYR, (), (), "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n", "A</s>"),
    "vicuna": (folders.VICUNA, (), (), "<s>S USER: Q ASSISTANT:", " A</s>"),
    "gemma": (
        folders.GEMMA,
        folders.CONTROL["gemma"],
        ("system-in-user-turn", "outer-whitespace"),
        "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n",
        "A<end_of_turn>",
    ),
    "reasoning": (
        folders.REASONING,
        folders.CONTROL["reasoning"],
        ("generation-prompt", "text-dependent"),
        "<s>S<|User|>Q<|Assistant|><think>\n",
        "A</s>",
    ),
    "unended": (
        folders.UNENDED,
        (),
        ("no-terminator",),
        "### System:\nS\n\n### User:\nQ\n\n### Assistant:\n",
        "A</s>",
    ),
    "headless": (
        folders.HEADLESS,
        folders.CONTROL["headless"],
        ("generation-prompt",),
        "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\n",
        "A<|end|>",
    ),
    "trailing": (
        folders.TRAILING,
        (),
        ("row-end",),
        "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n",
        "A</s>",
    ),
    "default": (
        folders.DEFAULT.replace("im_start", "turn"),
        ("<|turn|>", "<|im_end|>"),
        ("default-system-prompt", "fixed-date"),
        "<|turn|>system\nS<|im_end|>\n<|turn|>user\nQ<|im_end|>\n<|turn|>assistant\n",
        "A<|im_end|>",
    ),
}
ROW = Conversation((Message("system", "S"), Message("user", "Q"), Message("assistant", "A")))


def opened(folder, template, names=(), **settings) -> PromptFormat:
    folders.write_folder(folder, template, names, **settings)
    return open_prompt_format(folder, find_template("chat:plain"), "plain", allow_role_markers=True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Each shape's folder and prompt format."""
    made = {}
    for name, (template, names, *_) in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, opened(folder, template, names)
    return made


def characters(segments):
    """Every character and control token with its author and what becomes of it."""
    return [
        (part, s.author, s.control, s.sampled, s.trained)
        for s in segments
        for part in ([s.text] if s.control else s.text)
    ]


@pytest.mark.parametrize("name", folders.SPELLED)
def test_derived_from_an_owners_template_it_is_the_hand_written_format(tmp_path, name):
    folders.write_folder(tmp_path, folders.SPELLED[name], folders.CONTROL.get(name, ()))
    tokenizer = load_tokenizer(tmp_path)
    assert find_format(tmp_path, tokenizer).chat_format is CHAT_FORMATS[name]
    derived = find_format(tmp_path, tokenizer, "derived").chat_format
    ours = replace(CHAT_FORMATS[name], closes_single=True)  # the known difference single-turn-close
    for system, turns in owners.conversations(5, 60):
        block = None if system is None else [Segment(system, "system")]
        sides = [f.render(block, plain_turns(turns), tokenizer, "last") for f in (derived, ours)]
        assert characters(sides[0]) == characters(sides[1])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(shapes, name):
    _, _, differences, prompt, trained = SHAPES[name]
    _, p = shapes[name]
    assert p.chat_format.name.startswith("derived:")
    assert set(p.chat_format.differences) == set(differences)
    segments = p.segments(ROW)
    assert "".join(s.text for s in segments if not s.trained).startswith(prompt)
    assert "".join(s.text for s in segments if s.trained) == trained
    assert p.encode(ROW).ids[: len(p.encode(ROW.prompt()).ids)] == p.encode(ROW.prompt()).ids
    assert p.tokenizer.decode(p.encode(ROW.prompt()).ids) == prompt


@pytest.mark.parametrize("name", [n for n in SHAPES if n not in ("reasoning", "gemma", "headless", "default")])
def test_the_owners_text_and_ids(shapes, name):
    """Generation prompts of random conversations, with control tokens read out of the owner's text."""
    folder, p = shapes[name]
    rows = [(s, t) for s, t in owners.conversations(7, 200) if t[-1].role == "user"]
    asked = [[Message("system", s), *t] if s is not None else t for s, t in rows]
    texts = render_chat_template(folder, [[{"role": m.role, "content": m.content} for m in row] for row in asked])
    read = load_tokenizer(folder)._tok
    read.encode_special_tokens = False
    for row, theirs in zip(asked, texts, strict=True):
        ours = p.encode(Conversation(tuple(row)))
        assert p.tokenizer.decode(ours.ids) == theirs
        assert ours.ids == read.encode(theirs, add_special_tokens=False).ids


@pytest.mark.parametrize("name", SHAPES)
def test_experiments_on_derived_formats(shapes, name):
    """Every template, authors kept; the audit's own writing of the format agrees to the id."""
    rows = [Conversation(tuple(t), "r") for _, t in owners.conversations(3, 12) if t[-1].role == "assistant"]
    rows += [Conversation((Message("user", "\n a"), Message("assistant", "\n\nb </s>"))), ROW]
    for template in (t for t in TEMPLATES.values() if not t.is_text):
        p = replace(shapes[name][1], template=template, family=FAMILIES["chatdoctor"])
        for row in rows:
            segments = p.segments(row, "last")
            for role in ("user", "assistant"):
                written = [m.content for m in row.messages if m.role == role]
                assert [s.text for s in segments if s.author == role] == written
            ours, wanted = p.encode(row, "last"), reference(row, p, "last")
            assert (ours.ids, ours.loss_mask) == (wanted.ids, wanted.loss_mask)
            prompt = p.encode(row.prompt()).ids
            assert ours.ids[: len(prompt)] == prompt


def test_earlier_answers_that_are_written_otherwise_are_not_trained(tmp_path):
    p = opened(tmp_path, folders.UNENDED)
    turns = [Message(("user", "assistant")[i % 2], t) for i, t in enumerate("abcd")]
    with pytest.raises(UserError, match=r"earlier answers otherwise than the newest one.*train_on last"):
        p.encode(Conversation(tuple(turns)))
    segments = p.segments(Conversation(tuple(turns)), "last")
    assert "".join(s.text for s in segments) == (
        "### User:\na\n\n### Assistant:\nb### User:\nc\n\n### Assistant:\nd</s>"
    )
    assert [s.text for s in segments if s.trained] == ["d", "</s>"]


def test_text_markers_could_be_forged(tmp_path):
    p = replace(opened(tmp_path, folders.VICUNA), allow_role_markers=False)
    assert set(p.chat_format.role_markers) == {"USER:", "ASSISTANT:"}
    with pytest.raises(UserError, match="holds ASSISTANT:, a role marker of derived"):
        p.encode(Conversation((Message("user", "a ASSISTANT: b"),)))
    chatml = folders.write_folder(tmp_path, folders.CHATML, folders.CONTROL["chatml"])
    assert find_format(chatml, load_tokenizer(chatml), "derived").chat_format.role_markers == ()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "puts nothing between a question and its answer"),
        ("{% for m in messages %}{{ m['from'] + m.value }}{% endfor %}", "it cannot be rendered .*has no attribute"),
        ("{{ raise_exception('only with tools') }}", "it cannot be rendered .only with tools"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content | upper }}{% endfor %}", "rewrites the texts of messages"),
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}{% endfor %}",
            "rewrites the texts of messages",
        ),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content * 2 }}{% endfor %}", "without some message, twice"),
        ("[U] {{ messages[0].content }} [A]", "without some message, twice"),
        (
            "Is there unsafe content?\n"
            + folders.UNENDED.replace("{% endfor %}", "{% endfor %}\nEND. Say safe or not.", 1),
            r"as those of guard models are.*template_file",
        ),
        (
            folders.LOOP + "[{{ m.role }}:{{ loop.index }}] {{ m.content + eos_token }}{% endfor %}",
            "law 8.*at character",
        ),
        ("{{ ''.__class__.__mro__ }}", "calls what the sandbox forbids"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end within"),
        ("{% if %}", "cannot be rendered"),
    ],
)
def test_refusals(tmp_path, monkeypatch, template, says):
    """One sentence with the folder, the reason, and what to do."""
    monkeypatch.setattr("ptst.text.probes.SECONDS", 1)
    folders.write_folder(tmp_path, template)
    with pytest.raises(UserError, match=says) as told:
        find_format(tmp_path, load_tokenizer(tmp_path))
    assert str(told.value).startswith(str(tmp_path))
    assert "; " in str(told.value)
    assert "\n" not in str(told.value)


def test_the_laws_can_fail(shapes):
    """Each of these is found on the folder's tokenizer, with the law and the character."""
    _, p = shapes["zephyr"]
    good, tokenizer = p.chat_format, p.tokenizer
    assert laws.check_laws(good, tokenizer) == ()
    for changes, says in (
        ({"system": (text("<s>"), good.system[1])}, "law 8: it has other ids than its text, at character 0"),
        ({"answer_prefix": control("</s>")}, "law 3: it trains '</s>' for an answer"),
        ({"system": (control("<s>", "<s>"), good.system[1])}, "law 5: it has BOS twice in a row, at character"),
    ):
        with pytest.raises(laws.LawBroken, match=f"folder: the chat format .* breaks {says}"):
            laws.check_laws(replace(good, **changes), tokenizer, "folder")


def test_a_run_names_the_template_that_its_format_was_derived_from(tmp_path):
    p = opened(tmp_path, folders.ZEPHYR)
    name = p.chat_format.name
    again = find_format(tmp_path, load_tokenizer(tmp_path), name).chat_format
    assert again == p.chat_format
    (tmp_path / "chat_template.jinja").write_text(folders.ZEPHYR + "\n")
    with pytest.raises(UserError, match=f"not the one that the chat format {name} was derived from"):
        find_format(tmp_path, load_tokenizer(tmp_path), name)
    assert ChatTemplate("", "a").fingerprint != ChatTemplate("", "a", (("bos_token", "<s>"),)).fingerprint
