"""The bytes that each token stands for, without its neighbours: a place in a text is a token's index then, also where a
character is several tokens."""

from itertools import accumulate

from ptst.text.tokenizer import Tokenizer

MARK = b"\xff"  # around the name of a control token; no byte of UTF-8


def _letters() -> dict[str, int]:
    """Byte by letter, as byte-level tokenizers (GPT-2's and most after it) spell bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenBytes:
    """A tokenizer's tokens as bytes. `meant`: the control tokens that a chat format has (None: all); others, such as
    those around a model's reasoning, are as text."""

    def __init__(self, tokenizer: Tokenizer, meant: frozenset[str] | None = None):
        self.tokenizer = tokenizer
        self._names = {i: name for name, i in tokenizer.tokens.items()}
        self._letters = _letters()
        spaced = [name[:1] for name in self._names.values()]  # a space, as each kind of tokenizer writes it
        self._byte_level = spaced.count("\u0120") > spaced.count("\u2581")
        names = tokenizer.control_names
        self._known = {i: marked(n) if meant is None or n in meant else n.encode() for i, n in names.items()}

    def of(self, token: int) -> bytes:
        """The bytes of one token; of a control token its name between marks; none of an unknown id."""
        if (found := self._known.get(token)) is None:
            found = self._known[token] = self._spell(self._names.get(token, ""))
        return found

    def _spell(self, name: str) -> bytes:
        if self._byte_level and all(c in self._letters for c in name):
            return bytes(self._letters[c] for c in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode(errors="replace")

    def document(self, ids: list[int]) -> tuple[bytes, list[int]]:
        """A document's bytes, and where each token begins in them. The dummy space of each run of text is left out."""
        pieces, after = [], None
        begins = True
        for token in ids:
            name = self.tokenizer.control_names.get(token)
            piece = self.of(token)
            if begins and name is None and piece[:1] == b" " and not self._byte_level:
                decoded = self.tokenizer.decode_text([token], after)
                piece = piece if decoded[:1] == " " else piece[1:]
            pieces.append(piece)
            begins, after = name is not None, name or after
        return b"".join(pieces), [0, *accumulate(map(len, pieces))][:-1]


def marked(name: str) -> bytes:
    return MARK + name.encode() + MARK
