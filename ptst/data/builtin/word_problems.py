"""Grade-school word problems with worked answers, generated from a seed: the default data, without a download.

A problem comes from a family, one story with one order of operations (`word_problems.jsonl`). The training split and
the held-out splits (validation and test) have different families, so no story of an evaluation was seen in training.
Within a split no two problems share family and numbers, whatever the names in them.
"""

import operator
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from ptst.data.json_rows import TYPED, read_jsonl
from ptst.errors import UserError

SPLITS = ("train", "validation", "test")
NAMES = (
    *("Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kavya", "Liam", "Mei"),
    *("Nadia", "Omar", "Petra", "Quinn", "Rosa", "Samir", "Tara", "Uma", "Victor", "Wanda", "Yusuf", "Zoe"),
)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
_EQUATION = re.compile(r"\{?(\w+)\}? ([-+*/]) \{?(\w+)\}? = \{(\w)\}")


@dataclass(frozen=True)
class WordProblem:
    """A question and its worked answer, which ends in a line `#### N`."""

    family: str
    question: str
    answer: str
    value: int


@dataclass(frozen=True)
class Family:
    """A story: the ranges of its given numbers ("a:2-9 b:3-12"), its wordings, and the worked steps, whose equations
    define all other numbers. `{n}` and `{m}` are two names; the result is `r`, at least `least`."""

    name: str
    split: str
    ranges: str
    wordings: tuple[str, ...]
    steps: str
    least: int = 0

    def instances(self) -> Iterator[dict[str, int]]:
        """All numbers for which the equations hold without a remainder, in a fixed order."""
        letters, lows, highs = zip(*(re.split("[:-]", given) for given in self.ranges.split()), strict=True)
        definitions = self._definitions(letters)
        for given in product(*(range(int(a), int(b) + 1) for a, b in zip(lows, highs, strict=True))):
            numbers = dict(zip(letters, given, strict=True))
            for letter, left, sign, right in definitions:
                a, b = (numbers[x] if x in numbers else int(x) for x in (left, right))
                if sign == "/" and a % b:
                    break
                numbers[letter] = _OPERATORS[sign](a, b)
            else:
                if numbers["r"] >= self.least:
                    yield numbers

    def _definitions(self, given: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
        """The equations as (letter, operand, operator, operand), in an order in which the operands are known; one
        without its first operand is solved for it."""
        known, definitions = set(given), []
        equations = _EQUATION.findall(self.steps)
        while equations:
            for equation in equations:
                left, sign, right, result = equation
                if left in known or left.isdigit():
                    definition = (result, left, sign, right)
                else:
                    definition = (left, result, _INVERSE[sign], right)
                if all(x in known or x.isdigit() for x in definition[1::2]):
                    break
            definitions.append(definition)
            known.add(definition[0])
            equations.remove(equation)
        return definitions

    def problem(self, numbers: dict[str, int], rng: random.Random) -> WordProblem:
        n, m = rng.sample(NAMES, 2)
        words = {**numbers, "n": n, "m": m}
        question = rng.choice(self.wordings).format(**words)
        return WordProblem(self.name, question, f"{self.steps.format(**words)}\n#### {numbers['r']}", numbers["r"])


@cache
def families(split: str) -> tuple[Family, ...]:
    """The families of a split. Raises UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}", "there are train, validation and test")
    rows = (row for _, row in read_jsonl(Path(__file__).with_name("word_problems.jsonl"), TYPED))
    wanted = "train" if split == "train" else "held-out"
    return tuple(Family(**{**row, "wordings": tuple(row["wordings"])}) for row in rows if row["split"] == wanted)


@cache
def _space(split: str) -> dict[str, list[dict[str, int]]]:
    """All numbers of every family that belong to a split. A checksum of family and numbers separates validation from
    test, so that no seed can bring one problem into both."""

    def belongs(name: str, numbers: dict[str, int]) -> bool:
        validation = zlib.crc32(f"{name}{sorted(numbers.items())}".encode()) % 3 == 0
        return split == "train" or validation == (split == "validation")

    return {f.name: [numbers for numbers in f.instances() if belongs(f.name, numbers)] for f in families(split)}


def generate(split: str, count: int, seed: int = 0) -> list[WordProblem]:
    """`count` problems of a split ("train", "validation", "test"), families in turn; the same for the same seed. Raises
    UserError for an unknown split, a count below 1, and more problems than there are."""
    pool = {name: list(numbers) for name, numbers in _space(split).items()}
    size = sum(map(len, pool.values()))
    if not 1 <= count <= size:
        raise UserError(f"{count} word problems were asked for", f"the {split} split has 1 to {size}")
    rng = random.Random(seed * 3 + SPLITS.index(split))
    for numbers in pool.values():
        rng.shuffle(numbers)
    problems: list[WordProblem] = []
    while len(problems) < count:
        turn = [f for f in families(split) if pool[f.name]]
        rng.shuffle(turn)
        for family in turn[: count - len(problems)]:
            problems.append(family.problem(pool[family.name].pop(), rng))
    return problems
