"""Ids of words that the oracle has met before, for tokenizers that encode what stands between spaces by itself.

The library takes most of the time of comparing millions of rows, and their words recur. Nothing here is shared with the
text layer, which remembers words too. A text is cut before each single space that follows a character other than
whitespace. No match of the expressions below reaches over such a place, and none depends on what is beyond it: a space
can only begin a match, and `\\s+(?!\\S)` ends before the last space in front of a letter in either case. That this
holds is also looked at: of every `EVERY` texts one is encoded whole as well, and where the two differ, nothing is cut.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

EVERY = 64  # texts, of which one is encoded whole as well
LONGEST = 64  # characters of a word; a text with a longer one is encoded whole
MOST = 1 << 16  # words that are remembered
AT_ONCE = 64  # texts in a call of the library, whose memory costs time with more
# A space behind something else than whitespace. Whitespace to Python is more than it is to the library, never less.
_CUT = re.compile(r" (?<=\S )")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {_GPT2, _LATER % "", _LATER % "{1,3}"}  # of GPT-2 and SmolLM2, of Qwen, of Llama 3

Encode = Callable[[list[str]], list[list[int]]]


def encodes_words(rules: Mapping[str, Any], added: Sequence[Any]) -> bool:
    """Whether the rules of a tokenizer.json are known to encode words by themselves. `added`: the library's added
    tokens, of which none that texts may become reaches over a space."""
    normalizer, first = rules.get("normalizer") or {"type": "NFC"}, rules.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", ()) if first.get("type") == "Sequence" else [first]
    kinds = {_kind(step) for step in steps}
    model = rules.get("model") or {}
    if normalizer.get("type") != "NFC" or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return False
    if "" in kinds or "words" not in kinds:
        return False
    return not any(_reaches(token) for token in added)


def _kind(step: Mapping[str, Any]) -> str:
    """Whether a step cuts a text into words, or what it makes within one; "" for others."""
    kind = step.get("type")
    if kind == "ByteLevel" and step.get("add_prefix_space") is False:
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return "words" if (step.get("pattern") or {}).get("Regex") in _EXPRESSIONS else ""
    return "digits" if kind == "Digits" else ""


def _reaches(token: Any) -> bool:
    looks = token.lstrip or token.rstrip or token.single_word
    return any(c.isspace() for c in token.content) or (looks and not token.special)


class WordIds:
    """Encodes texts by their words. `encode`: ids of several texts, by the library."""

    def __init__(self, encode: Encode):
        self._encode, self._known, self._number, self._holds = encode, dict[str, list[int]](), 0, True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        cut = [*map(_words, texts)] if self._holds else [[] for _ in texts]
        self._learn(cut)
        whole = [at for at, words in enumerate(cut) if not words]
        sampled = [at for at in range(-self._number % EVERY, len(texts), EVERY) if cut[at]]
        self._number += len(texts)
        known = self._known
        found = [[*chain.from_iterable(map(known.__getitem__, words))] for words in cut]
        for at, ids in zip((*whole, *sampled), self._library([texts[at] for at in (*whole, *sampled)]), strict=True):
            if cut[at] and found[at] != ids:
                self._holds = False
                return self._library(texts)
            found[at] = ids
        return found

    def _learn(self, cut: Sequence[Sequence[str]]) -> None:
        known = self._known
        if len(known) > MOST:
            known.clear()
        new = [*dict.fromkeys(word for words in cut for word in words if word not in known)]
        known.update(zip(new, self._library(new), strict=True))

    def _library(self, texts: Sequence[str]) -> list[list[int]]:
        parts = (self._encode([*texts[at : at + AT_ONCE]]) for at in range(0, len(texts), AT_ONCE))
        return [*chain.from_iterable(parts)]


def _words(text: str) -> list[str]:
    """A text in parts, each but the first with the space before it; none where one is too long."""
    first, *later = _CUT.split(text)
    words = [first, *(f" {word}" for word in later)]
    return words if len(text) <= LONGEST or max(map(len, words)) <= LONGEST else []
