"""The rules on what the loss function gets: first a batch, then each of its documents against its row, as the reference
formats write it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ptst.audit.findings import Finding
from ptst.audit.reference_formats import Reference, reference
from ptst.audit.setup import Setup
from ptst.audit.shape import check_shape
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.text.encode import first_difference
from ptst.text.segments import Conversation
from ptst.text.tokenizer import Tokenizer


def check_documents(batch: Batch, conversations: Sequence[Conversation], setup: Setup) -> list[Finding]:
    """All rules on a batch: its shape, then each document against the row that it came from."""
    found = check_shape(batch, conversations)
    if any(f.rule == "boundaries" for f in found):
        return found  # documents cannot be separated, so they cannot be compared
    for (start, end), row in zip(pairwise(batch.cu_seqlens), batch.rows, strict=True):
        conversation = conversations[row]
        loss_mask = [False, *(label != IGNORE_INDEX for label in batch.labels[start : end - 1])]
        expected = reference(conversation, setup.prompt_format, setup.train_on)
        found += _check_document(Document(batch.tokens[start:end], loss_mask, expected, conversation, setup))
    return found


@dataclass(frozen=True)
class Document:
    """One document of a batch, with its loss mask, beside the reference for its row."""

    ids: list[int]
    loss_mask: list[bool]
    reference: Reference
    conversation: Conversation
    setup: Setup

    @property
    def source(self) -> str:
        return self.conversation.source


def _check_document(d: Document) -> Iterator[Finding]:
    ids, expected, setup = d.ids, d.reference, d.setup
    for start, run in expected.runs:
        if start in expected.lossy:
            yield Finding("lossy-text", d.source, _text_difference(run.text, expected.lossy[start]), start)
    for boundary in expected.token_boundaries:
        if boundary < len(ids):
            yield Finding("token-boundary", d.source, "prompt and answer are not encoded in one call", boundary)
    may_be_cut = setup.too_long == "cut" and len(ids) == setup.max_length
    if not (ids == expected.ids or (may_be_cut and ids == expected.ids[: len(ids)])):
        yield _tokens_differ(d)
    yield from _mask_differs(d)
    if setup.max_length is not None and len(ids) > setup.max_length:
        yield Finding("too-long", d.source, f"{len(ids)} tokens, the limit is {setup.max_length}", setup.max_length)
    prompt = setup.prompt_format.encode(d.conversation.prompt()).ids
    if ids[: len(prompt)] != prompt[: len(ids)]:
        at = first_difference(ids, prompt)
        yield Finding("prompt-differs", d.source, f"id {_at(ids, at)} in training, {_at(prompt, at)} at test time", at)


def _mask_differs(d: Document) -> Iterator[Finding]:
    """The loss mask, up to the first token that differs from the reference."""
    expected, limit = d.reference.loss_mask, first_difference(d.ids, d.reference.ids)
    if any(expected[:limit]) and not any(d.loss_mask):
        return  # check_shape reports it
    ends = {start for start, run in d.reference.runs if run.control}
    wrong: dict[str, list[int]] = {}
    for i in range(1, limit):
        if expected[i] and not d.loss_mask[i]:
            wrong.setdefault("terminator-untrained" if i in ends else "answer-untrained", []).append(i)
        elif d.loss_mask[i] and not expected[i]:
            wrong.setdefault("prompt-trained", []).append(i)
    for rule, places in wrong.items():
        yield Finding(rule, d.source, f"{len(places)} {'token' if len(places) == 1 else 'tokens'}", places[0])


def _tokens_differ(d: Document) -> Finding:
    """The first difference of a document's tokens, by its cause."""
    ids, expected, tokenizer = d.ids, d.reference.ids, d.setup.prompt_format.tokenizer
    at, names = first_difference(ids, expected), tokenizer.control_names
    got, wanted = (names.get(_at(side, at)) for side in (ids, expected))
    instead = f"{_show(ids, at, tokenizer)} instead of {_show(expected, at, tokenizer)}"
    bos = tokenizer.control_id(tokenizer.bos) if tokenizer.bos else None
    stop = names[d.setup.prompt_format.terminator_id]
    has_bos = d.setup.prompt_format.chat_format.has_bos(tokenizer)

    def found(rule: str, cause: str, token: int = at) -> Finding:
        return Finding(rule, d.source, cause, token)

    if at == len(ids):
        return found("cut-short", f"{len(ids)} of {len(expected)} tokens", max(0, at - 1))
    twice = next((i for i in range(1, len(ids)) if ids[i - 1] == ids[i] == bos), None)
    if twice is not None:
        return found("double-bos", f"{tokenizer.bos} {tokenizer.bos}", twice)
    forged = got is not None and any(got in m.content for m in d.conversation.messages)
    if forged and ids.count(ids[at]) > expected.count(ids[at]):
        return found("forged-control", f"the text {got} of a message became the control token")
    if got == wanted == stop or (got == stop and at == len(ids) - 1):
        return found("terminator-extra", f"{stop} after the answer was cut at token {at}")
    if wanted == tokenizer.bos and has_bos:
        return found("missing-bos", f"{tokenizer.bos} is missing")
    if got == stop:
        return found("terminator-extra", instead)
    if wanted == stop:
        return found("terminator-missing", instead)
    if got == tokenizer.bos and has_bos:
        return found("extra-bos", f"{tokenizer.bos} instead of text")
    decoded, text = tokenizer.decode(ids), tokenizer.decode(expected)
    if decoded == text:
        return found("unnatural-ids", f"{instead}, although the text is the same")
    if [i for i in ids if i in names] != [i for i in expected if i in names]:
        return found("control-tokens", instead)
    return found("text-differs", _text_difference(text, decoded))


def _at(ids: list[int], index: int) -> int:
    """The id at an index, -1 beyond the end."""
    return ids[index] if index < len(ids) else -1


def _show(ids: list[int], at: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.decode([ids[at]])) if at < len(ids) else "the end"


def _text_difference(text: str, decoded: str) -> str:
    at = first_difference(text, decoded)
    return f"at character {at} the ids decode to {decoded[at : at + 12]!r} instead of {text[at : at + 12]!r}"
