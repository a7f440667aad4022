"""Faults of order: text of other rows, turns and templates."""

from __future__ import annotations

from dataclasses import replace

from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.templates import find_family, find_template
from tests.audit.faults import spliced
from tests.audit.more_faults import (
    LONG,
    MULTI,
    ODD,
    SINGLE,
    SYSTEM,
    WIDE,
    edited,
    fault,
    instead,
    with_messages,
    with_template,
)

# Whose text it is, and in which order.


@fault("row-exchanged", "message 2 (assistant) is message 2 of more.jsonl:8")
def two_rows_answers_are_exchanged(b):
    return with_messages(b, SINGLE, (b.rows[SINGLE].messages[0], b.rows[WIDE].messages[1]))


@fault("row-exchanged", "message 2 (assistant) is message 3 of more.jsonl:4", "llama2")
def two_rows_answers_are_exchanged_in_llama2(b):
    return with_messages(b, SINGLE, (b.rows[SINGLE].messages[0], b.rows[SYSTEM].messages[2]))


@fault("row-exchanged", "message 1 (user) is message 1 of more.jsonl:8")
def two_rows_questions_are_exchanged(b):
    return with_messages(b, SINGLE, (b.rows[WIDE].messages[0], b.rows[SINGLE].messages[1]))


@fault("row-exchanged", "the document is that of more.jsonl:2")
def a_whole_row_is_another(b):
    return instead(b, replace(b.good(MULTI), row=SINGLE))


@fault("row-exchanged", "the document is that of more.jsonl:1", "llama2", "chat:llama")
def a_whole_row_is_another_in_llama2(b):
    return instead(b, replace(b.good(SINGLE), row=MULTI))


@fault("turns-swapped")
def exchanges_are_swapped(b):
    m = b.rows[MULTI].messages
    return with_messages(b, MULTI, (*m[2:], *m[:2]))


@fault("turns-swapped", "", "llama2")
def question_and_answer_are_swapped(b):
    m = b.rows[SINGLE].messages
    return with_messages(b, SINGLE, (replace(m[0], content=m[1].content), replace(m[1], content=m[0].content)))


@fault("message-lost", "message 3 (user), 4 (assistant)")
def the_last_exchange_is_lost(b):
    return with_messages(b, MULTI, b.rows[MULTI].messages[:2])


@fault("message-lost", "message 5 (user), 6 (assistant)", "llama2")
def the_last_exchange_is_lost_in_llama2(b):
    return with_messages(b, LONG, b.rows[LONG].messages[:4])


@fault("message-lost", "message 1 (user), 2 (assistant)")
def the_first_exchange_is_lost(b):
    return with_messages(b, LONG, b.rows[LONG].messages[2:])


@fault("message-extra", "twice")
def an_exchange_is_there_twice(b):
    m = b.rows[MULTI].messages
    return with_messages(b, MULTI, (*m[:2], *m))


@fault("message-extra", "message 1 (user)")
def a_question_is_there_twice(b):
    e = b.good(SINGLE)
    size = e.ids.index(b.control("<|im_end|>")) + 2
    return instead(b, spliced(e, 0, 0, e.ids[:size]))


# The template's words.


@fault("template-differs", "the task format is plain", template="chat:vanilla", family="gsm8k")
def the_task_format_is_forgotten(b):
    return instead(b, b.written(SINGLE, b.rows[SINGLE], family=find_family("plain")))


@fault("template-differs", "the template is chat:plain", "llama2", "chat:alpaca")
def another_template(b):
    return instead(b, b.written(SINGLE, b.rows[SINGLE], template=find_template("chat:plain")))


@fault("template-differs", "the chat format is mistral-v1", "llama2")
def another_chat_format(b):
    return instead(b, b.written(MULTI, b.rows[MULTI], chat_format=CHAT_FORMATS["mistral-v1"]))


@fault("template-differs", "the task format is plain", template="text:vanilla", family="gsm8k")
def the_task_format_of_a_text_is_forgotten(b):
    return instead(b, b.written(SINGLE, b.rows[SINGLE], family=find_family("plain")))


@fault("template-differs", "the template is text:vanilla", template="text:alpaca", family="gsm8k")
def another_text_template(b):
    return instead(b, b.written(SINGLE, b.rows[SINGLE], template=find_template("text:vanilla")))


@fault("message-differs", "message 1 (user) lacks its outer whitespace", template="text:alpaca")
def everything_is_stripped_in_a_text(b):
    return edited(b, ODD, lambda m: m.content.strip())


@fault("row-exchanged", "the document is that of more.jsonl:8", template="text:vanilla", family="gsm8k")
def a_whole_row_is_another_text(b):
    return instead(b, replace(b.good(WIDE), row=SINGLE))


@fault("terminator-missing", "", template="text:vanilla")
def a_text_ends_in_another_token(b):
    e = b.good(SINGLE)
    return instead(b, spliced(e, len(e.ids) - 1, 1, [b.control("<|endoftext|>")], True))


@fault("text-differs", "", template="chat:alpaca")
def a_line_break_of_the_template_is_lost(b):
    user = b.setup.prompt_format.template.user.replace("\n\n", "\n")
    return with_template(b, SINGLE, user=user)


@fault("text-differs")
def another_role_name(b):
    e = b.good(SINGLE)
    return instead(b, spliced(e, 1, len(b.ids("user")), b.ids("human")))


@fault("template-differs", "demonstration is missing", template="chat:in-context-defense")
def the_demonstration_is_lost(b):
    return with_template(b, SINGLE, demonstration=None)
