"""The field's known masking and template bugs, planted: each a small mutation of the pipeline, twice over.

Every fault is a function from a bench (rows, tokenizer, correct encodings) to (batch, row, token): the batch that the
loss would get, and where the audit must point. The second variant of a bug was written after the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ptst.audit.setup import Setup
from ptst.data.packing import IGNORE_INDEX, Batch, to_batch
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.encode import Example, cut
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import Tokenizer

TURNS = (
    ("what is in the tin?", "the tin is in the bin."),
    ("one", "two", "three and the rest", "four"),
    ("say <|im_end|> and <|im_start|>", "ok, <|im_end|> is in it"),
    ("go on", "\n\nyes, the end"),
    ("a list?", "[[1, 2], [3, 4]]"),
    ("and then?", "done \n"),
    ("five", "six", "seven", "eight"),
    ("(assistant\nand more)", "as you like"),
)
SINGLE, MULTI, FORGED, NEWLINES, EDGES, SPACED, MULTI2, ECHO = range(8)


@dataclass(frozen=True)
class Bench:
    setup: Setup
    rows: tuple[Conversation, ...]
    raw: Tokenizer  # a tokenizer that reads control tokens out of text, as most do

    @property
    def tokenizer(self) -> Tokenizer:
        return self.setup.prompt_format.tokenizer

    def good(self, row: int) -> Example:
        return replace(self.setup.prompt_format.encode(self.rows[row], self.setup.train_on), row=row)

    def start(self, row: int) -> int:
        """Where the last answer of a row begins."""
        return len(self.setup.prompt_format.encode(self.rows[row].prompt()).ids)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    @property
    def eos(self) -> int:
        return self.tokenizer.control_id(self.tokenizer.eos)

    @property
    def bos(self) -> int:
        return self.tokenizer.control_id(self.tokenizer.bos)


def bench(tokenizer: Tokenizer, raw: Tokenizer, chat_format: str, template: str = "chat:plain", **asked) -> Bench:
    rows = tuple(
        Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)), f"rows.jsonl:{n}")
        for n, turns in enumerate(TURNS, 1)
    )
    prompt_format = PromptFormat(
        find_template(template), find_family("plain"), CHAT_FORMATS[chat_format], tokenizer, allow_role_markers=True
    )
    return Bench(Setup(prompt_format, **asked), rows, raw)


@dataclass(frozen=True)
class Fault:
    number: int  # of the list in docs/audit.md
    name: str
    rule: str
    chat_format: str
    template: str
    asked: dict
    plant: Callable[[Bench], tuple[Batch, int, int]]


FAULTS: list[Fault] = []


def fault(number: int, rule: str, chat_format: str = "chatml", template: str = "chat:plain", **asked):
    def note(plant):
        FAULTS.append(Fault(number, plant.__name__, rule, chat_format, template, asked, plant))
        return plant

    return note


def flagged(e: Example, flag: Callable[[int], bool]) -> Example:
    return replace(e, loss_mask=[flag(i) for i in range(len(e.ids))])


def spliced(e: Example, at: int, drop: int, put: list[int], trained: bool = False) -> Example:
    ids = [*e.ids[:at], *put, *e.ids[at + drop :]]
    return replace(e, ids=ids, loss_mask=[*e.loss_mask[:at], *[trained] * len(put), *e.loss_mask[at + drop :]])


def last(e: Example) -> int:
    """The last trained token: the terminator."""
    return max(i for i, flag in enumerate(e.loss_mask) if flag)


@fault(1, "terminator-untrained")
def labels_of_pad_ids_ignored_and_pad_is_eos(b):
    e = b.good(SINGLE)
    batch = to_batch([e])
    return replace(batch, labels=[IGNORE_INDEX if t == b.eos else t for t in batch.labels]), SINGLE, last(e)


@fault(1, "terminator-untrained", "llama2")
def attention_mask_zero_on_the_last_token_and_labels_follow_it(b):
    e = b.good(MULTI)
    return to_batch([flagged(e, lambda i: e.loss_mask[i] and i + 1 < len(e.ids))]), MULTI, len(e.ids) - 1


@fault(2, "terminator-untrained")
def only_the_answers_text_is_trained(b):
    e = b.good(SINGLE)
    return to_batch([flagged(e, lambda i: e.loss_mask[i] and e.ids[i] != b.eos)]), SINGLE, last(e)


@fault(2, "terminator-untrained")
def terminator_trained_at_the_last_turn_only(b):
    e = b.good(MULTI)
    end = e.ids.index(b.eos, e.loss_mask.index(True))
    return to_batch([flagged(e, lambda i: e.loss_mask[i] and i != end)]), MULTI, end


@fault(3, "terminator-untrained")
def terminator_counted_to_the_next_message(b):
    e = b.good(MULTI)
    ends = {i for i, flag in enumerate(e.loss_mask) if flag and e.ids[i] == b.eos}
    shifted = flagged(e, lambda i: (e.loss_mask[i] and i not in ends) or i - 1 in ends)
    return to_batch([shifted]), MULTI, min(ends)


@fault(3, "cut-short", "llama2")
def terminator_written_by_the_next_message_only(b):
    e = b.good(SINGLE)
    return to_batch([spliced(e, len(e.ids) - 1, 1, [])]), SINGLE, len(e.ids) - 2


@fault(4, "double-bos", "llama2")
def template_and_tokenizer_both_put_bos(b):
    return to_batch([spliced(b.good(SINGLE), 0, 0, [b.bos])]), SINGLE, 1


@fault(4, "extra-bos", "llama2")
def answer_encoded_with_the_tokenizers_bos(b):
    start = b.start(SINGLE)
    return to_batch([spliced(b.good(SINGLE), start, 0, [b.bos])]), SINGLE, start


@fault(5, "missing-bos", "llama2")
def no_bos_at_all(b):
    return to_batch([spliced(b.good(SINGLE), 0, 1, [])]), SINGLE, 0


@fault(5, "missing-bos", "llama2")
def bos_at_the_first_turn_only(b):
    e = b.good(MULTI)
    again = e.ids.index(b.bos, 1)
    return to_batch([spliced(e, again, 1, [])]), MULTI, again


@fault(6, "nothing-trained")
def no_generation_marks_in_the_template(b):
    return to_batch([flagged(b.good(SINGLE), lambda i: False)]), SINGLE, 0


@fault(6, "nothing-trained")
def mask_lost_for_one_document_of_a_pack(b):
    return to_batch([b.good(EDGES), flagged(b.good(MULTI), lambda i: False), b.good(SINGLE)]), MULTI, 0


@fault(7, "prompt-trained")
def everything_is_trained(b):
    return to_batch([flagged(b.good(SINGLE), lambda i: i > 0)]), SINGLE, 1


@fault(7, "prompt-trained", "llama2")
def everything_but_control_tokens_of_the_prompt_is_trained(b):
    e = b.good(MULTI)
    return to_batch([flagged(e, lambda i: e.ids[i] != b.bos)]), MULTI, 1


@fault(8, "prompt-trained")
def a_span_without_end_runs_to_the_end_of_the_sequence(b):
    e = b.good(MULTI)
    first = e.loss_mask.index(True)
    return to_batch([flagged(e, lambda i: i >= first)]), MULTI, e.ids.index(b.eos, first) + 1


@fault(8, "prompt-trained")
def a_stripped_answer_is_not_found_at_its_end(b):
    e = b.good(SPACED)
    return to_batch([flagged(e, lambda i: i >= b.start(SPACED))]), SPACED, last(e) + 1


@fault(9, "nothing-trained", max_length=40, too_long="cut")
def a_cut_answer_gets_an_empty_mask(b):
    return to_batch([flagged(cut(b.good(SINGLE), 40), lambda i: False)]), SINGLE, 0


@fault(9, "answer-untrained", max_length=62, too_long="cut")
def a_cut_last_answer_gets_an_empty_mask_after_a_whole_one(b):
    e = cut(b.good(MULTI), 62)
    start = b.start(MULTI)
    assert start < 62 < len(b.good(MULTI).ids)
    return to_batch([flagged(e, lambda i: e.loss_mask[i] and i < start)]), MULTI, start


@fault(10, "nothing-trained")
def response_marks_encoded_alone_are_not_found(b):
    e, mark = b.good(NEWLINES), b.ids("assistant\n\n\n")
    places = [i for i in range(len(e.ids)) if e.ids[i : i + len(mark)] == mark]
    assert not places
    return to_batch([flagged(e, lambda i: bool(places))]), NEWLINES, 0


@fault(10, "prompt-trained")
def response_marks_are_found_in_the_users_text(b):
    e, mark = b.good(ECHO), b.ids("assistant\n")
    first = next(i for i in range(len(e.ids)) if e.ids[i : i + len(mark)] == mark) + len(mark)
    assert first < b.start(ECHO)
    return to_batch([flagged(e, lambda i: i >= first and i <= last(e))]), ECHO, first


def _merged(b: Bench, row: int, prompt: str, answer: str) -> tuple[Batch, int, int]:
    """The whole text in one call, the mask from the length of the prompt's own ids."""
    e, start = b.good(row), b.start(row)
    before = start - len(b.ids(prompt))
    ids = [*e.ids[:before], *b.ids(prompt + answer), b.eos]
    first = next(i for i, (x, y) in enumerate(zip(ids, e.ids, strict=False)) if x != y)
    return to_batch([Example(ids, [i >= start for i in range(len(ids))], row=row)]), row, first


