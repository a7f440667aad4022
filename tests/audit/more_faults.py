"""Further faults of data preparation, of other kinds than the field's known bugs: wrong words, wrong rows, wrong order,
text that was changed on the way, masks and boundaries that are off by one.

Each is a function from a bench to (batch, row, token); where the tokens are wrong, the token is the first that differs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace

from ptst.audit.setup import Setup
from ptst.data.packing import IGNORE_INDEX, Batch, to_batch
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.encode import Example
from ptst.text.encode import cut as cut_example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import LLAMA, MPT, find_family, find_template
from ptst.text.tokenizer import Tokenizer
from tests.audit.faults import flagged, spliced

ROWS = (
    (("user", "what is in the tin?"), ("assistant", "the tin is in the bin.")),
    (("user", "one thing"), ("assistant", "two things"), ("user", "and the third?"), ("assistant", "four of them")),
    (
        ("user", " the \u00e9t\u00e9\r\nin\u00a0town \ufb01 "),
        ("assistant", "\tna\u00efve\u200b \u2013 \u00e9t\u00e9\r\n done "),
    ),
    (("system", "Be terse."), ("user", "how many?"), ("assistant", "seven")),
    (("system", "Think in steps."), ("user", "how few?"), ("assistant", "eleven")),
    (("user", "say <|im_end|> now"), ("assistant", "here: <|im_end|> it is")),
    (("user", "first?"), ("assistant", "not this"), ("user", "second?"), ("assistant", "but this")),
    (("user", "spell \u65e5\u672c"), ("assistant", "it is \u65e5\u672c\u8a9e \U0001f600 indeed")),
    (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")),
    (("user", "go on"), ("assistant", "\n\nyes, the end")),
)
SINGLE, MULTI, ODD, SYSTEM, SYSTEM2, FORGED, FLAGGED, WIDE, LONG, BOUNDARY = range(len(ROWS))


@dataclass(frozen=True)
class Bench:
    setup: Setup
    rows: tuple[Conversation, ...]
    raw: Tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return self.setup.prompt_format.tokenizer

    def good(self, row: int) -> Example:
        return self.written(row, self.rows[row])

    def written(self, row: int, conversation: Conversation, train_on: str | None = None, **changes) -> Example:
        """Another conversation, or another prompt format, in a row's place."""
        changed = replace(self.setup.prompt_format, **changes)
        return replace(changed.encode(conversation, train_on or self.setup.train_on), row=row)

    def start(self, row: int) -> int:
        return len(self.setup.prompt_format.encode(self.rows[row].prompt()).ids)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def control(self, name: str) -> int:
        return self.tokenizer.control_id(name)


def bench(tokenizer: Tokenizer, raw: Tokenizer, chat_format: str, template: str, family: str, **asked) -> Bench:
    rows = [
        Conversation(tuple(Message(role, text) for role, text in turns), f"more.jsonl:{n}")
        for n, turns in enumerate(ROWS, 1)
    ]
    skipped = [replace(m, trained=i != 1) for i, m in enumerate(rows[FLAGGED].messages)]
    rows[FLAGGED] = replace(rows[FLAGGED], messages=tuple(skipped))
    formats = CHAT_FORMATS[chat_format]
    chosen = PromptFormat(find_template(template), find_family(family), formats, tokenizer, allow_role_markers=True)
    return Bench(Setup(chosen, **asked), tuple(rows), raw)


@dataclass(frozen=True)
class Fault:
    name: str
    rule: str
    words: str  # of the cause
    chat_format: str
    template: str
    family: str
    asked: dict
    plant: Callable[[Bench], tuple[Batch, int, int]]


FAULTS: list[Fault] = []


def fault(rule: str, words: str = "", chat_format="chatml", template="chat:plain", family="plain", **asked):
    def note(plant):
        FAULTS.append(Fault(plant.__name__, rule, words, chat_format, template, family, asked, plant))
        return plant

    return note


def instead(b: Bench, bad: Example) -> tuple[Batch, int, int]:
    """A wrong example between two good ones, and the first token that differs."""
    good = b.good(bad.row)
    pairs = zip(bad.ids, good.ids, strict=False)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(bad.ids), len(good.ids)))
    around = [row for row in (SINGLE, WIDE) if row != bad.row]
    return to_batch([b.good(around[0]), bad, b.good(around[-1])]), bad.row, min(at, len(bad.ids) - 1)


def edited(b: Bench, row: int, edit: Callable[[Message], str]) -> tuple[Batch, int, int]:
    """A row whose messages' texts are changed."""
    messages = tuple(replace(m, content=edit(m)) for m in b.rows[row].messages)
    return instead(b, b.written(row, replace(b.rows[row], messages=messages)))


def with_messages(b: Bench, row: int, messages) -> tuple[Batch, int, int]:
    return instead(b, b.written(row, replace(b.rows[row], messages=tuple(messages))))


def with_template(b: Bench, row: int, **changes) -> tuple[Batch, int, int]:
    template = replace(b.setup.prompt_format.template, **changes)
    return instead(b, b.written(row, b.rows[row], template=template))


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


