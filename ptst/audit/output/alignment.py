"""A training sequence and a test prompt aligned token by token: what both have, and what only one of them has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

from ptst.text.tokenizer import Tokenizer

_EXACT = 20_000_000  # pairs of tokens; beyond it, difflib leaves tokens that occur often out of its search
_CONTEXT = 64  # tokens before a token that its text may depend on
_LONGEST = 4  # tokens, as bytes, of one character of UTF-8


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens that both sequences have ("same"), or only the training sequence ("training"), only its answer
    ("answer", which the model samples at test time), or only the test prompt ("test"). `training` and `test`: index
    of its first token in each, or where it would be. `texts` has the text of each of `ids`."""

    kind: Literal["same", "training", "answer", "test"]
    training: int
    test: int
    ids: list[int]
    texts: list[str]


def align(training: Sequence[int], loss_mask: Sequence[bool], test: Sequence[int], by: Tokenizer) -> list[Stretch]:
    """The stretches of both, in order. The last answer is left out of the search: a prompt has none."""
    texts = {"training": token_texts(training, by), "test": token_texts(test, by)}
    answer = _last_answer(loss_mask)
    out: list[Stretch] = []

    def add(kind: Literal["same", "training", "answer", "test"], i: int, j: int, size: int) -> None:
        ids, first = (test, j) if kind == "test" else (training, i)
        own = texts["test" if kind == "test" else "training"]
        if size:
            out.append(Stretch(kind, i, j, list(ids[first : first + size]), own[first : first + size]))

    for i, j, size, left, right in _blocks(training[:answer], test):
        add("training", i - left, j - right, left)
        add("test", i, j - right, right)
        add("same", i, j, size)
    add("answer", answer, len(test), len(training) - answer)
    return out


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds. Of a character in several tokens, the first has it and the others have ""."""
    out: list[str] = []
    after: str | None = None
    for name, run in groupby(ids, tokenizer.control_names.get):
        run_ids = list(run)
        out += [name] * len(run_ids) if name is not None else _run_texts(run_ids, after, tokenizer)
        after = name
    return out


def _run_texts(ids: list[int], after: str | None, tokenizer: Tokenizer) -> list[str]:
    """The same for ids without control tokens, after the control token `after`."""
    out: list[str] = []
    start = 0  # the first token of a character that is not whole yet
    for end in range(1, len(ids) + 1):
        first = max(0, start - _CONTEXT)
        before = tokenizer.decode_text(ids[first:start], after)
        text = tokenizer.decode_text(ids[first:end], after)[len(before) :]
        if not text.endswith("\ufffd") or end - start == _LONGEST or end == len(ids):
            out += [text] + [""] * (end - start - 1)
            start = end
    return out


def _last_answer(loss_mask: Sequence[bool]) -> int:
    """Where the last run of trained tokens begins; the end where nothing is trained."""
    end = len(loss_mask)
    last = next((i for i in reversed(range(end)) if loss_mask[i]), end)
    return next((i + 1 for i in reversed(range(last)) if not loss_mask[i]), 0) if last < end else end


def _blocks(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Each block that both have: its start in `a` and in `b`, its size, and how many tokens just before it only `a` and
    only `b` have. The last is empty. A common beginning and end are found without a search."""
    shorter = min(len(a), len(b))
    head = next((n for n in range(shorter) if a[n] != b[n]), shorter)
    tail = next((n for n in range(shorter - head) if a[-1 - n] != b[-1 - n]), shorter - head)
    inner_a, inner_b = a[head : len(a) - tail], b[head : len(b) - tail]
    search = SequenceMatcher(None, inner_a, inner_b, autojunk=len(inner_a) * len(inner_b) > _EXACT)
    found = [(i + head, j + head, size) for i, j, size in search.get_matching_blocks() if size]
    blocks = [(0, 0, head), *found, (len(a) - tail, len(b) - tail, tail), (len(a), len(b), 0)]
    i_done = j_done = 0
    for i, j, size in blocks:
        yield i, j, size, i - i_done, j - j_done
        i_done, j_done = i + size, j + size
