"""Every token of a row as the loss gets it: id, text, author, position, label; and the prompt at test time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.table import Table
from rich.text import Text

from ptst.audit.alignment import Stretch, align
from ptst.audit.setup import Setup
from ptst.data.packing import IGNORE_INDEX, to_batch
from ptst.text.encode import Example, first_difference
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Segment
from ptst.text.tokenizer import Tokenizer

# Whitespace made visible; other characters that do not print are shown as U+....
VISIBLE = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\x00": "\u2400"}
COLUMNS = ("token", "id", "text", "author", "document", "position", "trained", "label", "")
COLOURS = {"control": "magenta", "scaffold": "cyan", "system": "yellow", "user": "blue", "assistant": "green"}


@dataclass(frozen=True)
class TokenView:
    """One token of a batch. `label`: the id that it must predict, None where the loss ignores it. `trained`: it is
    itself the label of the token before. `token_boundary`: an answer begins here that was encoded as a continuation."""

    index: int
    id: int
    text: str
    author: str
    document: int
    position: int
    trained: bool
    label: int | None
    token_boundary: bool


def visible(text: str) -> str:
    """Text with whitespace and unprintable characters shown as signs."""
    return "".join(VISIBLE.get(c, c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def authors(ids: Sequence[int], segments: Sequence[Segment], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text, author) of each token; a token that spans two authors belongs to the one who wrote more of it."""
    spans = [s.author for s in segments if not s.control for _ in s.text]
    out: list[tuple[str, str]] = []
    done = 0  # characters
    after: str | None = None
    for name, run in groupby(ids, tokenizer.control_names.get):
        recent: list[int] = []
        before, after = after, name
        for token in run:
            if name is not None:
                out.append((name, "control"))
                continue
            recent = [*recent[-63:], token]  # enough to see what this token adds
            text = tokenizer.decode_text(recent, before)[len(tokenizer.decode_text(recent[:-1], before)) :]
            written = spans[done : done + len(text)] or spans[-1:] or ["scaffold"]
            out.append((text, max(reversed(written), key=written.count)))
            done += len(text)
    return out


def view(example: Example, conversation: Conversation, setup: Setup) -> list[TokenView]:
    """The tokens of one example, which is packed alone."""
    batch = to_batch([example])
    segments = setup.prompt_format.segments(conversation, setup.train_on)
    written = authors(batch.tokens, segments, setup.prompt_format.tokenizer)
    loss_mask = [False, *(label != IGNORE_INDEX for label in batch.labels[:-1])]
    labels = [None if label == IGNORE_INDEX else label for label in batch.labels]
    columns = zip(batch.tokens, written, batch.position_ids, loss_mask, labels, strict=True)
    return [
        TokenView(i, token, *words, 0, position, trained, label, token_boundary=i in example.token_boundaries)
        for i, (token, words, position, trained, label) in enumerate(columns)
    ]


def table(tokens: Sequence[TokenView], title: str, marked: Mapping[int, str], columns: int = len(COLUMNS)) -> Table:
    """A row as a table of the first `columns` columns. Trained tokens have a star, so that the loss mask can be read
    without colour; `marked`: tokens with findings, by rule."""
    out = Table(title=Text(title, style="table.title"), title_justify="left", box=None, pad_edge=False)
    for name in COLUMNS[:columns]:
        out.add_column(name, justify="left" if name in ("text", "author", "") else "right", overflow="fold")
    for t in tokens:
        text = Text(visible(t.text), style=("bold " if t.trained else "") + COLOURS[t.author])
        note = "; ".join(n for n in ("token-boundary" if t.token_boundary else "", marked.get(t.index, "")) if n)
        trained, label = "*" * t.trained, "" if t.label is None else str(t.label)
        cells = (str(t.index), str(t.id), text, t.author, str(t.document), str(t.position), trained, label, note)
        out.add_row(*cells[:columns])
    return out


@dataclass(frozen=True)
class Comparison:
    """A row as a training sequence and as a test prompt, decoded: the first `same` of `prompt_tokens` tokens agree.
    `aligned`: both token by token."""

    row: str
    train_template: str
    test_template: str
    training: str
    prompt: str
    same: int
    prompt_tokens: int
    aligned: list[Stretch]

    @property
    def is_prefix(self) -> bool:
        """Whether the prompt is a prefix of the training sequence."""
        return self.same == self.prompt_tokens

    @property
    def described(self) -> str:
        """In words."""
        prefix = "the prompt is a prefix of the training sequence"
        return prefix if self.is_prefix else f"they diverge at token {self.same}"


def compare(example: Example, conversation: Conversation, train: PromptFormat, test: PromptFormat) -> Comparison:
    """A training example beside its prompt at test time."""
    prompt = test.encode(conversation.prompt()).ids
    decode, same = test.tokenizer.decode, first_difference(example.ids, prompt)
    names = (conversation.source, train.template.name, test.template.name)
    aligned = align(example.ids, example.loss_mask, prompt, test.tokenizer)
    return Comparison(*names, decode(example.ids), decode(prompt), same, len(prompt), aligned)