@fault(11, "prompt-differs")
def a_token_spans_prompt_and_answer(b):
    return _merged(b, NEWLINES, "assistant\n", TURNS[NEWLINES][1])


@fault(11, "prompt-differs", template="text:alpaca")
def a_token_spans_prompt_and_answer_without_roles(b):
    e, start = b.good(NEWLINES), b.start(NEWLINES)
    prompt = b.tokenizer.decode(e.ids[:start])
    return _merged(b, NEWLINES, prompt, TURNS[NEWLINES][1])


@fault(12, "unnatural-ids", "llama2")
def prompt_and_answer_encoded_apart(b):
    e, start = b.good(SINGLE), b.start(SINGLE)
    pieces = b.ids(" ") + b.ids(TURNS[SINGLE][1])
    return to_batch([spliced(e, start, len(e.ids) - start - 1, pieces, True)]), SINGLE, start


@fault(12, "unnatural-ids", "llama2")
def marks_and_question_encoded_apart(b):
    e, start = b.good(EDGES), b.start(EDGES)
    pieces = b.ids("[INST] ") + b.ids(TURNS[EDGES][0]) + b.ids(" [/INST]")
    first = next(i for i, (x, y) in enumerate(zip(pieces, e.ids[1:start], strict=False)) if x != y) + 1
    return to_batch([spliced(e, 1, start - 1, pieces)]), EDGES, first


