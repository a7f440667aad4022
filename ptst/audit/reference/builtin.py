"""The built-in word problems, checked without their generator: the rows of the default counts by pinned digests, all
others by their stories.

A row fits a story of `word_problems.jsonl` if it has the words of one wording and of the worked steps around the same
numbers; its equations hold, its split is that of the story and of its numbers, and no story comes twice with the same
numbers.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding
from ptst.audit.reference.files import file_rows

if TYPE_CHECKING:
    from ptst.data.sources import Source

BUILT_IN = "word-problems"
DEFAULT_COUNTS = {"train": 400, "validation": 32, "test": 100}
# Four hex digits of each row's sha256, in order.
_DIGESTS = {
    "train": (
        "5f6b8b80015e5d91be3342239a4e05b42e1903b3366d77e68d61168907d0ac299efaa37e73441f353324fb1239a3729fd845"
        "4a2989aac2b59711ac80a340108b0d910ce62a705c4302c0335dce8c66c477d6fce00bda08715601236c2f05b05432e40304"
        "b4daaa68fc54a60797f1101ac7819c35f731e8f9a506995c8841d5c01da362efb7febfee32444980f3792e612e4bb07b1d2c"
        "16f500e92a676ecceae7e5ad04d9081a7ccf2eb3c51f58f642848184a32c8864b7761c7fd8f084427ebc3d43a520a4583371"
        "873bb3af76821f038067b2c88dde2bd494ae9cedce9cffa62a1b5a72253e2d648a01b067f8036d43ad28ced83428a35ac770"
        "1aff1036aad05490957eb733787257de353026eae2e1c1eeff32b02003f7d3e9cac12e58422a21d555c0b7e905b3cf70e71b"
        "51b3ad856e24ca6282f2ee33f3d45d9aaac7cd0db7cffaae26474967a93f336be1c04c0377b6647764f24cd51751fea3b1d8"
        "0b6cf1692896ef548a932f94924f24c169c26a6a33c22bd7d7f29b92588befdaa0af7ad23e8b08ecba56f70fdf8ccead9f28"
        "3312b4ba095f3b72236ceb5ff4d959cc46fc7a6dcd78c83fa255fa655a4119343d27a32339de54aafdc42de2220025521db9"
        "2eba05ea8e4e60a5db54b4cfe7483edbc85fa89544ccf18d87a5edc3fed664d254bd81fcc70e3387203e183a4435058e12b1"
        "cc1dfa92b09fac5882f3beb9b08dd9cf5f858d0af7de86f4b7aa2853c5470c32aca0508e937c80fa84603cf433183f252cff"
        "6f22cc9c512d60505f56f8cb28f91ac72fd7b052708e0dacc613c29be3741beac786a2a99d4e731a849e28fa8a9171f29b24"
        "313c2b645f5374a7f60d39b26efcc3a59e60e4a0ed399e87c5cf39b8ba4580a0de7493f0b9cae645add07931f51a5fad7e57"
        "197f6122c861e5e180d99492909a306030609c91bacf4ae7dae29338b15011e4b32c124a0507649b6fccb4d5edec8b7f1fbf"
        "dae25702c4e87224cc00574fc692b666f64de75bb87060f9159838ed0d781e790a1de0dd0ef2bb9acf48825e421eb9d678aa"
        "3c2f6ab8353429ad5c85008594e16ae062e162caf59f8b68ea17fb7a528f1d8b63c161562587aa2d85fb6f0ddaad573d64c8"
    ),
    "validation": (
        "c91aaeeef358e2929285146a6931934cf688341191d678de0fcfd08d82bef8d054a6b39fe52e8e71a0bfabc65f644d057e1b"
        "89a2f6f365f87561871748d250bd"
    ),
    "test": (
        "ccc729b93c6067ecaca6830ad06e60b5d76af41c1a66a1a25e8eae75e606276d199e2d769d413177f6d2111f138485ed3a5d"
        "ab04ceb205359894252f70085698dd59107fae9a710822d3683c46a2b8de76a339d97510688e0cb562f83b2462fd7a054e2b"
        "e528c6247a45233ef08c53cdd1b45bad7cec62104f90e06ed83b69b45673a38764ba81f093648d5a8140f0b0274bae9cfb53"
        "bab4fb6144a0a6ac19614dd1164ec5b4b9cb7297af20e1e9f1f15941922d7dbcee336bbdf06185e4d6f0ff8d02079d53ec8a"
    ),
}
_STORIES = Path(__file__).parents[2] / "data/builtin/word_problems.jsonl"
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def check_word_problems(source: "Source", name: str, split: str, limit: int | None) -> Iterator[Finding]:
    """Compare the word problems `name` (`word-problems` or `word-problems:N`) with what they must be."""
    count = limit or int(name.partition(":")[2] or DEFAULT_COUNTS[split])
    if len(source.conversations) != count:
        cause = f"{count} problems were asked for, and there are {len(source.conversations)}"
        rule = "row-lost" if len(source.conversations) < count else "row-twice"
        yield Finding(rule, name, cause, expected=str(count), seen=str(len(source.conversations)))
    if source.family != "gsm8k":
        yield Finding("family-differs", "", "the word problems are of the family gsm8k", seen=source.family)
    pinned, seen = _DIGESTS[split], dict[object, str]()
    for number, conversation in enumerate(source.conversations):
        place = f"{BUILT_IN}/{split}:{number + 1}"
        if conversation.source != place:
            yield Finding("row-unknown", conversation.source, f"{place} belongs here")
        messages = [(m.role, m.content, m.trained) for m in conversation.messages]
        texts = [text for _, text, _ in messages]
        story = _story(texts, split) if len(texts) == 2 else None
        digest, wanted = row_digest(texts), pinned[4 * number : 4 * number + 4]
        roles = [("user", True), ("assistant", True)]
        if story is None or [m[::2] for m in messages] != roles or (wanted and digest != wanted):
            cause = f"the problem is not number {number + 1} of the {split} split"
            yield Finding("row-differs", conversation.source, cause, seen=repr(texts[-1][-40:]) if texts else "")
        elif story in seen:
            yield Finding("row-twice", conversation.source, f"the same story and numbers as {seen[story]}")
        seen.setdefault(story, conversation.source)


def row_digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:4]


def _story(texts: list[str], split: str) -> tuple[str, str] | None:
    """The story that question and answer tell, and its numbers; None where they fit none of the split, an equation is
    wrong, or the numbers belong to another split."""
    whole = "\0".join(texts)
    stories = _patterns("train" if split == "train" else "held-out")
    name, found = next(((name, m) for name, pattern in stories if (m := pattern.fullmatch(whole))), ("", None))
    if found is None:
        return None
    for left, sign, right, result in _EQUATION.findall(texts[1]):
        a, b, c = int(left), int(right), int(result)
        if c != {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else None}[sign]:
            return None
    numbers = sorted((letter, int(value)) for letter, value in found.groupdict().items() if value.isdecimal())
    validation = zlib.crc32(f"{name}{numbers}".encode()) % 3 == 0
    return (name, str(numbers)) if split == "train" or validation == (split == "validation") else None


@cache
def _patterns(split: str) -> list[tuple[str, re.Pattern[str]]]:
    """For each story of a split, its wordings with their worked steps."""
    rows = [row.cells or {} for row in file_rows(_STORIES)]
    return [
        (row["name"], _pattern(f"{wording}\0{row['steps']}\n#### {{r}}"))
        for row in rows
        if row["split"] == split
        for wording in row["wordings"]
    ]


def _pattern(text: str) -> re.Pattern[str]:
    """A text with {letters}: n and m are names, the others numbers, and a letter has one value."""
    pattern, known = "", set[str]()
    for i, part in enumerate(re.split(r"\{(\w)\}", text)):
        if i % 2 == 0:
            pattern += re.escape(part)
        elif part in known:
            pattern += f"(?P={part})"
        else:
            known.add(part)
            pattern += rf"(?P<{part}>{'[A-Z][a-z]+' if part in 'nm' else '[0-9]+'})"
    return re.compile(pattern)
