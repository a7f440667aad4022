"""The text of an answer as it grows, and stop strings, which may begin in one token and end in another.

`decode(prompt ids, answer ids)` gives the text of an answer. Decoding all of it for every token would cost the square
of its length, so only the tokens since the last complete character are decoded, after a few tokens of context.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int], list[int]], str]

_REPLACEMENT = "\ufffd"  # an incomplete character decodes to this


def find_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((start for s in stop_strings if (start := text.find(s)) >= 0), default=None)


def num_held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Number of characters at the end that may be the beginning of a stop string."""
    longest = 0
    for s in stop_strings:
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest


class TextStream:
    """An answer's text, token by token."""

    CONTEXT = 8  # tokens decoded before the new ones, since a token's text may depend on its neighbours

    def __init__(self, decode: Decode, prompt: list[int], stop_strings: Sequence[str]):
        self.decode, self.prompt, self.stop_strings = decode, prompt, stop_strings
        self.token_ids: list[int] = []
        self.text = ""
        self.num_decoded = 0  # tokens whose text is in `text`
        self.num_returned = 0  # characters that `new_text` has returned

    def add(self, token: int) -> bool:
        """Add a token; True if this completes a stop string (`text` then ends before it)."""
        self.token_ids.append(token)
        return self._decode_new(final=False)

    def finish(self) -> bool:
        """Take an incomplete last character as it is, since no token follows; True as for `add`."""
        return self._decode_new(final=True)

    def new_text(self, final: bool) -> str:
        """Text not returned before; unless `final`, without what may be the beginning of a stop string."""
        end = len(self.text) - (0 if final else num_held_back(self.text, self.stop_strings))
        out = self.text[self.num_returned : end]
        self.num_returned = max(self.num_returned, end)
        return out

    def _decode_new(self, final: bool) -> bool:
        new = self.token_ids[self.num_decoded :]
        context = self.token_ids[max(0, self.num_decoded - self.CONTEXT) : self.num_decoded]
        if len(context) < self.CONTEXT:
            context = self.prompt[-self.CONTEXT :] + context
        piece = self.decode(context, new)
        if piece.endswith(_REPLACEMENT) and len(new) < 4 and not final:
            return False  # wait for the rest of the character, which has four bytes at most
        self.num_decoded = len(self.token_ids)
        start = max(0, len(self.text) - max((len(s) - 1 for s in self.stop_strings), default=0))
        self.text += piece
        stop = find_stop(self.text[start:], self.stop_strings)
        if stop is None:
            return False
        self.text = self.text[: start + stop]
        return True