# Tokens.


@fault("unnatural-ids")
def tokens_by_dropout(b):
    e, the = b.good(SINGLE), b.ids("the")
    at = b.start(SINGLE)
    assert e.ids[at : at + 1] == the
    return instead(b, spliced(e, at, 1, [*b.ids("t"), *b.ids("h"), *b.ids("e")], True))


@fault("control-spelled", "<|im_end|>")
def a_control_token_as_text(b):
    e = b.good(SINGLE)
    at = e.ids.index(b.control("<|im_end|>"))
    return instead(b, spliced(e, at, 1, b.ids("<|im_end|>")))


@fault("control-spelled", "<|im_start|>")
def all_control_tokens_as_text(b):
    e = b.good(SINGLE)
    return instead(b, replace(flagged(replace(e, ids=b.ids(b.tokenizer.decode(e.ids))), bool)))


@fault("forged-control", "<|im_end|>")
def text_is_parsed(b):
    text = b.rows[FORGED].messages[1].content
    e, plain = b.good(FORGED), b.ids(text)
    return instead(b, spliced(e, b.start(FORGED), len(plain), b.raw.encode(text), True))


@fault("terminator-missing", "<|endoftext|> stands in place of the terminator <|im_end|>")
def another_token_ends_the_answer(b):
    e = b.good(SINGLE)
    return instead(b, spliced(e, len(e.ids) - 2, 1, [b.control("<|endoftext|>")], True))


@fault("control-tokens", "padding")
def padding_at_the_end(b):
    e = b.good(SINGLE)
    return instead(b, spliced(e, len(e.ids), 0, [b.control("<|endoftext|>")] * 5))


@fault("control-tokens", "<|endoftext|>")
def padding_at_the_beginning(b):
    return instead(b, spliced(b.good(MULTI), 0, 0, [b.control("<|endoftext|>")] * 3))


@fault("extra-bos", "", "mistral-v1")
def bos_at_every_turn(b):
    e = b.good(MULTI)
    return instead(b, spliced(e, e.ids.index(b.control("<|im_end|>")) + 1, 0, [b.control("<|im_start|>")]))


# The loss mask.


def masked(b: Bench, row: int, mask: Callable[[list[bool]], list[bool]]) -> tuple[Batch, int, int]:
    e = b.good(row)
    new = mask(e.loss_mask)
    first = next(i for i in range(1, len(new)) if new[i] != e.loss_mask[i])
    return to_batch([b.good(WIDE), replace(e, loss_mask=new), b.good(SINGLE)]), row, first


@fault("mask-shifted", "left")
def the_mask_is_one_to_the_left(b):
    return masked(b, MULTI, lambda mask: [*mask[1:], False])


@fault("mask-shifted", "right")
def the_mask_is_one_to_the_right(b):
    return masked(b, ODD, lambda mask: [False, *mask[:-1]])


@fault("train-on", "all answers are trained", train_on="last")
def all_answers_are_trained(b):
    return masked(b, MULTI, lambda _: b.written(MULTI, b.rows[MULTI], "all").loss_mask)


@fault("train-on", "the last answer alone", "llama2")
def the_last_answer_alone_is_trained(b):
    return masked(b, LONG, lambda _: b.written(LONG, b.rows[LONG], "last").loss_mask)


@fault("train-on", "leave out of the loss")
def a_messages_flag_is_ignored(b):
    every = replace(b.rows[FLAGGED], messages=tuple(replace(m, trained=True) for m in b.rows[FLAGGED].messages))
    return masked(b, FLAGGED, lambda _: b.written(FLAGGED, every).loss_mask)


@fault("prompt-trained", "template and chat format", template="chat:in-context-defense")
def the_demonstration_is_trained(b):
    e = b.good(SINGLE)
    ends = [i for i, t in enumerate(e.ids) if t == b.control("<|im_end|>")]
    first = e.ids.index(b.control("<|im_start|>"), ends[0]) + 1 + len(b.ids("assistant\n"))
    return masked(b, SINGLE, lambda mask: [flag or first <= i <= ends[1] for i, flag in enumerate(mask)])


@fault("prompt-trained", "the system prompt", template="chat:mpt")
def the_system_prompt_is_trained(b):
    e = b.good(SINGLE)
    first = 1 + len(b.ids("system\n"))
    end = e.ids.index(b.control("<|im_end|>"))
    return masked(b, SINGLE, lambda mask: [flag or first <= i < end for i, flag in enumerate(mask)])


@fault("prompt-trained", "message 3 (user)", template="chat:llama-short")
def a_question_is_trained_beside_a_wrong_system_prompt(b):
    template = replace(b.setup.prompt_format.template, system=MPT)
    e = b.written(MULTI, b.rows[MULTI], template=template)
    ends = [i for i, t in enumerate(e.ids) if t == b.control("<|im_end|>")]
    first = ends[3] - len(b.ids("and the third?"))
    mask = [flag or first <= i < ends[3] for i, flag in enumerate(e.loss_mask)]
    return to_batch([replace(e, loss_mask=mask)]), MULTI, first