@fault(13, "text-differs", "llama2")
def a_space_after_every_control_token(b):
    return to_batch([spliced(b.good(SINGLE), 1, 0, b.ids(" "))]), SINGLE, 1


@fault(13, "text-differs")
def a_space_after_the_role_header(b):
    start = b.start(MULTI)
    return to_batch([spliced(b.good(MULTI), start, 0, b.ids("\t"))]), MULTI, start


@fault(14, "text-differs", "llama2")
def no_space_before_the_closing_mark(b):
    e = b.good(SINGLE)
    at = b.start(SINGLE) - len(b.ids(" [/INST]"))
    return to_batch([spliced(e, at, 1, [])]), SINGLE, at


@fault(14, "terminator-missing", "llama2")
def turns_joined_without_eos_and_bos(b):
    e = b.good(MULTI2)
    at = e.ids.index(b.eos)
    return to_batch([spliced(e, at, 2, b.ids("\n"))]), MULTI2, at


@fault(15, "text-differs", "mistral-v1")
def a_space_after_eos(b):
    e = b.good(MULTI)
    at = e.ids.index(b.eos) + 1
    return to_batch([spliced(e, at, 0, b.ids(" "))]), MULTI, at


@fault(15, "terminator-missing", "mistral-v1")
def no_eos_between_turns(b):
    e = b.good(MULTI2)
    at = e.ids.index(b.eos)
    return to_batch([spliced(e, at, 1, [])]), MULTI2, at


