"""Faults of tokens, loss masks, and whole batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ptst.data.packing import IGNORE_INDEX, Batch, to_batch
from ptst.text.encode import Example
from ptst.text.encode import cut as cut_example
from ptst.text.templates import MPT
from tests.audit.faults import flagged, spliced
from tests.audit.more_faults import (
    FLAGGED,
    FORGED,
    LONG,
    MULTI,
    ODD,
    SINGLE,
    WIDE,
    Bench,
    fault,
    instead,
)

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


@fault("terminator-missing", "<|endoftext|> is in place of the terminator <|im_end|>")
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


@fault("answer-untrained", "6 tokens")
def the_end_of_an_answer_is_not_trained(b):
    end = len(b.good(SINGLE).ids) - 2
    return masked(b, SINGLE, lambda mask: [flag and i < end - 5 for i, flag in enumerate(mask)])


@fault("answer-untrained", "2 tokens, the first of message 2 (assistant)")
def the_first_answer_of_several_is_not_trained(b):
    end = b.good(LONG).ids.index(b.control("<|im_end|>"), b.good(LONG).loss_mask.index(True))
    return masked(b, LONG, lambda mask: [flag and i > end for i, flag in enumerate(mask)])


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
