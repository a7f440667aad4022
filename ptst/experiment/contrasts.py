"""Contrasts of a grid's cells: the one named beforehand, and others after Holm.

Between cells the seed is the unit, and prompts are a sample, too (ptst/evaluation/statistics.py). The contrast: trained
and tested with a safety prompt, against tested with it only. Its measure is the non-refusal rate on topic: a model that
answers every request with arithmetic is broken, not unsafe.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ptst.defenses.config import NONE
from ptst.errors import UserError
from ptst.evaluation.statistics import Cell as Outcomes
from ptst.evaluation.statistics import Contrast, holm, paired_contrast, ptst_contrast
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import base
from ptst.experiment.grid import Grid

MEASURE = "the attack success rate on harmful requests"
PURE, SAFE = "chat:vanilla", "chat:llama"  # the paper's recommended pair, where a grid has it
Table = Outcomes | dict[int, float] | None


class Key(NamedTuple):
    """A line of the summary: a model over its seeds, under a test template."""

    train: str
    epochs: float | None
    test: str
    defense: str = NONE


def contrasts(grid: Grid, tables: Mapping[Key, Mapping[str, Mapping[str, Table]]]) -> dict[str, Any]:
    """The contrast named beforehand, after the last of `at_epochs`, and all others against the cell trained and tested
    with the safety prompt, with Holm's correction."""
    safe = [n for n, (t, _) in grid.train_templates.items() if t.safety and n in grid.test_templates]
    pure = [n for n, (t, _) in grid.train_templates.items() if not t.safety]
    task = next((t for t in grid.tasks if base(t) == "safety"), None)  # of several sets, the first
    needed = {
        "no training template with a safety prompt that is also a test template": safe,
        "no training template without one": pure,
        "no task safety": task,
    }
    missing = [words for words, found in needed.items() if not found]
    if missing or task is None:
        sentence = f"The contrast cannot be computed: this grid has {' and '.join(missing)}."
        return {"contrast": {"sentence": sentence, "named": False, "effect": None}, "others": {}}
    prompt, plain = SAFE if SAFE in safe else safe[0], PURE if PURE in pure else pure[0]
    last = max(grid.config.at_epochs, default=None)

    def asr(train: str, test: str) -> Outcomes:
        table = tables[Key(train, last, test)][task][ASR]
        assert isinstance(table, Outcomes)
        return table

    both = asr(prompt, prompt)
    names = (f"{prompt} -> {prompt}", f"{plain} -> {prompt}")
    # Other templates take its place where a grid lacks the paper's pair.
    named: dict[str, Any] = {"measure": MEASURE, "task": task, "cells": list(names)}
    named["named"] = (prompt, plain) == (SAFE, PURE)
    try:
        contrast, sentence = ptst_contrast(both, asr(plain, prompt), MEASURE, names)
        named |= {"sentence": sentence, **_plain(contrast)}
    except UserError as error:
        named |= {"sentence": f"{names[0]} minus {names[1]} cannot be computed: {error}.", "effect": None}
    # Another pure template; and the reverse cross, which separates "another template" from "safety prompt".
    pairs = [(name, prompt) for name in pure if name != plain]
    pairs += [(prompt, name) for name in grid.test_templates if name in pure]
    return {"contrast": named, "others": _others(both, names[0], {f"{a} -> {b}": asr(a, b) for a, b in pairs})}


def _others(both: Outcomes, name: str, cells: Mapping[str, Outcomes]) -> dict[str, dict[str, Any]]:
    """The cell `both` minus each of `cells`, with p-values after Holm."""
    found: dict[str, dict[str, Any]] = {}
    for other, outcomes_of_other in cells.items():
        try:
            found[other] = _plain(paired_contrast(both, outcomes_of_other))
        except UserError as error:
            found[other] = {"effect": None, "sentence": f"cannot be computed: {error}"}
    computed = {other: c for other, c in found.items() if c["effect"] is not None}
    adjusted = holm({other: c["test"]["p"] if c["test"] else c["mcnemar"] for other, c in computed.items()})
    return {other: {"cells": [name, other], **c, "p_holm": adjusted.get(other)} for other, c in found.items()}


def _plain(contrast: Contrast) -> dict[str, Any]:
    return {**dataclasses.asdict(contrast), "effect": contrast.effect}
