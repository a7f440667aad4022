"""Ids of words that recur, remembered, for tokenizers under which a text may be cut before spaces.

A byte-level tokenizer cuts a text into pieces by a regular expression and encodes each by itself. None of the known
expressions (GPT-2's, Llama 3's, Qwen's) has a match that reaches from a character that is no whitespace over a space,
and none looks beyond a piece, except past whitespace at its end. So the ids of a text are those of its parts, where
it is cut before spaces that follow such a character. NFC joins no space to what stands before it.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

Ids = list[int]
SPACE = " "
LONGEST = 48  # characters of a word that is remembered
MOST = 1 << 15  # words that are remembered


def cuts_before_spaces(rules: dict[str, Any], patterns: Sequence[str]) -> bool:
    """Whether the rules of a tokenizer.json are known to cut every text before spaces. `patterns`: the regular
    expressions that do."""
    cutter = rules.get("pre_tokenizer") or {}
    parts = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    found = [_kind(part, patterns) for part in parts]
    normalizer = rules.get("normalizer") or {}
    is_bpe = rules["model"].get("type", "BPE") == "BPE"
    return is_bpe and "words" in found and "other" not in found and normalizer.get("type") in (None, "NFC")


def _kind(part: dict[str, Any], patterns: Sequence[str]) -> str:
    """What a part of a pre-tokenizer does: cut into words, neither more nor less than that, or anything other."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return "words" if part.get("use_regex", True) else "bytes"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return "words" if (part.get("pattern") or {}).get("Regex") in patterns else "other"
    return "digits" if kind == "Digits" else "other"


def takes_whitespace(token: Any) -> bool:
    """Whether an added token (the library's) that is found in texts may reach over a space, or look at one."""
    look = not token.special and (token.lstrip or token.rstrip or token.single_word)
    return look or any(map(str.isspace, token.content))


class WordCache:
    """Ids of the words of texts. `encode`: ids of several texts, by the tokenizer's library."""

    def __init__(self, encode: Callable[[list[str]], list[Ids]]):
        self._encode = encode
        self._first: dict[str, Ids] = {}  # words that begin a text
        self._later: dict[str, Ids] = {}  # words after a space, without it

    def encode_all(self, texts: Sequence[str]) -> list[Ids | None]:
        """Ids of each text; None for one that must be encoded whole."""
        if len(self._first) + len(self._later) > MOST:
            self._first, self._later = {}, {}
        cut = [None if "  " in text else text.split(SPACE) for text in texts]
        self._learn(words for words in cut if words is not None)
        return [None if words is None else self._joined(words) for words in cut]

    def _learn(self, cut: Iterable[list[str]]) -> None:
        """Encode the words that are not known yet and may be."""
        first, later = self._first, self._later
        new: dict[str, tuple[dict[str, Ids], str]] = {}
        for begin, *rest in cut:
            if begin not in first and _is_word(begin):
                new[begin] = first, begin
            for word in rest:
                if word not in later and _is_word(word):
                    new[SPACE + word] = later, word
        spelt = list(new)
        for text, ids in zip(spelt, self._encode(spelt) if spelt else (), strict=True):
            known, word = new[text]
            known[word] = ids

    def _joined(self, words: list[str]) -> Ids | None:
        try:
            begin = self._first[words[0]]
            return [*begin, *chain.from_iterable(map(self._later.__getitem__, words[1:]))]
        except KeyError:
            return None


def _is_word(word: str) -> bool:
    """Whether what stands between spaces may be encoded by itself: whitespace at its end belongs to the next space."""
    return 0 < len(word) <= LONGEST and not word[-1].isspace()
