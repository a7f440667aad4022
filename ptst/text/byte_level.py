"""The bytes of a byte-level tokenizer's tokens: its vocabulary spells each byte as one printable letter, as GPT-2's."""

from collections.abc import Callable, Mapping

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = tuple(sorted(set(range(256)) - set(_PRINTABLE)))
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


class TokenBytes(dict[int, bytes]):
    """Bytes by token id, found out when they are first asked for. `literal`: added tokens that are text; `name_of`: the
    name of any other id."""

    def __init__(self, name_of: Callable[[int], str | None], literal: Mapping[int, str]):
        super().__init__()
        self._name_of, self._literal = name_of, literal

    def __missing__(self, number: int) -> bytes:
        name = self._name_of(number) or ""
        spelt = number not in self._literal and all(c in BYTE_OF for c in name)
        found = bytes(BYTE_OF[c] for c in name) if spelt else self._literal.get(number, name).encode()
        self[number] = found
        return found
