"""A grader's prompt: its owner's words, and the texts that are judged.

The two are never mixed up: judged text is put in as it is, never formatted, and each part of the prompt knows whose it
is, so that names of control tokens count in the owner's words alone. Judged text that spells a mark by which the
grader's own prompt tells its parts apart (`[/INST]`, `<END CONVERSATION>`) gets a space into that mark: it cannot end
its part.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Self

from ptst.text.segments import Message


class Filled(str):
    """A prompt as text, which knows its parts: (text, whether it is judged). `broken`: marks that were broken in it."""

    parts: tuple[tuple[str, bool], ...]
    broken: tuple[str, ...]

    def __new__(cls, parts: Sequence[tuple[str, bool]], broken: Sequence[str] = ()) -> Self:
        new = super().__new__(cls, "".join(text for text, _ in parts))
        new.parts, new.broken = tuple(parts), tuple(broken)
        return new

    def without(self, marks: Collection[str]) -> "Filled":
        """The same prompt with these marks broken in what is judged."""
        found = [mark for mark in marks if any(judged and mark in text for text, judged in self.parts)]
        parts = [(_broken(text, found) if judged else text, judged) for text, judged in self.parts]
        return Filled(parts, (*self.broken, *found))


# A `str` is the whole text in the grader's own spelling, control tokens by name in its owner's parts (a plain `str` has
# no such parts); messages go through the chat format of a model folder, or to an API.
GraderPrompt = str | tuple[Message, ...]


class Question(str):
    """A request that comes with a reference answer, for graders that compare with one."""

    reference: str

    def __new__(cls, text: str, reference: str) -> Self:
        new = super().__new__(cls, text)
        new.reference = reference
        return new


def fill(template: str, marks: Collection[str] = (), **judged: str) -> Filled:
    """The template with `{name}` replaced by each judged text, as it is but for `marks`."""
    parts = []
    for i, piece in enumerate(re.split("{(" + "|".join(judged) + ")}", template)):
        parts.append((judged[piece], True) if i % 2 else (piece, False))
    return Filled(parts).without(marks)


def broken_marks(prompt: GraderPrompt) -> list[str]:
    """The marks that were broken in what is judged."""
    texts = [m.content for m in prompt] if isinstance(prompt, tuple) else [prompt]
    return list(dict.fromkeys(mark for text in texts if isinstance(text, Filled) for mark in text.broken))


def without_marks(prompt: GraderPrompt, marks: Collection[str]) -> GraderPrompt:
    """The prompt, or each of its messages, with these marks broken in what is judged."""
    if isinstance(prompt, tuple):
        return tuple(replace(m, content=_without(m.content, marks)) for m in prompt)
    return _without(prompt, marks)


def _without(text: str, marks: Collection[str]) -> str:
    return text.without(marks) if isinstance(text, Filled) else text


def _broken(text: str, marks: Collection[str]) -> str:
    for mark in marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
