"""The folder's chat template against ours: what is the same, what has a name, and what must be found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ptst.audit.owner import compare as owner
from ptst.audit.owner.rows import FIRST, sample
from ptst.audit.setup import Setup
from ptst.text import prompt_format as prompt_formats
from ptst.text.chat_formats import CHAT_FORMATS, ChatFormat, text
from ptst.text.known_differences import KNOWN_DIFFERENCES
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_template
from tests.text import folders

NAMES = {difference.name for difference in KNOWN_DIFFERENCES}
LLAMA3_NAMES = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def conversation(*texts: str, system: str | None = None, row: str = "r:1") -> Conversation:
    turns = [Message(("user", "assistant")[i % 2], words) for i, words in enumerate(texts)]
    return Conversation((*([] if system is None else [Message("system", system)]), *turns), row)


ONE = conversation("a?", "b", row="r:1")
GIVEN = conversation("a?", "b", system="S", row="r:2")
SEVERAL = conversation("a?", "b", "c?", "d", row="r:3")


def found(folder, *conversations, template="chat:plain", chat_format=None, train_on="all"):
    p = open_prompt_format(
        folder, find_template(template), "plain", chat_format, allow_role_markers=True, allow_chat_template=True
    )
    return list(owner.check_owner(folder, conversations, Setup(p, train_on)))


def named(findings) -> dict[str, str]:
    """Of known differences: the name, and in how many of all conversations."""
    assert [f for f in findings if f.level != "info"] == []
    return {f.cause.partition(":")[0]: f.cause.rpartition("(in ")[2].rstrip(")") for f in findings}


@pytest.mark.parametrize("name", folders.SPELLED)
@pytest.mark.parametrize("template", ["chat:self-reminder", pytest.param("chat:alpaca", marks=pytest.mark.thorough)])
def test_the_owners_own_format(tmp_path, name, template):
    folders.write_folder(tmp_path, folders.SPELLED[name], folders.CONTROL.get(name, ()))
    given = conversation("a?", "b", "c?", "d", system="S")
    expected = {"llama2": {"single-turn-close"}, "mistral-v3": {"lost-system-prompt"}}.get(name, set())
    expected |= {"outer-whitespace"} if template == "chat:alpaca" and name in ("llama2", "llama3") else set()
    tight = {"tight-marker"} if template == "chat:self-reminder" and name in ("llama2", "mistral-v1") else set()
    assert (
        set(named(found(tmp_path, ONE, GIVEN, SEVERAL, given, template=template, train_on="last"))) == expected | tight
    )


def test_a_default_system_prompt_is_a_known_difference(tiny_folder):
    (finding,) = found(tiny_folder, GIVEN, ONE, SEVERAL)
    assert (finding.rule, finding.level, finding.row) == ("known-difference", "info", "r:1")
    assert finding.cause.startswith("default-system-prompt: ")
    assert finding.cause.endswith("(in 4 of 6 conversations)")
    assert found(tiny_folder, GIVEN) == []


def test_another_models_template_is_an_error(tiny_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_folder / name).read_text())
    (tmp_path / "chat_template.jinja").write_text(
        folders.CHATML.replace("m.role", "{'assistant': 'model'}.get(m.role, m.role)").replace(
            "<|im_start|>assistant", "<|im_start|>model"
        )
    )
    prompt, training = found(tmp_path, conversation("hello", "b"), chat_format="chatml")
    assert (prompt.rule, prompt.level, prompt.row) == ("chat-template", "error", "r:1")
    p = open_prompt_format(tmp_path, find_template("plain"), "plain", "chatml", allow_chat_template=True)
    ids = p.encode(conversation("hello", "b")).ids
    assert p.tokenizer.decode(ids[: prompt.token]).endswith("<|im_end|>\n<|im_start|>")
    assert prompt.expected.startswith("'model") and prompt.seen.startswith("'assistant")
    assert training.token == prompt.token and "ends in an answer" in training.cause


def test_a_template_that_cannot_be_used_is_an_error(tiny_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_folder / name).read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    (finding,) = found(tmp_path, ONE, chat_format="chatml")
    assert (finding.rule, finding.level) == ("chat-template", "error")
    assert "forbids" in finding.cause


def test_no_template_and_text_templates(tiny_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((tiny_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert found(tmp_path, ONE) == []
    assert found(tiny_folder, ONE, template="text:vanilla") == []


def test_a_refused_conversation_is_that_and_no_more(tmp_path):
    refusing = (
        "{% if messages | length > 3 %}{{ raise_exception('too long for me') }}{% endif %}"
        "{% if 'secret' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}" + folders.CHATML
    )
    folders.write_folder(tmp_path, refusing, folders.CONTROL["chatml"])
    rows = [ONE, SEVERAL, GIVEN, conversation("a secret", "b", row="r:4")]
    (finding,) = found(tmp_path, *rows, chat_format="chatml")
    assert (finding.rule, finding.level, finding.row) == ("template-refuses", "info", "r:3")
    assert "too long for me" in finding.cause and "in 3 of 8 conversations" in finding.cause
    # What is not refused is compared: the same template, and a mistake in what it writes of the rest.
    (tmp_path / "chat_template.jinja").write_text(refusing.replace("'\n' + m.content", "'\n\n' + m.content"))
    findings = found(tmp_path, *rows, chat_format="chatml")
    assert {f.row for f in findings if f.rule == "chat-template"} == {"r:1", "r:2", "r:3"}
    assert [f.row for f in findings if f.rule == "template-refuses"] == ["r:3"]


def test_a_template_without_system_prompts(tmp_path):
    """The system prompt goes into the first question, and the rest is compared all the same."""
    folders.write_folder(tmp_path, folders.GEMMA, folders.CONTROL["gemma"])
    assert named(found(tmp_path, ONE, GIVEN)) == {"system-in-user-turn": "2 of 4 conversations"}
    dropping = folders.GEMMA.replace("raise_exception('no system role')", "''").replace(
        "for m in messages", "for m in messages if m.role != 'system'"
    )
    (tmp_path / "chat_template.jinja").write_text(dropping)
    assert named(found(tmp_path, ONE, GIVEN)) == {"system-in-user-turn": "2 of 4 conversations"}


DATES = (  # expressions of Jinja
    r"'Cutting Knowledge Date: December 2023\nToday Date: ' + strftime_now('%d %b %Y')",
    r"'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024'",
    r"'Today\'s Date: ' + strftime_now('%B %d, %Y') + '.'",
    r"'Current date: ' + strftime_now('%Y-%m-%d')",
    r"'The date is ' + strftime_now('%d/%m/%Y')",
    r"'Knowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%A, %d %B %Y')",
    "'\u4eca\u5929\u662f' + strftime_now('%Y\u5e74%m\u6708%d\u65e5')",
)
OPENED = {
    "chatml": (r"'<|im_start|>system\n'", r"'<|im_end|>\n'"),
    "llama3": (r"bos_token + '<|start_header_id|>system<|end_header_id|>\n\n'", "'<|eot_id|>'"),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("date", [DATES[0], *(pytest.param(d, marks=pytest.mark.thorough) for d in DATES[1:])])
def test_dates_have_a_name_with_and_without_a_system_prompt(tmp_path, date, name, behind):
    opened, end = OPENED[name]
    given = "(messages[0].content if messages[0].role == 'system' else '')"
    said = f"{given} + '\\n\\n' + {date}" if behind else f"{date} + '\\n\\n' + {given}"
    rest = folders.SPELLED[name].replace("(bos_token if loop.first else '') + ", "")
    rest = rest.replace("for m in messages", "for m in messages if m.role != 'system'")
    template = "{{ " + f"{opened} + {said} + {end}" + " }}" + rest
    folders.write_folder(tmp_path, template, folders.CONTROL[name])
    assert set(named(found(tmp_path, ONE, GIVEN, SEVERAL, chat_format=name))) == {"date-preamble"}
    # The words of the data may hold dates, too.
    dated = conversation("It is 2024-07-26.\nIs it?", "Yes, Jul 2024", system="Today Date: 1 May 2025\nBe brief.")
    assert set(named(found(tmp_path, dated, chat_format=name))) == {"date-preamble"}


def test_todays_date_in_a_derived_format(tmp_path):
    folders.write_folder(tmp_path, folders.DEFAULT.replace("im_start", "turn"), ("<|turn|>", "<|im_end|>"))
    assert named(found(tmp_path, ONE, GIVEN)) == {
        "default-system-prompt": "2 of 4 conversations",
        "fixed-date": "4 of 4 conversations",
    }


def test_trims_and_texts(tmp_path):
    folders.write_folder(tmp_path, folders.LLAMA3, LLAMA3_NAMES)
    spaced = conversation(" a?\n", "\n\nb ", system=" S ")
    assert set(named(found(tmp_path, ONE, spaced))) == {"outer-whitespace"}
    folders.write_folder(tmp_path, folders.THINKING, folders.CONTROL["thinking"])
    thinking = conversation("a?", "so</think>b", "c?", "d")
    assert set(named(found(tmp_path, ONE, thinking))) == {"empty-reasoning", "text-dependent"}
    assert set(named(found(tmp_path, ONE))) == {"empty-reasoning"}


def test_an_empty_system_prompt(tmp_path):
    """Most templates write an empty block, as we do; some write none, or their default prompt."""
    empty = conversation("a?", "b", system="")
    folders.write_folder(tmp_path, folders.CHATML, folders.CONTROL["chatml"])
    assert found(tmp_path, empty) == []
    dropping = "{% if not messages[0].content %}{% set messages = messages[1:] %}{% endif %}" + folders.CHATML
    (tmp_path / "chat_template.jinja").write_text(dropping)
    assert named(found(tmp_path, empty, GIVEN)) == {"empty-system-prompt": "2 of 4 conversations"}


def test_messages_that_spell_control_tokens(tmp_path):
    folders.write_folder(tmp_path, folders.LLAMA2)
    rows = [conversation("strike <s>x</s>, please", "a <s>b</s> c", "so?", "d"), SEVERAL]
    assert found(tmp_path, *rows) == []


def test_ids_that_join_over_a_message_have_a_name(tmp_path):
    folders.write_folder(tmp_path, folders.CHATML, folders.CONTROL["chatml"])
    assert named(found(tmp_path, conversation("a?", "\nb"))) == {"token-boundary": "1 of 2 conversations"}
    both = conversation("\na?\n", "\nb", "\nc?", "d")  # a question's line breaks do join
    assert set(named(found(tmp_path, both))) == {"token-boundary"}


# Faults of the text layer, each where the folder's template is the only witness.


def _changed(**changes):
    return lambda monkeypatch: monkeypatch.setitem(CHAT_FORMATS, "llama3", replace(CHAT_FORMATS["llama3"], **changes))


def _encoded(change):
    """Ids that are changed after all is done."""

    def spoil(monkeypatch):
        right = prompt_formats.PromptFormat.encode

        def wrong(self, conversation, train_on="all"):
            example = right(self, conversation, train_on)
            return replace(example, ids=change(example.ids, self.tokenizer))

        monkeypatch.setattr(prompt_formats.PromptFormat, "encode", wrong)

    return spoil


def _rendered(change):
    def spoil(monkeypatch):
        right = ChatFormat.render
        monkeypatch.setattr(ChatFormat, "render", lambda self, *args, **more: change(right(self, *args, **more)))

    return spoil


FORMAT = CHAT_FORMATS["llama3"]
FAULTS = {
    "no BOS": (_changed(start=FORMAT.start[1:], system=(FORMAT.system[0][1:], FORMAT.system[1])), 0),
    "two BOS": (_changed(start=(FORMAT.start[0], *FORMAT.start)), 1),
    "another role": (_changed(later=(FORMAT.later[0], *text("human"), *FORMAT.later[2:])), None),
    "no terminator": (_encoded(lambda ids, t: ids[:-1] if ids[-1] == t.control_id("<|eot_id|>") else ids), None),
    "another terminator": (_changed(terminator="</s>"), None),
    "a line break less": (_changed(user_end=(*FORMAT.user_end[:-1], *text("\n"))), None),
    "ids of pieces": (_encoded(lambda ids, t: [j for i in ids for j in _letters(i, t)]), None),
    "one id more": (_encoded(lambda ids, t: [*ids, *t.encode("x")]), None),
    "text lowered": (_rendered(lambda parts: [replace(s, text=s.text.lower()) for s in parts]), None),
    "a system prompt of ours": (_changed(start=(*FORMAT.system[0], *text("Be nice."), *FORMAT.system[1])), None),
    "no system prompt": (_rendered(lambda parts: [s for s in parts if s.author != "system"]), None),
}


def _letters(number, tokenizer):
    words = tokenizer.decode([number])
    if number in tokenizer.control_names or len(words) < 2 or words == "\n\n":
        return [number]
    return [i for letter in words for i in tokenizer.encode(letter)]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_no_excuse_hides_it(tmp_path, monkeypatch, name):
    """The template has dates and trims, so that there is much to excuse."""
    dated = folders.LLAMA3.replace(
        folders.LOOP,
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}{{ '<|eot_id|>' }}"
        "{% for m in messages if m.role != 'system' %}",
    ).replace("(bos_token if loop.first else '') + ", "")
    folders.write_folder(tmp_path, dated, LLAMA3_NAMES)
    rows = [
        conversation("the Sum?", "the answer a\n\nthe b", "c?", "d", row="r:1"),
        conversation(" the Q? ", "A\n", system=" the System ", row="r:2"),
    ]
    assert set(named(found(tmp_path, *rows, chat_format="llama3"))) == {"date-preamble", "outer-whitespace"}
    spoil, token = FAULTS[name]
    spoil(monkeypatch)
    errors = [f for f in found(tmp_path, *rows, chat_format="llama3") if f.rule == "chat-template"]
    assert errors and all(f.level == "error" and f.token is not None and f.expected != f.seen for f in errors), errors
    if token is not None:
        assert errors[0].token == token


def test_rows_that_are_compared():
    """The first ones, and the unusual ones wherever they are."""
    rows = [conversation("a?", "b", row=f"r:{i}") for i in range(500)]
    unusual = {
        100: conversation("a?", "b", system="S", row="r:100"),
        200: conversation("a?", "b", "c?", "d", row="r:200"),
        300: conversation("a?", "b ", row="r:300"),
        400: conversation("\u00e9?", "b", row="r:400"),
        450: conversation("long " * 99, "b", row="r:450"),
    }
    for i, row in unusual.items():
        rows[i] = row
    chosen = {c.source for c in sample(rows)}
    assert {f"r:{i}" for i in (*range(FIRST), *unusual)} <= chosen
    assert len(chosen) < 40
    assert [c.source for c in sample(rows[:3])] == ["r:0", "r:1", "r:2"]


def test_what_our_format_cannot_write_is_left_out(tmp_path):
    """Of which the audit says bad-row."""
    folders.write_folder(tmp_path, folders.MISTRAL_V3, folders.CONTROL["mistral-v3"])
    given = conversation("a?", "b", "c?", "d", system="S")
    assert found(tmp_path, given, conversation("\ud800", "b"), ONE) == []
