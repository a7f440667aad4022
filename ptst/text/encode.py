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
from ptst.text.row_forms import Row, RowForm, RunForm, Runs
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
    """Many rows at once (`encode_forms`). Of a row that cannot be encoded, the reason (`encode`), or the one that it
    came with."""
    formed = [row if isinstance(row, UserError) else (RowForm(row, tokenizer), ()) for row in rows]
    return encode_forms(formed, tokenizer)


def encode_forms(rows: Sequence[Row | UserError], tokenizer: Tokenizer) -> list[Example | UserError]:
    """Rows by their forms: every distinct run of text is encoded once, all in one call of the tokenizer's library. Of a
    row that cannot be encoded, the reason, as `encode_all`."""
    forms = {id(row[0]): row[0] for row in rows if not isinstance(row, UserError)}
    filled = [[] if isinstance(row, UserError) else [run.fill(row[1]) for run in row[0].open] for row in rows]
    pairs = [pair for own in (*filled, *(form.fixed for form in forms.values())) for pair in own]
    encoded = tokenizer.encode_all(run for pair in pairs for run in (pair if pair[0] is not pair[1] else pair[:1]))
    whole = {run: ids for _, run in pairs if isinstance(ids := encoded[run], list)}
    work = _Work(tokenizer, encoded, tokenizer.lossy(whole))
    steps = {key: work.steps(form) for key, form in forms.items()}
    return [
        row if isinstance(row, UserError) else work.joined(steps[id(row[0])], runs, row[1])
        for row, runs in zip(rows, filled, strict=True)
    ]


@dataclass(slots=True)
class _Piece:
    """A part of a row: ids, a loss mask, and as of an example what else is to be told of it."""

    ids: list[int]
    loss_mask: list[bool]
    token_boundary: int | None = None
    lossy: Lossy | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing else to tell."""
        return self.token_boundary is None and self.lossy is None


class _Work:
    """Encoded runs, put together to rows."""

    def __init__(self, tokenizer: Tokenizer, encoded: dict[Run, list[int] | UserError], lossy: dict[Run, str]):
        self._tokenizer, self._encoded, self._lossy = tokenizer, encoded, lossy

    def steps(self, form: RowForm) -> list[RunForm | _Piece | UserError]:
        """A form's open runs, and between them what all rows have in common, in as few pieces as can be."""
        steps: list[RunForm | _Piece | UserError] = []
        for run in form.runs:
            if run.given is not None and run.fixed is None:
                steps.append(run)
                continue
            piece = self._control(run.segments[0]) if run.fixed is None else self._piece(run, run.fixed, ())
            last = steps[-1] if steps else None
            if isinstance(piece, _Piece) and isinstance(last, _Piece) and piece.is_plain:
                last.ids, last.loss_mask = last.ids + piece.ids, last.loss_mask + piece.loss_mask
            else:
                steps.append(piece)
        return steps

    def joined(
        self, steps: list[RunForm | _Piece | UserError], filled: list[Runs], texts: Sequence[str]
    ) -> Example | UserError:
        """The row of a form's steps and its open runs, filled with the texts of its messages."""
        ids: list[int] = []
        loss_mask: list[bool] = []
        token_boundaries: list[int] = []
        lossy: list[Lossy] = []
        runs = iter(filled)
        encoded = self._encoded
        for step in steps:
            if isinstance(step, RunForm):
                run = next(runs)
                own = encoded[run[1]]
                if run[0] is run[1] and not self._lossy and isinstance(own, list):  # which is most of them
                    ids += own
                    loss_mask += [False] * len(own)
                    continue
                piece = self._piece(step, run, texts)
            else:
                piece = step
            if isinstance(piece, UserError):
                return piece
            if piece.token_boundary is not None:
                token_boundaries.append(len(ids) + piece.token_boundary)
            if piece.lossy is not None:
                lossy.append(piece.lossy)
            ids += piece.ids
            loss_mask += piece.loss_mask
        return Example(ids, loss_mask, tuple(token_boundaries), tuple(lossy))

    def _control(self, segment: Segment) -> _Piece | UserError:
        try:
            return _Piece([self._tokenizer.control_id(segment.text)], [segment.trained])
        except UserError as error:
            return error

    def _piece(self, form: RunForm, runs: Runs, texts: Sequence[str]) -> _Piece | UserError:
        """What one run of text adds to its row."""
        prompt, whole = runs
        all_ids = self._encoded[whole]
        prompt_ids = all_ids if whole is prompt else self._encoded[prompt]
        if isinstance(prompt_ids, UserError):
            return prompt_ids
        if isinstance(all_ids, UserError):
            return all_ids
        decoded = self._lossy.get(whole) if self._lossy else None
        boundary = None
        if all_ids is not prompt_ids and all_ids[: len(prompt_ids)] != prompt_ids:
            boundary = len(prompt_ids)
            try:
                reply = self._tokenizer.encode(whole[0][len(prompt[0]) :], continuation=True)
            except UserError as error:
                return error
            all_ids = prompt_ids + reply
            (decoded,) = self._tokenizer.decode_all([(all_ids, whole[1])])
        loss_mask = [False] * len(prompt_ids)
        if all_ids is not prompt_ids:
            loss_mask += [form.trained] * (len(all_ids) - len(prompt_ids))
        lossy = None if decoded is None or decoded == whole[0] else _first_loss(form.parts(texts), decoded)
        return _Piece(all_ids, loss_mask, boundary, lossy)


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


def _first_loss(parts: list[tuple[str, str]], decoded: str) -> Lossy:
    """Where the decoded ids first differ from the text of a run, given as (author, text)."""
    at = first_difference("".join(text for _, text in parts), decoded)
    for author, text in parts:
        if at < len(text):
            return Lossy(author, at, text[at])
        at -= len(text)
    author, text = parts[-1]
    return Lossy(author, len(text), "")  # the ids decode to more than the text


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Index of the first difference of two sequences; the shorter length if one begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def cut(encoded: Example, max_length: int) -> Example:
    """The first `max_length` tokens. A cut answer gets no terminator: the model is not taught to stop there."""
    boundaries = tuple(b for b in encoded.token_boundaries if b < max_length)
    ids, loss_mask = encoded.ids[:max_length], encoded.loss_mask[:max_length]
    return replace(encoded, ids=ids, loss_mask=loss_mask, token_boundaries=boundaries)
