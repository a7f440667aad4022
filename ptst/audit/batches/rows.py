"""The rows that foreign documents should be: every conversation in the forms that it may have, and which of them a
document is."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from ptst.audit.owner.forms import Form, OwnerForms
from ptst.audit.reference.formats import Reference, template_words
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.text.chat_template import ChatTemplate
from ptst.text.segments import Conversation

_WORDS = 8  # of a window by which a damaged document's row is found
_AT_ONCE = 512  # conversations in one call of the tokenizer
_UNANSWERED = UserError("the conversation ends without an assistant turn to train on")
_COMMON = 20  # rows: a window of more says nothing


class ExpectedRows:
    """Conversations as documents. `errors`: of those that the format cannot write."""

    def __init__(self, conversations: Sequence[Conversation], setup: Setup, template: ChatTemplate | None):
        self.conversations, self.setup = conversations, setup
        self.owner = None
        if template is not None and not setup.prompt_format.template.is_text:
            self.owner = OwnerForms(template, setup.prompt_format)
        self.errors: dict[int, UserError] = {}
        self._ids: list[bytes] = []
        self._masks: list[bytes] = []
        self._index: defaultdict[bytes, list[int]] = defaultdict(list)
        for start in range(0, len(conversations), _AT_ONCE):
            part = conversations[start : start + _AT_ONCE]
            answered = [c for c in part if c.answered]
            found = iter(setup.oracle.references(answered, setup.train_on))
            for row, conversation in enumerate(part, start):
                self._add(row, next(found) if conversation.answered else _UNANSWERED)

    def _add(self, row: int, found: Reference | UserError) -> None:
        if isinstance(found, UserError):
            self.errors[row] = found
            key, mask = b"", b""
        else:
            key, mask = _key(found.ids), bytes(found.loss_mask)
            self._index[key].append(row)
        self._ids.append(key)
        self._masks.append(mask)

    def ours(self, row: int) -> Form:
        """A row as our format writes it."""
        ids, mask = np.frombuffer(self._ids[row], np.int32).tolist(), list(map(bool, self._masks[row]))
        stops = self.setup.prompt_format.stop_ids
        ends = frozenset(i for i, (t, own) in enumerate(zip(ids, mask, strict=True)) if own and t in stops)
        return Form(ids, mask, ends)

    def forms(self, row: int) -> list[Form]:
        """A row in all forms that are right: ours, the folder's chat template's, and each without what follows the last
        terminator."""
        forms, stops = [self.ours(row), *self._owners(row)], self.setup.prompt_format.stop_ids
        short = []
        for f in forms:
            size = max((i + 1 for i, t in enumerate(f.ids) if t in stops), default=0)
            if 0 < size < len(f.ids):
                short.append(Form(f.ids[:size], f.loss_mask[:size], f.ends, f.name))
        return forms + short

    def _owners(self, row: int) -> list[Form]:
        if self.owner is None:
            return []
        conversation, setup = self.conversations[row], self.setup
        system, texts = template_words(conversation, setup.prompt_format)
        if setup.prompt_format.template.demonstration:
            return []  # the owner's template has no such turns
        wanted = [m.trained for m in conversation.turns if m.role == "assistant"]
        trained = [w and (setup.train_on == "all" or i + 1 == len(wanted)) for i, w in enumerate(wanted)]
        return self.owner.forms(system, texts, trained)

    @cached_property
    def _all_forms(self) -> dict[bytes, list[int]]:
        """Rows by the ids of their other forms; built when a document is not ours."""
        index: defaultdict[bytes, list[int]] = defaultdict(list)
        if self.owner is not None:
            self.owner.prepare({(c.system is not None, len(c.turns)) for c in self.conversations if c.answered})
        for row in range(len(self.conversations)):
            if row not in self.errors:
                for form in self.forms(row)[1:]:
                    if row not in index[key := _key(form.ids)]:
                        index[key].append(row)
        return index

    def exact(self, ids: Sequence[int]) -> list[int]:
        """The rows that these ids are, in any form."""
        key = _key(ids)
        return self._index.get(key) or self._all_forms.get(key, [])

    @cached_property
    def lengths(self) -> list[int]:
        """All lengths that a row has in our form, longest first."""
        return sorted({len(key) // 4 for key in self._index}, reverse=True)

    def begins(self, ids: Sequence[int]) -> tuple[list[int], int] | None:
        """The rows that ids begin with, and their length: the longest."""
        key = _key(ids)
        for length in self.lengths:
            if 4 * length <= len(key) and (rows := self._index.get(key[: 4 * length])):
                return rows, length
        return None

    def some_begins(self, ids: Sequence[int]) -> bool:
        """Whether any row begins with these ids."""
        key = _key(ids)
        return any(own.startswith(key) for own in self._ids)

    def likely(self, ids: list[int], expected: int) -> int | None:
        """The row that damaged ids are of: the expected one if most of its text is there, else the one with most text
        in common."""
        text = self.setup.prompt_format.tokenizer.decode(ids)
        if expected < len(self.conversations) and self._is_of(ids, text, expected):
            return expected
        votes: Counter[int] = Counter()
        words = _split(text)
        for size in range(1, _WORDS + 1):
            for start in range(len(words) - size + 1):
                for row in self._windows.get(" ".join(words[start : start + size]), ())[: _COMMON + 1]:
                    votes[row] += size
        best = votes.most_common(1)
        return best[0][0] if best else None

    def _is_of(self, ids: list[int], text: str, row: int) -> bool:
        """Whether a text has a row's question or half of its messages, or the ids begin as the row's."""
        contents = [m.content.strip() for m in self.conversations[row].turns]
        if contents and len(contents[0]) > 3 and contents[0] in text:
            return True
        there = sum(len(content) for content in contents if content and content in text)
        if 2 * there >= sum(map(len, contents)) > 0:
            return True
        own = np.frombuffer(self._ids[row], np.int32).tolist()
        same = next((i for i, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
        return same > 0.9 * len(ids)

    @cached_property
    def _windows(self) -> dict[str, list[int]]:
        """Rows by windows of the words of their messages."""
        index: defaultdict[str, list[int]] = defaultdict(list)
        for row, conversation in enumerate(self.conversations):
            for window in {w for m in conversation.turns for w in _windows_of(_split(m.content))}:
                index[window].append(row)
        return {window: rows for window, rows in index.items() if len(rows) <= _COMMON}


def _key(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _split(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


def _windows_of(words: list[str]) -> Iterator[str]:
    """A short message's words; of a longer one, a quarter of its windows."""
    if 0 < len(words) <= _WORDS:
        yield " ".join(words)
    for start in range(0, len(words) - _WORDS + 1, 4):
        yield " ".join(words[start : start + _WORDS])