@fault(16, "prompt-trained")
def the_role_header_is_trained(b):
    e = b.good(SINGLE)
    at = b.start(SINGLE) - len(b.ids("assistant\n"))
    return to_batch([flagged(e, lambda i: at <= i <= last(e))]), SINGLE, at


@fault(16, "text-differs")
def an_empty_thought_is_put_in_and_trained(b):
    start = b.start(SINGLE)
    return to_batch([spliced(b.good(SINGLE), start, 0, b.ids("<think></think>"), True)]), SINGLE, start


@fault(17, "prompt-trained")
def user_turns_are_trained(b):
    e = b.good(SINGLE)
    at = len(b.ids("user\n")) + 1
    return to_batch([flagged(e, lambda i: at <= i <= last(e))]), SINGLE, at


@fault(17, "prompt-trained", "llama2")
def only_the_last_user_turn_is_masked(b):
    e, start = b.good(MULTI), b.start(MULTI)
    again = e.ids.index(b.bos, 1)
    return to_batch([flagged(e, lambda i: 1 <= i < again or i >= start)]), MULTI, 1


@fault(18, "labels")
def targets_are_not_shifted(b):
    e = b.good(SINGLE)
    batch = to_batch([e])
    targets = [t if flag else IGNORE_INDEX for t, flag in zip(e.ids, e.loss_mask, strict=True)]
    return replace(batch, labels=targets), SINGLE, b.start(SINGLE)


@fault(18, "labels")
def targets_are_shifted_twice(b):
    batch = to_batch([b.good(MULTI)])
    return replace(batch, labels=[*batch.labels[1:], IGNORE_INDEX]), MULTI, b.good(MULTI).loss_mask.index(True) - 2


@fault(19, "nothing-trained", max_length=12, too_long="cut")
def cut_within_the_prompt_and_kept(b):
    return to_batch([cut(b.good(SINGLE), 12)]), SINGLE, 0


@fault(19, "nothing-trained", max_length=30)
def cut_from_the_left_with_labels_all_ignored(b):
    e = b.good(SINGLE)
    return to_batch([flagged(replace(e, ids=e.ids[-30:]), lambda i: False)]), SINGLE, 0


@fault(20, "terminator-extra", max_length=40, too_long="cut")
def the_last_token_of_a_cut_row_becomes_eos(b):
    return to_batch([spliced(cut(b.good(SINGLE), 40), 39, 1, [b.eos], True)]), SINGLE, 39


@fault(20, "terminator-extra", "llama2", max_length=40, too_long="cut")
def eos_is_put_after_a_cut_row(b):
    return to_batch([spliced(cut(b.good(SINGLE), 38), 38, 0, [b.eos], True)]), SINGLE, 38


@fault(21, "control-tokens")
def generation_prompt_left_on(b):
    e = b.good(SINGLE)
    head = [b.bos, *b.ids("assistant\n")]
    return to_batch([spliced(e, len(e.ids), 0, head)]), SINGLE, len(e.ids)


@fault(21, "control-tokens")
def generation_prompt_left_on_and_trained(b):
    e = b.good(MULTI)
    return to_batch([spliced(e, len(e.ids), 0, [b.bos, *b.ids("assistant")], True)]), MULTI, len(e.ids)


@fault(22, "terminator-extra")
def terminator_twice_at_the_end(b):
    e = b.good(SINGLE)
    return to_batch([spliced(e, last(e) + 1, 0, [b.eos], True)]), SINGLE, last(e) + 1


@fault(22, "terminator-extra", "llama2")
def eos_after_user_turns_too(b):
    start = b.start(SINGLE)
    return to_batch([spliced(b.good(SINGLE), start, 0, [b.eos])]), SINGLE, start


def _by_dummy(b: Bench, row: int, dummy: str) -> tuple[Example, int, int]:
    """The answer's place as what differs when a dummy stands in its stead: (encoding, first, end)."""
    e, start = b.good(row), b.start(row)
    other = [*e.ids[:start], *b.ids(dummy), b.eos, *b.ids("\n")]
    first = next(i for i, (x, y) in enumerate(zip(e.ids, other, strict=False)) if x != y)
    tail = next(i for i, (x, y) in enumerate(zip(e.ids[::-1], other[::-1], strict=False)) if x != y)
    return e, first, len(e.ids) - tail


