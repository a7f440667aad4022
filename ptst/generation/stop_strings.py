"""The text of an answer as it grows, and stop strings, which may begin in one token and end in another.

`decode(prompt ids, answer ids)` gives the text of an answer. Decoding all of it for every token would cost the square
of its length, so only the tokens since the last complete character are decoded, after a few tokens of context. A
character may need several tokens (rare scripts, emoji), and each of them may end one character and begin the next.
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
    """An answer's text, token by token. In the end, it is the text of all tokens decoded at once."""

    CONTEXT = 8  # tokens decoded before the new ones, since a token's text may depend on its neighbours
    LONGEST = 16  # new tokens after which the older ones become context, although the newest is incomplete

    def __init__(self, decode: Decode, prompt: list[int], stop_strings: Sequence[str]):
        self.decode, self.prompt, self.stop_strings = decode, prompt, stop_strings
        self.token_ids: list[int] = []
        self.text = ""
        self.num_context = 0  # tokens that are only context for the next ones
        self.num_taken = 0  # characters of the tokens after these that are in `text`
        self.num_returned = 0  # characters that `new_text` has returned

    def add(self, token: int) -> bool:
        """Add a token; True if this completes a stop string (`text` then ends before it)."""
        self.token_ids.append(token)
        decoded = self._decode_from(self.num_context)
        # A character has at most four bytes, so that of an incomplete one at the end there are at most three.
        complete = max(len(decoded.rstrip(_REPLACEMENT)), len(decoded) - 3)
        new, self.num_taken = decoded[self.num_taken : complete], max(self.num_taken, complete)
        if self.num_taken == len(decoded):
            self.num_context, self.num_taken = len(self.token_ids), 0
        elif len(self.token_ids) - self.num_context > self.LONGEST:
            self.num_context = len(self.token_ids) - self.CONTEXT
            self.num_taken = max(0, self.num_taken + len(self._decode_from(self.num_context)) - len(decoded))
        return self._take(new)

    def finish(self) -> bool:
        """Take an incomplete last character as it is, since no token follows; True as for `add`."""
        self.text = self.decode(self.prompt, self.token_ids)
        return self._cut_at_stop(0)

    def new_text(self, final: bool) -> str:
        """Text not returned before; unless `final`, without what may be the beginning of a stop string."""
        end = len(self.text) - (0 if final else num_held_back(self.text, self.stop_strings))
        out = self.text[self.num_returned : end]
        self.num_returned = max(self.num_returned, end)
        return out

    def _decode_from(self, start: int) -> str:
        """The text of the tokens from this one on."""
        context = self.token_ids[max(0, start - self.CONTEXT) : start]
        if len(context) < self.CONTEXT:
            context = self.prompt[-self.CONTEXT :] + context
        return self.decode(context, self.token_ids[start:])

    def _take(self, new: str) -> bool:
        start = max(0, len(self.text) - max((len(s) - 1 for s in self.stop_strings), default=0))
        self.text += new
        return self._cut_at_stop(start)

    def _cut_at_stop(self, start: int) -> bool:
        stop = find_stop(self.text[start:], self.stop_strings)
        if stop is None:
            return False
        self.text = self.text[: start + stop]
        return True
