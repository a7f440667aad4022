"""A family of word problems: a story, the ranges of its numbers, its wordings and its worked steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


def suits(good: bool, **derived: int) -> dict[str, int] | None:
    """What follows from a choice of numbers, or None where the choice does not suit the story."""
    return derived if good else None
