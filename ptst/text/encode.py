"""Segments to token ids with a loss mask.

Every run of text between control tokens is encoded in one call: the natural tokenization, which the model saw in its
own training. Where that would change the ids of the prompt (an answer that begins with a newline, say), the prompt
keeps its ids, the answer is encoded as a continuation, and the token boundary is recorded. So the ids of the generation
prompt are always an exact prefix of the training ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptst.text.segments import Segment
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Lossy:
    """The first character, at `offset` in a segment of this author, that decoding the ids does not give back."""

    author: str
    offset: int
    character: str

    def __str__(self) -> str:
        what = f"U+{ord(self.character):04X}" if self.character else "the end"
        return f"{what} at character {self.offset} of the {self.author} text"


@dataclass(frozen=True)
class Example:
    """One encoded conversation: token ids and a loss mask (True: the token is trained). `token_boundaries`: indices
    where an answer was encoded as a continuation of its prompt. `lossy`: runs of text that the ids do not give back.
    `row`: index of the conversation in its source."""

    ids: list[int]
    loss_mask: list[bool]
    token_boundaries: tuple[int, ...] = ()
    lossy: tuple[Lossy, ...] = ()
    row: int = -1

    @property
    def num_trained(self) -> int:
        return sum(self.loss_mask)


def encode(segments: list[Segment], tokenizer: Tokenizer) -> Example:
    """Ids and loss mask. Raises UserError for lone surrogates and for control tokens that the tokenizer lacks."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    token_boundaries: list[int] = []
    lossy: list[Lossy] = []
    after: str | None = None  # the control token before
    for run in _runs(segments):
        if run[0].control:
            after = run[0].text
            ids.append(tokenizer.control_id(after))
            loss_mask.append(run[0].trained)
            continue
        sampled = [s.sampled for s in run]
        assert sampled == sorted(sampled), "within a run of text, what the model samples comes last"
        prompt = "".join(s.text for s in run if not s.sampled)
        reply = "".join(s.text for s in run if s.sampled)
        prompt_ids = tokenizer.encode(prompt, after=after)
        all_ids = tokenizer.encode(prompt + reply, after=after) if reply else prompt_ids
        if all_ids[: len(prompt_ids)] != prompt_ids:
            token_boundaries.append(len(ids) + len(prompt_ids))
            all_ids = prompt_ids + tokenizer.encode(reply, continuation=True)
        ids += all_ids
        loss_mask += [False] * len(prompt_ids) + [any(s.trained for s in run)] * (len(all_ids) - len(prompt_ids))
        decoded = tokenizer.decode_text(all_ids, after)
        if decoded != prompt + reply:
            lossy.append(_first_loss(run, decoded))
    return Example(ids, loss_mask, tuple(token_boundaries), tuple(lossy))


def without_swallowed(segments: list[Segment], tokenizer: Tokenizer) -> list[Segment]:
    """The segments without the scaffold's whitespace that a control token beside it swallows (`rstrip`, `lstrip`): the
    model has never seen it. The whitespace of messages is kept."""
    if not (tokenizer.rstrip or tokenizer.lstrip):
        return segments
    out = []
    for before, segment, behind in zip([None, *segments], segments, [*segments[1:], None], strict=False):
        text = segment.text
        if not segment.control and segment.author == "scaffold":
            text = text.lstrip() if before and before.control and before.text in tokenizer.rstrip else text
            text = text.rstrip() if behind and behind.control and behind.text in tokenizer.lstrip else text
        out.append(replace(segment, text=text))
    return out


def _runs(segments: list[Segment]) -> list[list[Segment]]:
    """Control tokens one by one; between them, the runs of text that are encoded in one call."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if not runs or segment.control or segment.apart or runs[-1][0].control:
            runs.append([])
        runs[-1].append(segment)
    return runs


def _first_loss(run: list[Segment], decoded: str) -> Lossy:
    """Where the decoded ids first differ from the text of the run."""
    at = first_difference("".join(s.text for s in run), decoded)
    for segment in run:
        if at < len(segment.text):
            return Lossy(segment.author, at, segment.text[at])
        at -= len(segment.text)
    return Lossy(run[-1].author, len(run[-1].text), "")  # the ids decode to more than the text


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Index of the first difference of two sequences; the shorter length if one begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def cut(encoded: Example, max_length: int) -> Example:
    """The first `max_length` tokens. A cut answer gets no terminator: the model is not taught to stop there."""
    boundaries = tuple(b for b in encoded.token_boundaries if b < max_length)
    ids, loss_mask = encoded.ids[:max_length], encoded.loss_mask[:max_length]
    return replace(encoded, ids=ids, loss_mask=loss_mask, token_boundaries=boundaries)
