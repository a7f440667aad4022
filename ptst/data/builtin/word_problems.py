"""Grade-school word problems with worked answers, generated from a seed: the default data, without a download.

A problem comes from a family (one story with one order of operations). The training split and the held-out splits
(validation and test) have different families, so no story of an evaluation was seen in training. Within a split no two
problems share family and numbers, whatever the names in them.
"""

from __future__ import annotations

import random
import zlib
from functools import cache

from ptst.data.builtin.word_problem_family import Family, WordProblem
from ptst.data.builtin.word_problems_held_out import HELD_OUT
from ptst.data.builtin.word_problems_train import TRAIN
from ptst.errors import UserError


@cache
def families(split: str) -> tuple[Family, ...]:
    """The families of a split. Raises UserError for an unknown split."""
    if split not in ("train", "validation", "test"):
        raise UserError(f"unknown split {split!r}", "there are train, validation and test")
    return TRAIN if split == "train" else HELD_OUT


@cache
def _space(split: str) -> dict[str, list[dict[str, int]]]:
    """All numbers of every family that belong to a split. A checksum of family and numbers separates validation from
    test, so that no seed can bring one problem into both."""

    def belongs(family: Family, numbers: dict[str, int]) -> bool:
        checksum = zlib.crc32(f"{family.name}{sorted(numbers.items())}".encode())
        return split == "train" or (checksum % 3 == 0) == (split == "validation")

    return {f.name: [numbers for numbers in f.instances() if belongs(f, numbers)] for f in families(split)}


def generate(split: str, count: int, seed: int = 0) -> list[WordProblem]:
    """`count` problems of a split ("train", "validation", "test"), families in turn; the same for the same seed.

    Raises UserError for an unknown split, a count below 1, and more problems than there are.
    """
    pool = {name: list(numbers) for name, numbers in _space(split).items()}
    size = sum(map(len, pool.values()))
    if not 1 <= count <= size:
        raise UserError(f"{count} word problems were asked for", f"the {split} split has 1 to {size}")
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
