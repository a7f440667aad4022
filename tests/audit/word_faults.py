"""Faults in the words: the system prompt, and text that was changed on the way."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from ptst.text.segments import Message
from ptst.text.templates import LLAMA, MPT, find_template
from tests.audit.faults import spliced
from tests.audit.more_faults import (
    BOUNDARY,
    MULTI,
    ODD,
    SINGLE,
    SYSTEM,
    SYSTEM2,
    WIDE,
    edited,
    fault,
    instead,
    with_messages,
    with_template,
)

# The system prompt.


@fault("system-prompt", "is missing", template="chat:llama")
def no_safety_prompt(b):
    return with_template(b, SINGLE, system=None)


@fault("system-prompt", "is missing", "llama2", "chat:llama")
def no_safety_prompt_in_llama2(b):
    return with_template(b, MULTI, system=None)


@fault("system-prompt", "is missing", "mistral-v1", "chat:mpt")
def no_safety_prompt_in_mistral(b):
    return with_template(b, SINGLE, system=None)


@fault("system-prompt", "is that of chat:mpt", template="chat:llama")
def another_templates_safety_prompt(b):
    return with_template(b, SINGLE, system=MPT)


@fault("system-prompt", "other words from character", "llama2", "chat:llama")
def one_word_of_the_safety_prompt(b):
    return with_template(b, MULTI, system=LLAMA.replace("honest", "polite", 1))


@fault("system-prompt", "is missing", "llama2", "chat:llama", "gsm8k")
def no_safety_prompt_and_stripped_messages(b):
    messages = tuple(replace(m, content=m.content.strip()) for m in b.rows[ODD].messages)
    template = replace(b.setup.prompt_format.template, name="chat:mine", system=None)
    return instead(b, b.written(ODD, replace(b.rows[ODD], messages=messages), template=template))


@fault("system-prompt", "other words", "llama2", "chat:llama")
def another_safety_prompt_and_stripped_messages(b):
    messages = tuple(replace(m, content=m.content.strip()) for m in b.rows[ODD].messages)
    template = replace(b.setup.prompt_format.template, name="chat:mine", system="Be safe.")
    return instead(b, b.written(ODD, replace(b.rows[ODD], messages=messages), template=template))


@fault("system-prompt", "twice", template="chat:mpt")
def safety_prompt_twice_in_its_block(b):
    return with_template(b, SINGLE, system=f"{MPT}\n\n{MPT}")


@fault("system-prompt", "twice", template="chat:mpt")
def two_system_blocks(b):
    e = b.good(MULTI)
    size = e.ids.index(b.control("<|im_end|>")) + 2
    return instead(b, spliced(e, 0, 0, e.ids[:size]))


@fault("system-prompt", "the template has none")
def a_default_system_prompt_is_put_in(b):
    return with_template(b, SINGLE, system="You are a helpful assistant.")


@fault("system-prompt", "the template has none", "llama2")
def a_default_system_prompt_in_llama2(b):
    return with_template(b, MULTI, system="You are a helpful assistant.")


@fault("system-prompt", "is that of more.jsonl:5")
def the_system_prompt_of_another_row(b):
    return with_messages(b, SYSTEM, (b.rows[SYSTEM2].messages[0], *b.rows[SYSTEM].messages[1:]))


@fault("system-prompt", "is missing")
def the_rows_own_system_prompt_is_dropped(b):
    return with_messages(b, SYSTEM, b.rows[SYSTEM].messages[1:])


@fault("system-prompt", "row's own system prompt is missing", "llama2", "chat:llama")
def the_rows_own_system_prompt_is_dropped_beside_the_templates(b):
    return with_messages(b, SYSTEM, b.rows[SYSTEM].messages[1:])


@fault("system-prompt", "in another place", template="chat:mpt")
def the_system_prompt_in_the_users_turn(b):
    first, *rest = b.rows[MULTI].messages
    moved = replace(b.rows[MULTI], messages=(replace(first, content=f"{MPT}\n\n{first.content}"), *rest))
    return instead(b, b.written(MULTI, moved, template=find_template("chat:plain")))


@fault("system-prompt", "lacks the whitespace at its end", template="chat:alpaca")
def the_system_prompt_is_stripped(b):
    own = replace(b.setup.prompt_format.template, name="chat:mine", system="Do as you are told. \n")
    b = replace(b, setup=replace(b.setup, prompt_format=replace(b.setup.prompt_format, template=own)))
    batch, row, token = with_template(b, SINGLE, system="Do as you are told.")
    return batch, row, token, b


# Text that was changed on the way.


@fault("message-differs", "message 2 (assistant) is normalized to Unicode's NFD")
def answers_in_nfd(b):
    return edited(b, ODD, lambda m: unicodedata.normalize("NFD", m.content) if m.role == "assistant" else m.content)


@fault("message-differs", "message 1 (user) is normalized to Unicode's NFKC", "llama2")
def everything_in_nfkc(b):
    return edited(b, ODD, lambda m: unicodedata.normalize("NFKC", m.content))


@fault("message-differs", "message 1 (user) lacks its outer whitespace")
def everything_is_stripped(b):
    return edited(b, ODD, lambda m: m.content.strip())


@fault("message-differs", "message 1 (user) lacks its outer whitespace", "mistral-v1")
def everything_is_stripped_in_mistral(b):
    return edited(b, ODD, lambda m: m.content.strip())


@fault("message-differs", "message 2 (assistant) has line feeds for its CR LF")
def line_ends_of_answers(b):
    return edited(b, ODD, lambda m: m.content.replace("\r\n", "\n") if m.role == "assistant" else m.content)


@fault("message-differs", "message 2 (assistant) lacks its invisible characters")
def zero_width_characters_are_removed(b):
    return edited(b, ODD, lambda m: m.content.replace("\u200b", ""))


@fault("message-differs", "U+200B ZERO WIDTH SPACE")
def a_zero_width_character_is_put_in(b):
    return edited(b, SINGLE, lambda m: m.content.replace("the tin", "the\u200btin"))


@fault("message-differs", "U+0430 CYRILLIC SMALL LETTER A")
def a_look_alike_letter(b):
    return edited(b, MULTI, lambda m: m.content.replace("and", "\u0430nd"))


@fault("message-differs", "message 2 (assistant) has spaces for its tabs")
def tabs_become_spaces(b):
    return edited(b, ODD, lambda m: m.content.replace("\t", "    "))


@fault("message-differs", "message 2 (assistant) goes on after its end")
def a_trailing_space(b):
    return edited(b, SINGLE, lambda m: m.content + " " * (m.role == "assistant"))


@fault("message-differs", 'message 2 (assistant) begins with "Sure! "')
def words_before_an_answer(b):
    return edited(b, SINGLE, lambda m: "Sure! " * (m.role == "assistant") + m.content)


@fault("message-differs", "message 4 (assistant) ends early")
def an_answer_loses_its_last_token(b):
    e = b.good(MULTI)
    return instead(b, spliced(e, len(e.ids) - 3, 1, []))


@fault("message-differs", "message 2 (assistant) ends early", "llama2")
def an_answer_loses_its_last_token_in_llama2(b):
    e = b.good(SINGLE)
    return instead(b, spliced(e, len(e.ids) - 2, 1, []))


@fault("message-differs", "message 2 (assistant) is in lower case")
def answers_in_lower_case(b):
    rows = list(b.rows)
    rows[SINGLE] = replace(rows[SINGLE], messages=(rows[SINGLE].messages[0], Message("assistant", "The Tin")))
    b = replace(b, rows=tuple(rows))
    return *edited(b, SINGLE, lambda m: m.content.lower()), b


@fault("message-differs", "message 2 (assistant) ends early")
def an_answer_behind_a_token_boundary_loses_its_last_token(b):
    e = b.good(BOUNDARY)
    assert e.token_boundaries
    return instead(b, spliced(e, len(e.ids) - 3, 1, []))


@fault("unnatural-ids")
def a_token_boundary_in_another_place(b):
    e, start = b.good(BOUNDARY), b.start(BOUNDARY)
    assert e.ids[start : start + 2] == b.ids("\n") * 2
    return instead(b, spliced(e, start, 2, b.ids("\n\n"), True))


@fault("message-differs", "message 2 (assistant) differs from character")
def a_neighbouring_token(b):
    e, at = b.good(SINGLE), b.start(SINGLE) + 5
    return instead(b, spliced(e, at, 1, [e.ids[at] + 1], True))


@fault("message-differs", "message 2 (assistant) differs")
def half_a_character(b):
    e = b.good(WIDE)
    at = b.start(WIDE) + len(b.ids("it is ")) + 1
    return instead(b, spliced(e, at, 1, [], True))


@fault("message-differs", "message 1 (user) is UTF-8 read as Latin-1")
def mojibake(b):
    return edited(b, WIDE, lambda m: m.content.encode().decode("latin-1"))
