"""Every token of a row as the loss gets it: id, text, author, position, label; and the prompt at test time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from rich.table import Table
from rich.text import Text

from ptst.audit.causes.stretches import stretches, token_texts
from ptst.audit.output.alignment import Stretch, align
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.data.packing import IGNORE_INDEX, to_batch
from ptst.errors import UserError
from ptst.text.encode import Example, first_difference
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.tokenizer import Tokenizer

# Whitespace made visible; other characters that do not print are shown as U+....
VISIBLE = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\x00": "\u2400"}
COLUMNS = ("token", "id", "text", "author", "document", "position", "trained", "label", "")
MAX_ALIGNED = 4_000_000  # tokens of a document times tokens of its row, between their common ends
MIN_ALIGNED = 3  # fewer equal tokens in a row may be so by chance
COLOURS = {
    "unknown": "red",
    "control": "magenta",
    "scaffold": "cyan",
    "system": "yellow",
    "user": "blue",
    "assistant": "green",
}


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


def view(
    example: Example, conversation: Conversation, setup: Setup, reference: Reference | None = None
) -> list[TokenView]:
    """The tokens of one example, which is packed alone. `reference`: what it must be; built here if not given."""
    batch = to_batch([example])
    tokenizer = setup.prompt_format.tokenizer
    written = words(batch.tokens, reference or _reference(conversation, setup), tokenizer)
    loss_mask = [False, *(label != IGNORE_INDEX for label in batch.labels[:-1])]
    labels = [None if label == IGNORE_INDEX else label for label in batch.labels]
    columns = zip(batch.tokens, written, batch.position_ids, loss_mask, labels, strict=True)
    return [
        TokenView(i, token, *told, 0, position, trained, label, token_boundary=i in example.token_boundaries)
        for i, (token, told, position, trained, label) in enumerate(columns)
    ]


def _reference(conversation: Conversation, setup: Setup) -> Reference | None:
    """What a conversation must be: of one without an answer, any answer's beginning. None where there is none."""
    answer = () if conversation.answered else (Message("assistant", "a"),)
    whole = replace(conversation, messages=(*conversation.messages, *answer))
    try:
        return setup.oracle.reference(whole, setup.train_on)
    except UserError:
        return None


def words(ids: Sequence[int], reference: Reference | None, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text, author) of each token. Tokens that are not the reference's have the author of the token that they are
    aligned with, or are unknown. Of a character in several tokens the first shows it, and the others nothing."""
    known = [] if reference is None else [*zip(reference.texts, reference.authors, strict=True)]
    if reference is not None and list(ids) == reference.ids[: len(ids)]:
        return known[: len(ids)]
    same = {} if reference is None else _aligned(ids, reference.ids)
    out: list[tuple[str, str]] = []
    after: str | None = None
    for stretch in stretches(ids, tokenizer):
        texts = [stretch.text]
        if stretch.control is None:
            texts = token_texts(ids[stretch.start : stretch.end], tokenizer, after)
        for i, text in enumerate(texts, stretch.start):
            author = "control" if stretch.control is not None else "unknown"
            out.append((text, known[same[i]][1] if i in same and author == "unknown" else author))
        after = stretch.control
    return out


def _aligned(ids: Sequence[int], expected: Sequence[int]) -> dict[int, int]:
    """Indices of `ids` with those of the same tokens in `expected`."""
    first = first_difference(ids, expected)
    last = first_difference(ids[: first - 1 if first else None : -1], expected[: first - 1 if first else None : -1])
    same = {i: i for i in range(first)} | {len(ids) - i: len(expected) - i for i in range(1, last + 1)}
    middle, other = ids[first : len(ids) - last], expected[first : len(expected) - last]
    if len(middle) * len(other) <= MAX_ALIGNED:
        for a, b, size in SequenceMatcher(None, middle, other, autojunk=False).get_matching_blocks():
            same |= {first + a + i: first + b + i for i in range(size) if size >= MIN_ALIGNED}
    return same


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
