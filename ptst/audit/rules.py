"""The rules on what the loss function gets: batches first, then every document in them against its row of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ptst.audit.findings import Finding
from ptst.audit.reference_formats import Wanted, spell, wanted
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation


@dataclass(frozen=True)
class Setup:
    """What training was asked for."""

    prompt_format: PromptFormat
    train_on: str = "all"
    max_length: int | None = None
    too_long: str = "drop"


def check_shape(batch: Batch, conversations: Sequence[Conversation]) -> list[Finding]:
    """The cheap rules, run on every batch of a training run: boundaries, positions, targets, something trained."""
    cu, rows = batch.cu_seqlens, batch.rows

    def place(token: int) -> tuple[str, int]:
        """(row, index within its document) of a token of the batch."""
        index = max((i for i, start in enumerate(cu[:-1]) if start <= token), default=0)
        row = rows[min(index, len(rows) - 1)] if rows else -1
        return (conversations[row].source if 0 <= row < len(conversations) else "batch"), token - cu[index]

    lengths = {len(batch.tokens), len(batch.position_ids), len(batch.labels), cu[-1] if cu else 0}
    if len(cu) != len(rows) + 1 or cu[0] != 0 or len(lengths) > 1 or any(b <= a for a, b in pairwise(cu)):
        jump = next((i for i, p in enumerate(batch.position_ids) if p != i), cu[-1] if cu else 0)
        where = place(jump) if len(cu) > 1 else ("batch", 0)
        cause = f"{len(rows)} documents of {len(batch.tokens)} tokens are parted at {cu}"
        return [Finding("boundaries", where[0], cause, where[1])]
    found = []
    should = [p for a, b in pairwise(cu) for p in range(b - a)]
    if batch.position_ids != should:
        wrong = next(i for i, (a, b) in enumerate(zip(batch.position_ids, should, strict=True)) if a != b)
        row, token = place(wrong)
        found.append(
            Finding("positions", row, f"position {batch.position_ids[wrong]} in place of {should[wrong]}", token)
        )
    last = set(cu[1:])
    following = [*batch.tokens[1:], IGNORE_INDEX]
    for i, (target, after) in enumerate(zip(batch.labels, following, strict=True)):
        if target != IGNORE_INDEX and (target != after or i + 1 in last):
            row, token = place(i)
            what = "the document's end" if i + 1 in last else f"token {after}"
            found.append(Finding("targets", row, f"the target is {target}, but {what} follows", token))
            break
    for start, end in pairwise(cu):
        if all(t == IGNORE_INDEX for t in batch.labels[start:end]):
            row, token = place(start)
            found.append(Finding("nothing-trained", row, f"none of {end - start} tokens is trained", token))
    return found


def check_batch(batch: Batch, conversations: Sequence[Conversation], setup: Setup) -> list[Finding]:
    """All rules on a batch: its shape, then each document against the row it came from."""
    found = check_shape(batch, conversations)
    if any(f.rule == "boundaries" for f in found):
        return found  # what cannot be told apart cannot be compared
    for (start, end), row in zip(pairwise(batch.cu_seqlens), batch.rows, strict=True):
        conversation = conversations[row]
        have = batch.tokens[start:end]
        flags = [False, *(t != IGNORE_INDEX for t in batch.labels[start : end - 1])]
        want = wanted(spell(conversation, setup.prompt_format, setup.train_on), setup.prompt_format.tokenizer)
        found += _document(have, flags, want, conversation, setup)
    return found


def _document(
    have: list[int], flags: list[bool], want: Wanted, conversation: Conversation, setup: Setup
) -> Iterator[Finding]:
    source, tokenizer = conversation.source, setup.prompt_format.tokenizer
    for start, piece in want.pieces:
        if start in want.lossy:
            spelled = tokenizer.decode_text(tokenizer.encode(piece.given + piece.said))
            yield Finding("lossy-text", source, _first_difference(piece.given + piece.said, spelled), start)
    for token_boundary in want.token_boundaries:
        if token_boundary < len(have):
            yield Finding(
                "token-boundary",
                source,
                "the answer does not join the prompt in the tokenizer's natural way",
                token_boundary,
            )
    asked_cut = setup.too_long == "cut" and len(have) == setup.max_length
    same = have == want.ids or (asked_cut and have == want.ids[: len(have)])
    if not same:
        yield _tokens_differ(have, want, conversation, setup)
    yield from _flags_differ(have, flags, want, source)
    if setup.max_length is not None and len(have) > setup.max_length:
        yield Finding("too-long", source, f"{len(have)} tokens, the limit is {setup.max_length}", setup.max_length)
    prompt = setup.prompt_format.encode(conversation.prompt()).ids
    if have[: len(prompt)] != prompt[: len(have)]:
        at = _first(have, prompt)
        cause = f"id {_at(have, at)} in training, id {_at(prompt, at)} at test time"
        yield Finding("prompt-differs", source, cause, at)


def _flags_differ(have: list[int], flags: list[bool], want: Wanted, source: str) -> Iterator[Finding]:
    """The mask, as far as the tokens are the wanted ones."""
    limit = _first(have, want.ids)
    if any(want.trained[:limit]) and not any(flags):
        return  # told by check_shape
    ends = {start for start, piece in want.pieces if piece.control}
    wrong: dict[str, list[int]] = {}
    for i in range(1, limit):
        if want.trained[i] and not flags[i]:
            wrong.setdefault("terminator-untrained" if i in ends else "answer-untrained", []).append(i)
        elif flags[i] and not want.trained[i]:
            wrong.setdefault("prompt-trained", []).append(i)
    for rule, places in wrong.items():
        yield Finding(rule, source, f"{len(places)} {'token' if len(places) == 1 else 'tokens'}", places[0])


def _tokens_differ(have: list[int], want: Wanted, conversation: Conversation, setup: Setup) -> Finding:
    """The first thing wrong with a row's tokens, by its cause."""
    tokenizer, source = setup.prompt_format.tokenizer, conversation.source
    at = _first(have, want.ids)
    names = tokenizer.control_names
    got, meant = names.get(_at(have, at)), names.get(_at(want.ids, at))
    bos = tokenizer.control_id(tokenizer.bos) if tokenizer.bos else None
    stop = names[setup.prompt_format.terminator_id]
    if at == len(have):
        return Finding("cut-short", source, f"{len(have)} of {len(want.ids)} tokens", max(0, at - 1))
    twice = next((i for i in range(1, len(have)) if have[i - 1] == have[i] == bos), None)
    if twice is not None:
        return Finding("double-bos", source, f"{tokenizer.bos} {tokenizer.bos}", twice)
    if got is not None and have.count(have[at]) > want.ids.count(have[at]) and _says(conversation, got):
        return Finding("forged-control", source, f"the text {got} of a message became the control token", at)
    if got == meant == stop or (got == stop and at == len(have) - 1):
        return Finding("terminator-extra", source, f"{stop} after the answer was cut at token {at}", at)
    if meant == tokenizer.bos and setup.prompt_format.chat_format.name != "chatml":
        return Finding("missing-bos", source, f"{tokenizer.bos} is missing", at)
    if got == stop:
        return Finding("terminator-extra", source, f"{stop} stands where {_show(want.ids, at, tokenizer)} should", at)
    if meant == stop:
        return Finding("terminator-missing", source, f"{_show(have, at, tokenizer)} stands where {stop} should", at)
    if got == tokenizer.bos and setup.prompt_format.chat_format.name != "chatml":
        return Finding("extra-bos", source, f"{tokenizer.bos} stands where text should", at)
    spelled, text = tokenizer.decode(have), tokenizer.decode(want.ids)
    if spelled == text:
        cause = (
            f"{_show(have, at, tokenizer)} in place of {_show(want.ids, at, tokenizer)}, though the text is the same"
        )
        return Finding("unnatural-ids", source, cause, at)
    if [i for i in have if i in names] != [i for i in want.ids if i in names]:
        cause = f"{_show(have, at, tokenizer)} in place of {_show(want.ids, at, tokenizer)}"
        return Finding("control-tokens", source, cause, at)
    return Finding("text-differs", source, _first_difference(text, spelled), at)


def _says(conversation: Conversation, name: str) -> bool:
    return any(name in m.content for m in conversation.messages)


def _first(a: Sequence, b: Sequence) -> int:
    """Index of the first difference; the shorter length where one begins the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _at(ids: list[int], index: int) -> int | None:
    return ids[index] if index < len(ids) else None


def _show(ids: list[int], at: int, tokenizer) -> str:
    return repr(tokenizer.decode([ids[at]])) if at < len(ids) else "the end"


def _first_difference(text: str, spelled: str) -> str:
    at = _first(text, spelled)
    return f"{text[at : at + 12]!r} is meant at character {at}, the ids say {spelled[at : at + 12]!r}"