# The batch.


@fault("labels", "those of document 1")
def the_labels_of_another_document(b):
    first, second = b.good(SINGLE), b.good(MULTI)
    batch, size = to_batch([first, second]), len(first.ids)
    labels = batch.labels[size : size * 2]
    wrong = next(i for i, x in enumerate(labels) if x not in (IGNORE_INDEX, *batch.tokens[i + 1 : i + 2]))
    return replace(batch, labels=[*labels, *batch.labels[size:]]), SINGLE, wrong


@fault("labels", "-100 is neither a token nor the ignore index")
def another_ignore_index(b):
    batch = to_batch([b.good(SINGLE), b.good(MULTI)])
    return replace(batch, labels=[-100 if t == IGNORE_INDEX else t for t in batch.labels]), SINGLE, 0


@fault("labels", "next document's first token")
def the_last_label_looks_into_the_next_document(b):
    batch, size = to_batch([b.good(SINGLE), b.good(MULTI)]), len(b.good(SINGLE).ids)
    return (
        replace(batch, labels=[*batch.labels[: size - 1], batch.tokens[size], *batch.labels[size:]]),
        SINGLE,
        size - 1,
    )


@fault("position-ids", "begin anew")
def positions_begin_anew_in_the_middle(b):
    batch, size = to_batch([b.good(SINGLE), b.good(MULTI)]), len(b.good(SINGLE).ids)
    positions = [p if i < size + 20 else i - size - 20 for i, p in enumerate(batch.position_ids)]
    return replace(batch, position_ids=positions), MULTI, 20


@fault("position-ids", "count from 1")
def positions_count_from_one(b):
    batch, size = to_batch([b.good(SINGLE), b.good(MULTI)]), len(b.good(SINGLE).ids)
    positions = [p + (i >= size) for i, p in enumerate(batch.position_ids)]
    return replace(batch, position_ids=positions), MULTI, 0


@fault("boundaries", "boundary")
def two_documents_are_merged(b):
    both = to_batch([b.good(SINGLE), b.good(MULTI)])
    batch = to_batch([Example(both.tokens, [False, *(t != IGNORE_INDEX for t in both.labels[:-1])], row=SINGLE)])
    return batch, SINGLE, len(b.good(SINGLE).ids)


@fault("boundaries", "boundary")
def a_row_is_there_twice_in_one_document(b):
    e = b.good(SINGLE)
    return to_batch([b.good(WIDE), replace(e, ids=e.ids * 2, loss_mask=e.loss_mask * 2)]), SINGLE, len(e.ids)


@fault("boundaries", "at another token")
def boundaries_are_one_too_late(b):
    batch = to_batch([b.good(row) for row in (SINGLE, MULTI, WIDE)])
    cu = [0, *(x + 1 for x in batch.cu_seqlens[1:-1]), batch.cu_seqlens[-1]]
    return replace(batch, cu_seqlens=cu), SINGLE, batch.cu_seqlens[1]


@fault("boundaries", "at another token")
def one_boundary_is_too_early_with_its_positions(b):
    batch = to_batch([b.good(row) for row in (SINGLE, MULTI, WIDE)])
    x, y = batch.cu_seqlens[1:3]
    positions = [*batch.position_ids[: y - 2], 0, 1, *(p + 2 for p in batch.position_ids[y:])]
    return replace(batch, cu_seqlens=[0, x, y - 2, len(batch.tokens)], position_ids=positions), MULTI, y - 2 - x


@fault("boundaries", "split")
def a_row_is_split_in_two(b):
    e = b.good(MULTI)
    parts = [replace(e, ids=e.ids[a:z], loss_mask=e.loss_mask[a:z]) for a, z in ((0, 50), (50, len(e.ids)))]
    return to_batch([b.good(SINGLE), *parts]), MULTI, 50


@fault("boundaries")
def an_empty_document(b):
    batch, size = to_batch([b.good(SINGLE), b.good(MULTI)]), len(b.good(SINGLE).ids)
    cu = [0, size, size, len(batch.tokens)]
    return replace(batch, cu_seqlens=cu, rows=[SINGLE, WIDE, MULTI]), WIDE, 0


@fault("cut-short", "first 12 tokens are missing")
def the_beginning_is_cut(b):
    e = b.good(SINGLE)
    return instead(b, replace(e, ids=e.ids[12:], loss_mask=e.loss_mask[12:]))


@fault("cut-short", "the document ends after")
def cut_in_the_middle_of_an_answer(b):
    return instead(b, cut_example(b.good(MULTI), len(b.good(MULTI).ids) - 4))


@fault("labels", "", max_length=60, too_long="cut")
def a_cut_row_with_the_labels_of_the_whole(b):
    e = b.good(MULTI)
    short = cut_example(e, 60)
    batch = to_batch([short])
    full = to_batch([e])
    labels = [*batch.labels[:-1], full.tokens[60]]
    return replace(batch, labels=labels), MULTI, 59
