"""Grade-school word problems with worked answers, made from a seed: the default data, which need no download.

A problem comes from a family (one story with one order of operations). Training draws from one set of families, the
held-out splits from another, so that what is measured is not a story seen in training. Within a split no two problems
share family and numbers, whatever the names in them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

NAMES = (
    *("Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kavya", "Liam", "Mei"),
    *("Nadia", "Omar", "Petra", "Quinn", "Rosa", "Samir", "Tara", "Uma", "Victor", "Wanda", "Yusuf", "Zoe"),
)


@dataclass(frozen=True)
class WordProblem:
    """A question and its worked answer, which ends in a line `#### N`."""

    family: str
    question: str
    answer: str
    value: int


@dataclass(frozen=True)
class Family:
    """A story: ranges of its numbers ("a:2-9 b:3-12"), what follows from them (None: these numbers do not suit), its
    wordings, and the worked steps. `{n}` and `{m}` are two names; the result is `r`."""

    name: str
    ranges: str
    derive: Callable[..., dict[str, int] | None]
    wordings: tuple[str, ...]
    steps: str

    def instances(self) -> Iterator[dict[str, int]]:
        """All suitable choices of numbers, with what follows from them, in a fixed order."""
        letters, spans = [], []
        for item in self.ranges.split():
            letter, _, span = item.partition(":")
            low, _, high = span.partition("-")
            letters.append(letter)
            spans.append(range(int(low), int(high) + 1))
        for numbers in product(*spans):
            given = dict(zip(letters, numbers, strict=True))
            derived = self.derive(**given)
            if derived is not None and derived["r"] >= 0:
                yield {**given, **derived}

    def problem(self, numbers: dict[str, int], rng: random.Random) -> WordProblem:
        n, m = rng.sample(NAMES, 2)
        words = {**numbers, "n": n, "m": m}
        question = rng.choice(self.wordings).format(**words)
        return WordProblem(self.name, question, f"{self.steps.format(**words)}\n#### {numbers['r']}", numbers["r"])


@cache
def families(split: str) -> tuple[Family, ...]:
    """The families of a split. Raises ValueError for an unknown split."""
    # Imported here because the tables are made of this module's Family.
    from ptst.data.word_problems_held_out import HELD_OUT
    from ptst.data.word_problems_train import TRAIN

    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; there are train, validation and test")
    return TRAIN if split == "train" else HELD_OUT


@cache
def _space(split: str) -> dict[str, list[dict[str, int]]]:
    """All numbers of every family that belong to a split. A checksum of family and numbers parts validation from test,
    so no seed can ever bring one problem into both."""
    space = {}
    for family in families(split):
        numbers = list(family.instances())
        if split != "train":
            wanted = split == "validation"
            numbers = [
                x for x in numbers if (zlib.crc32(f"{family.name}{sorted(x.items())}".encode()) % 3 == 0) == wanted
            ]
        space[family.name] = numbers
    return space


def generate(split: str, count: int, seed: int = 0) -> list[WordProblem]:
    """`count` problems of a split ("train", "validation", "test"), families in turn; the same for the same seed.

    Raises ValueError for an unknown split, a count below 1, and more problems than there are.
    """
    pool = {name: list(numbers) for name, numbers in _space(split).items()}
    size = sum(map(len, pool.values()))
    if not 1 <= count <= size:
        raise ValueError(f"{count} word problems were asked for; the {split} split has 1 to {size}")
    rng = random.Random(seed * 3 + ("train", "validation", "test").index(split))
    for numbers in pool.values():
        rng.shuffle(numbers)
    problems: list[WordProblem] = []
    while len(problems) < count:
        turn = [f for f in families(split) if pool[f.name]]
        rng.shuffle(turn)
        for family in turn[: count - len(problems)]:
            problems.append(family.problem(pool[family.name].pop(), rng))
    return problems
