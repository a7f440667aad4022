"""Every token of a row, as it stands in the batch: id, text, author, position, target; and the prompt at test time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Segment
from ptst.text.tokenizer import Tokenizer

# Whitespace made visible; other characters that do not print show as U+....
VISIBLE = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\x00": "\u2400"}
COLOURS = {"control": "magenta", "scaffold": "cyan", "system": "yellow", "user": "blue", "assistant": "green"}


@dataclass(frozen=True)
class TokenView:
    """One token of a batch. `target` is the id it must predict, None where nothing is; `trained` tells whether the
    token itself is predicted by the one before it. `token_boundary`: here an answer begins as a continuation."""

    index: int
    id: int
    text: str
    author: str
    document: int
    position: int
    trained: bool
    target: int | None
    token_boundary: bool


def visible(text: str) -> str:
    return "".join(VISIBLE.get(c, c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def authors(ids: Sequence[int], segments: Sequence[Segment], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text, author) of each token; a token that spans two authors is the one's who wrote more of it."""
    spans = [s.author for s in segments if not s.control for _ in s.text]
    out: list[tuple[str, str]] = []
    run: list[int] = []
    done, base = 0, 0  # characters of this run so far, and of the runs before it
    for token in ids:
        name = tokenizer.control_names.get(token)
        if name is not None:
            out.append((name, "control"))
            run, base, done = [], base + done, 0
            continue
        run.append(token)
        length = len(tokenizer.decode_text(run[-64:]))  # enough to see what this token adds
        before = len(tokenizer.decode_text(run[-64:-1])) if len(run) > 1 else 0
        text = tokenizer.decode_text(run[-64:])[before:length]
        said = spans[base + done : base + done + len(text)] or spans[-1:] or ["scaffold"]
        out.append((text, max(reversed(said), key=said.count)))
        done += len(text)
    return out


def view(
    batch: Batch,
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    prompt_format: PromptFormat,
    train_on: str,
) -> list[list[TokenView]]:
    """One list of tokens per document of the batch."""
    out = []
    for document, ((start, end), example) in enumerate(zip(pairwise(batch.cu_seqlens), examples, strict=True)):
        segments = prompt_format.segments(conversations[example.row], train_on)
        ids = batch.tokens[start:end]
        written = authors(ids, segments, prompt_format.tokenizer)
        flags = [False, *(t != IGNORE_INDEX for t in batch.labels[start : end - 1])]
        out.append(
            [
                TokenView(
                    index=i,
                    id=token,
                    text=text,
                    author=author,
                    document=document,
                    position=batch.position_ids[start + i],
                    trained=flags[i],
                    target=None if batch.labels[start + i] == IGNORE_INDEX else batch.labels[start + i],
                    token_boundary=i in example.token_boundaries,
                )
                for i, (token, (text, author)) in enumerate(zip(ids, written, strict=True))
            ]
        )
    return out


def table(tokens: Sequence[TokenView], title: str, marked: dict[int, str]) -> Table:
    """A row as a table. Trained tokens carry a star, so that the mask can be read without colour; `marked` are tokens
    with findings."""
    out = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, justify in (("token", "right"), ("id", "right"), ("text", "left"), ("author", "left")):
        out.add_column(name, justify=justify, overflow="fold")
    for name in ("document", "position", "trained", "target"):
        out.add_column(name, justify="right")
    out.add_column("")
    for t in tokens:
        text = Text(visible(t.text), style=("bold " if t.trained else "") + COLOURS[t.author])
        note = "; ".join(n for n in ("token-boundary" if t.token_boundary else "", marked.get(t.index, "")) if n)
        target = "" if t.target is None else str(t.target)
        cells = (str(t.index), str(t.id), text, t.author, str(t.document), str(t.position))
        out.add_row(*cells, "*" if t.trained else "", target, note)
    return out


@dataclass(frozen=True)
class Comparison:
    """A training sequence beside the prompt that is tested: `same` leading tokens, then both go on differently (or the
    prompt ends, and the model must answer)."""

    training: str
    prompt: str
    same: int
    prompt_tokens: int

    @property
    def is_prefix(self) -> bool:
        return self.same == self.prompt_tokens


def compare(training: Example, conversation: Conversation, test: PromptFormat) -> Comparison:
    prompt = test.encode(conversation.prompt()).ids
    same = next((i for i, (a, b) in enumerate(zip(training.ids, prompt, strict=False)) if a != b), None)
    same = min(len(prompt), len(training.ids)) if same is None else same
    return Comparison(test.tokenizer.decode(training.ids), test.tokenizer.decode(prompt), same, len(prompt))