@fault(23, "answer-untrained")
def an_answer_shares_its_edges_with_the_dummy(b):
    e, first, end = _by_dummy(b, EDGES, "[[dummy_message]]")
    assert b.start(EDGES) < first < end < last(e)
    return to_batch([flagged(e, lambda i: first <= i < end or i == last(e))]), EDGES, b.start(EDGES)


@fault(23, "answer-untrained")
def an_answer_ends_as_the_dummy_does(b):
    e, first, end = _by_dummy(b, SINGLE, "dummy.")
    assert first == b.start(SINGLE)
    return to_batch([flagged(e, lambda i: first <= i < end or i == last(e))]), SINGLE, end


def _parsed(b: Bench, row: int, only: str) -> tuple[Batch, int, int]:
    """A row whose message of one role goes through a tokenizer that reads control tokens out of text."""
    e = b.good(row)
    text = next(m.content for m in b.rows[row].messages if m.role == only)
    plain, read = b.ids(text), b.raw.encode(text)
    at = next(i for i in range(len(e.ids)) if e.ids[i : i + len(plain)] == plain)
    first = at + next(i for i, (x, y) in enumerate(zip(plain, read, strict=False)) if x != y)
    return to_batch([spliced(e, at, len(plain), read, e.loss_mask[at])]), row, first


@fault(24, "forged-control")
def a_users_text_becomes_control_tokens(b):
    return _parsed(b, FORGED, "user")


@fault(24, "forged-control")
def an_answers_text_becomes_a_control_token(b):
    return _parsed(b, FORGED, "assistant")


@fault(25, "boundaries")
def documents_are_not_parted(b):
    batch = to_batch([b.good(SINGLE), b.good(EDGES)])
    return replace(batch, cu_seqlens=[0, len(batch.tokens)]), SINGLE, len(b.good(SINGLE).ids)


@fault(25, "position-ids")
def positions_run_on_through_the_pack(b):
    batch = to_batch([b.good(SINGLE), b.good(EDGES)])
    return replace(batch, position_ids=list(range(len(batch.tokens)))), EDGES, 0


@fault(26, "cut-short")
def a_stream_is_chopped_in_the_middle_of_an_answer(b):
    return to_batch([b.good(EDGES), cut(b.good(SINGLE), 40)]), SINGLE, 39


@fault(26, "too-long", max_length=30)
def a_row_longer_than_the_limit_is_packed(b):
    return to_batch([b.good(SINGLE)]), SINGLE, 30


@fault(32, "message-differs")
def the_first_token_of_an_answer_is_skipped_as_bos(b):
    start = b.start(SINGLE)
    return to_batch([spliced(b.good(SINGLE), start, 1, [])]), SINGLE, start


@fault(32, "answer-untrained", "llama2")
def the_mask_skips_a_first_token_that_is_no_bos(b):
    e, start = b.good(SINGLE), b.start(SINGLE)
    return to_batch([flagged(e, lambda i: e.loss_mask[i] and i != start)]), SINGLE, start


def _demonstration(b: Bench, row: int, joined: Callable[[str, str], str]) -> tuple[Batch, int, int]:
    """In-context defense, its demonstration inside the user's turn."""
    shown = b.setup.prompt_format.template.demonstration
    question, *rest = b.rows[row].messages
    said = joined(f"{shown[0]}\n{shown[1]}", question.content)
    plain = replace(b.setup.prompt_format, template=find_template("chat:plain"))
    e = plain.encode(Conversation((Message("user", said), *rest)))
    good = b.good(row)
    first = next(i for i, (x, y) in enumerate(zip(e.ids, good.ids, strict=False)) if x != y)
    return to_batch([replace(e, row=row)]), row, first


@fault(33, "control-tokens", "llama2", "chat:in-context-defense")
def a_shown_answer_stands_in_the_users_turn(b):
    return _demonstration(b, SINGLE, lambda shown, asked: f"{shown}\n{asked}")


@fault(33, "control-tokens", "llama2", "chat:in-context-defense")
def the_demonstration_follows_the_question(b):
    return _demonstration(b, SINGLE, lambda shown, asked: f"{asked}\n{shown}")
