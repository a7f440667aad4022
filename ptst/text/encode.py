"""Segments to token ids with a loss mask.

Every run of text between control tokens is encoded in one call: the natural tokenization, which the model saw in its
own training. Where that would change the ids of the prompt (an answer that begins with a newline, say), the prompt
keeps its ids, the answer is encoded as a continuation, and the token boundary is recorded. So the ids of the generation
prompt are always an exact prefix of the training ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptst.errors import UserError
from ptst.text.base_tokenizer import Run
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


def encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> Example:
    """Ids and loss mask. Raises UserError for lone surrogates and for control tokens that the tokenizer lacks."""
    (found,) = encode_all([segments], tokenizer)
    if isinstance(found, UserError):
        raise found
    return found


def encode_all(rows: Sequence[Sequence[Segment] | UserError], tokenizer: Tokenizer) -> list[Example | UserError]:
    """Many rows at once: every distinct run of text is encoded once, all in one call of the tokenizer's library. Of a
    row that cannot be encoded, the reason (`encode`), or the one that it came with."""
    split = [row if isinstance(row, UserError) else _runs(row, tokenizer) for row in rows]
    runs = [run for row in split if not isinstance(row, UserError) for run in row if run.whole is not None]
    encoded = tokenizer.encode_all(text for run in runs for text in (run.prompt, run.whole) if text is not None)
    whole = {run.whole: ids for run in runs if run.whole and isinstance(ids := encoded[run.whole], list)}
    lossy = tokenizer.lossy(whole)
    return [row if isinstance(row, UserError) else _joined(row, tokenizer, encoded, lossy) for row in split]


@dataclass(slots=True)
class _Run:
    """Segments that are encoded in one call: a control token, or a run of text. `prompt`, `whole`: the prompt's part of
    it, and all of it, each with whether it is bare; None for a control token."""

    segments: list[Segment]
    bare: bool = False
    prompt: Run | None = None
    whole: Run | None = None


def _runs(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[_Run]:
    """Control tokens one by one; between them, the runs of text that are encoded in one call."""
    runs: list[_Run] = []
    after: str | None = None  # the control token before
    open_run: list[Segment] = []
    for segment in segments:
        if segment.control:
            runs.append(_Run([segment]))
            after, open_run = segment.text, []
        elif open_run and not segment.apart:
            open_run.append(segment)
        else:
            open_run = [segment]
            runs.append(_Run(open_run, bare=tokenizer.is_bare(after)))
    for run in runs:
        parts = run.segments
        if parts[0].control:
            continue
        given = [s.text for s in parts if not s.sampled]
        run.prompt = run.whole = "".join(given), run.bare
        if len(given) < len(parts):
            said = [s.text for s in parts[len(given) :] if s.sampled]
            assert len(given) + len(said) == len(parts), "within a run of text, what the model samples comes last"
            run.whole = "".join([*given, *said]), run.bare
    return runs


def _joined(
    runs: list[_Run], tokenizer: Tokenizer, encoded: dict[Run, list[int] | UserError], lossy: dict[Run, str]
) -> Example | UserError:
    """The row of encoded runs."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    token_boundaries: list[int] = []
    lost: list[Lossy] = []
    for run in runs:
        first = run.segments[0]
        if run.prompt is None or run.whole is None:
            try:
                ids.append(tokenizer.control_id(first.text))
            except UserError as error:
                return error
            loss_mask.append(first.trained)
            continue
        all_ids = encoded[run.whole]
        prompt_ids = all_ids if run.whole is run.prompt else encoded[run.prompt]
        if isinstance(prompt_ids, UserError):
            return prompt_ids
        if isinstance(all_ids, UserError):
            return all_ids
        decoded = lossy.get(run.whole) if lossy else None
        if all_ids is prompt_ids:
            ids += all_ids
            loss_mask += [False] * len(all_ids)
            if decoded is not None and decoded != run.whole[0]:
                lost.append(_first_loss(run.segments, decoded))
            continue
        if all_ids[: len(prompt_ids)] != prompt_ids:
            token_boundaries.append(len(ids) + len(prompt_ids))
            try:
                reply = tokenizer.encode(run.whole[0][len(run.prompt[0]) :], continuation=True)
            except UserError as error:
                return error
            all_ids = prompt_ids + reply
            (decoded,) = tokenizer.decode_all([(all_ids, run.whole[1])])
        ids += all_ids
        trained = run.segments[-1].trained or any(s.trained for s in run.segments)
        loss_mask += [False] * len(prompt_ids) + [trained] * (len(all_ids) - len(prompt_ids))
        if decoded is not None and decoded != run.whole[0]:
            lost.append(_first_loss(run.segments, decoded))
    return Example(ids, loss_mask, tuple(token_boundaries), tuple(lost))


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
