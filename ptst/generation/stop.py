"""The text of an answer as it grows, and stop strings, which may begin in one token and end in another.

`decode(prompt ids, answer ids)` gives an answer's text in its place. Decoding all of it anew for every token would cost
the square of its length, so only the tokens since the last whole character are decoded, behind a few as context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int], list[int]], str]

_REPLACEMENT = "\ufffd"  # what an unfinished character decodes to


def cut_at_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((at for s in stops if (at := text.find(s)) >= 0), default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    longest = 0
    for s in stops:
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest


class TextStream:
    """An answer's text, token by token."""

    CONTEXT = 8  # tokens decoded before the new ones, since a token's text may depend on its neighbours

    def __init__(self, decode: Decode, prompt: list[int], stops: Sequence[str]):
        self.decode, self.prompt, self.stops = decode, prompt, stops
        self.ids: list[int] = []
        self.text = ""
        self.read = 0  # tokens whose text is in `text`
        self.given = 0  # characters handed out

    def add(self, token: int) -> bool:
        """Take one more token; true if a stop string is now complete (`text` then ends before it)."""
        self.ids.append(token)
        return self._take(final=False)

    def finish(self) -> bool:
        """No token will follow: an unfinished character is taken as it is. True as in `add`."""
        return self._take(final=True)

    def news(self, final: bool) -> str:
        """Text that is certain and has not been handed out."""
        end = len(self.text) - (0 if final else held_back(self.text, self.stops))
        out = self.text[self.given : end]
        self.given = max(self.given, end)
        return out

    def _take(self, final: bool) -> bool:
        new = self.ids[self.read :]
        before = self.ids[max(0, self.read - self.CONTEXT) : self.read]
        if len(before) < self.CONTEXT:
            before = self.prompt[-self.CONTEXT :] + before
        whole = self.decode(before, new)
        if whole.endswith(_REPLACEMENT) and len(new) < 4 and not final:
            return False  # wait for the rest of the character, which has four bytes at most
        self.read = len(self.ids)
        begin = max(0, len(self.text) - max((len(s) - 1 for s in self.stops), default=0))
        self.text += whole
        at = cut_at_stop(self.text[begin:], self.stops)
        if at is None:
            return False
        self.text = self.text[: begin + at]
        return True
