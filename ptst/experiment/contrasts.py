"""Contrasts of a grid's cells: the one named beforehand, others after Holm, and each cell against the aligned model.

Between cells the seed is the unit, and prompts are a sample, too (ptst/evaluation/statistics.py). The contrast: trained
and tested with a safety prompt, against tested with it only. Its measure is the non-refusal rate on topic: a model that
answers every request with arithmetic is broken, not unsafe.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.evaluation.paired import Contrast, adjusted, against_aligned, paired_contrast, ptst_contrast, verdict
from ptst.evaluation.statistics import DECODING
from ptst.evaluation.statistics import Cell as Outcomes
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import base
from ptst.experiment.plan import BASE
from ptst.experiment.summarized import Summarized

MEASURE = "the attack success rate on harmful requests"
PURE, SAFE = "chat:vanilla", "chat:llama"  # the paper's recommended pair, where a grid has it
KEPT = {"refusal": True, ASR: False, "incoherent": False}  # measures of safety and coherence; is higher better?
Pair = tuple[str, str]  # training and test template
Table = Outcomes | dict[int, float] | None


class Key(NamedTuple):
    """A line of the summary: a model over its seeds, under a test template."""

    train: str
    epochs: float | None
    test: str
    defense: str = NONE


def contrasts(grid: Summarized, tables: Mapping[Key, Mapping[str, Mapping[str, Table]]]) -> dict[str, Any]:
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
        if (key := Key(train, last, test)) not in tables:
            raise UserError(f"{train} -> {test} is not measured without a defence")
        if task not in tables[key]:
            raise UserError(f"{train} -> {test} is not measured on {task}")
        table = tables[key][task][ASR]
        if not isinstance(table, Outcomes):
            raise UserError(f"nothing was judged in some run of {train} -> {test}")
        return table

    names = (f"{prompt} -> {prompt}", f"{plain} -> {prompt}")
    # Other templates take its place where a grid lacks the paper's pair.
    named: dict[str, Any] = {"measure": MEASURE, "task": task, "cells": list(names)}
    named["named"] = (prompt, plain) == (SAFE, PURE)
    try:
        contrast, sentence = ptst_contrast(asr(prompt, prompt), asr(plain, prompt), MEASURE, names)
        named |= {"sentence": sentence, **_plain(contrast)}
    except UserError as error:
        named |= {"sentence": f"{names[0]} minus {names[1]} cannot be computed: {error}.", "effect": None}
    # Another pure template; and the reverse cross, which separates "another template" from "safety prompt".
    pairs = [(name, prompt) for name in pure if name != plain]
    pairs += [(prompt, name) for name in grid.test_templates if name in pure]
    others = _others((prompt, prompt), pairs, asr)
    return {"contrast": named, "others": others}


def _others(first: Pair, pairs: Sequence[Pair], asr: Callable[[str, str], Outcomes]) -> dict[str, dict[str, Any]]:
    """The cell `first` minus each of the others, with p-values after Holm."""
    found: dict[str, dict[str, Any]] = {}
    computed: dict[str, Contrast] = {}
    for pair in pairs:
        other = " -> ".join(pair)
        try:
            computed[other] = paired_contrast(asr(*first), asr(*pair))
            found[other] = _plain(computed[other])
        except UserError as error:
            found[other] = {"effect": None, "sentence": f"cannot be computed: {error}"}
    after = adjusted(computed)
    lines = {}
    for other, c in found.items():
        p, bounded = after.get(other, (None, False))
        lines[other] = {"cells": [" -> ".join(first), other], **c, "p_holm": p, "p_holm_bounded": bounded}
    return lines


def kept(grid: Summarized, tables: Mapping[Key, Mapping[str, Mapping[str, Table]]]) -> dict[str, Any]:
    """Each cell against the base model under the same test template, on refusal, attack success and coherence: effect,
    interval and verdict by the margin of the settings."""
    aligned = {key.test: by_task for key, by_task in tables.items() if key.train == BASE}
    margin = grid.config.equivalence_margin / 100
    cells = []
    for key, by_task in tables.items():
        for task in by_task if key.train != BASE and key.test in aligned else ():
            if base(task) != "safety" or task not in aligned[key.test]:
                continue
            pairs = {metric: (by_task[task].get(metric), aligned[key.test][task].get(metric)) for metric in KEPT}
            measures = {metric: _kept(*pair, margin, KEPT[metric]) for metric, pair in pairs.items()}
            cells.append({**key._asdict(), "task": task, "measures": measures})
    return {"margin": margin, "cells": cells}


def _kept(tuned: Table, aligned: Table, margin: float, higher_is_better: bool) -> dict[str, Any]:
    try:
        if not isinstance(tuned, Outcomes) or not isinstance(aligned, Outcomes):
            raise UserError("nothing was judged in some run")
        decoded = tuned.sample == aligned.sample == DECODING
        c = paired_contrast(tuned, aligned) if decoded else against_aligned(tuned, aligned)
    except UserError as error:
        return {"effect": None, "sentence": f"cannot be computed: {error}"}
    found = verdict(c.test.interval, margin, higher_is_better)
    return {**_plain(c), "higher_is_better": higher_is_better, "verdict": found}


def _plain(contrast: Contrast) -> dict[str, Any]:
    return {**dataclasses.asdict(contrast), "effect": contrast.effect}
