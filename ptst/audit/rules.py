"""The rules on the rows of the data (role markers, blanks, duplicates, overlap) and on what the loss function gets:
first a batch, then each of its documents against its row. And the counts of a whole data set."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ptst.audit.findings import Finding
from ptst.audit.reference_formats import Reference, reference
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.data.sources import Source
from ptst.records import DataRecord
from ptst.text.encode import first_difference
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Setup:
    """A training setup: the prompt format, which answers are trained (all or last), the length limit in tokens and what
    happens to longer examples (drop, cut or stop)."""

    prompt_format: PromptFormat
    train_on: str = "all"
    max_length: int | None = None
    too_long: str = "drop"


def check_shape(batch: Batch, conversations: Sequence[Conversation]) -> list[Finding]:
    """The cheap rules, applied to every batch of a training run: boundaries, positions, labels, something trained."""
    cu, rows = batch.cu_seqlens, batch.rows

    def finding(rule: str, cause: str, token: int) -> Finding:
        """At a token of the batch: its row, and its index in its document."""
        index = max((i for i, start in enumerate(cu[:-1]) if start <= token), default=0)
        row = rows[min(index, len(rows) - 1)] if rows else -1
        source = conversations[row].source if 0 <= row < len(conversations) else "batch"
        return Finding(rule, source, cause, token - cu[index])

    lengths = {len(batch.tokens), len(batch.position_ids), len(batch.labels), cu[-1] if cu else 0}
    if len(cu) != len(rows) + 1 or cu[0] != 0 or len(lengths) > 1 or any(b <= a for a, b in pairwise(cu)):
        jump = next((i for i, p in enumerate(batch.position_ids) if p != i), cu[-1] if cu else 0)
        cause = f"{len(rows)} documents of {len(batch.tokens)} tokens have the boundaries {cu}"
        return [finding("boundaries", cause, jump) if len(cu) > 1 else Finding("boundaries", "batch", cause, 0)]
    found = []
    expected = [p for a, b in pairwise(cu) for p in range(b - a)]
    if batch.position_ids != expected:
        wrong = first_difference(batch.position_ids, expected)
        cause = f"position {batch.position_ids[wrong]} instead of {expected[wrong]}"
        found.append(finding("position-ids", cause, wrong))
    last = set(cu[1:])
    for i, (label, after) in enumerate(zip(batch.labels, [*batch.tokens[1:], IGNORE_INDEX], strict=True)):
        if label != IGNORE_INDEX and (label != after or i + 1 in last):
            what = "the document's end" if i + 1 in last else f"token {after}"
            found.append(finding("labels", f"the label is {label}, but {what} follows", i))
            break
    for start, end in pairwise(cu):
        if all(t == IGNORE_INDEX for t in batch.labels[start:end]):
            found.append(finding("nothing-trained", f"none of {end - start} tokens is trained", start))
    return found


def check_batch(batch: Batch, conversations: Sequence[Conversation], setup: Setup) -> list[Finding]:
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


def check_rows(conversations: Sequence[Conversation], prompt_format: PromptFormat) -> Iterator[Finding]:
    """Rules on the messages: markers of chat templates in their text, blank turns, duplicates."""
    first: dict[tuple[Message, ...], str] = {}
    control_text = ControlText(prompt_format)
    for conversation in conversations:
        for cause in prompt_format.forged_markers(conversation):
            yield Finding("role-markers", conversation.source, cause)
        yield from control_text.check(conversation)
        for number, message in enumerate(conversation.messages, 1):
            if not message.content.strip() and message.role != "system":
                rule = "blank-answer" if message.role == "assistant" else "blank-prompt"
                yield Finding(rule, conversation.source, f"message {number} ({message.role}) is {message.content!r}")
        if conversation.messages in first:
            yield Finding("duplicate", conversation.source, f"the same as {first[conversation.messages]}")
        first.setdefault(conversation.messages, conversation.source)


# Of chat templates in wide use, whatever the tokenizer.
_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"),
    *("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    # Terminators of others: text that was templated for another model keeps them.
    *("<s>", "</s>", "<bos>", "<eos>", "<|end|>", "<|eom_id|>", "<|end_of_text|>", "<|endofprompt|>", "<|im_sep|>"),
    *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)


_TAG = re.compile(r"</?\w+>")


class ControlText:
    """Finds messages that spell control tokens. As text they never become one, so the model reads, or learns to write,
    the signs one by one before the real token."""

    def __init__(self, prompt_format: PromptFormat):
        tokenizer = prompt_format.tokenizer
        sample = [Message("system", "s"), Message("user", "a"), Message("assistant", "b")]
        sample = sample[prompt_format.template.is_text :]
        used = {s.text for s in prompt_format.segments(Conversation(tuple(sample))) if s.control}
        used |= {tokenizer.control_names[i] for i in prompt_format.stop_ids if i in tokenizer.control_names}
        self._used = used | {name for name in (tokenizer.bos, tokenizer.eos) if name}
        self._own = self._used | set(tokenizer.control_names.values())
        # Role markers that are text have a rule of their own.
        names = sorted({*self._own, *_MARKERS} - {"", *prompt_format.chat_format.role_markers}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)))

    def check(self, conversation: Conversation) -> Iterator[Finding]:
        """At most one finding for each message: an error for a token of the format in use. What could be a tag of HTML,
        such as <s>, and markers that are not this tokenizer's, count where they begin or end the message."""
        for number, message in enumerate(conversation.messages, 1):
            levels: dict[str, str] = {}
            for found in self._pattern.finditer(message.content):
                outer = not (message.content[: found.start()].strip() and message.content[found.end() :].strip())
                tag = not outer and (_TAG.fullmatch(found[0]) or found[0] not in self._own)
                rule = "tag-text" if tag else "control-text" if found[0] in self._used else "marker-text"
                levels.setdefault(rule, found[0])
            for rule in ("control-text", "marker-text", "tag-text"):
                if rule in levels:
                    cause = f"message {number} ({message.role}) holds {levels[rule]}"
                    yield Finding(rule, conversation.source, cause)
                    break


def check_overlap(conversations: Sequence[Conversation], asked: Mapping[str, str]) -> Iterator[Finding]:
    """Training questions among `asked`: test texts (`normalized`), with the name of the set that each is from."""
    for conversation in conversations:
        for message in conversation.messages:
            name = asked.get(normalized(message.content)) if message.role == "user" and asked else None
            if name is not None:
                yield Finding("overlap", conversation.source, f"this question is also in {name}")


def normalized(text: str) -> str:
    """Text without case, extra whitespace and punctuation at its ends."""
    return " ".join(text.lower().split()).strip(".?! ")


def tally(source: Source, batches: Sequence[Batch], prepared: DataRecord, micro_batch_tokens: int) -> dict[str, Any]:
    """Counts of what reaches training. Lengths in tokens."""
    lengths = [end - start for b in batches for start, end in pairwise(b.cu_seqlens)]
    capacity = sum(max(micro_batch_tokens, len(b.tokens)) for b in batches)
    return {
        **{k: v for k, v in prepared.result().items() if isinstance(v, int)},
        "shortest": min(lengths, default=0),
        "median_length": statistics.median(lengths) if lengths else 0,
        "longest": max(lengths, default=0),
        "trained_share": prepared.trained_tokens / sum(lengths) if lengths else 0.0,
        "micro_batch_tokens": micro_batch_tokens,
        "packing_fill": sum(lengths) / capacity if capacity else 0.0,
        "distinct_rows": len({c.messages for c in source.conversations}),
    }
