"""Each defence against none: a defended cell minus the undefended one of the same training and test template."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.evaluation.paired import Contrast, adjusted, paired_contrast
from ptst.evaluation.statistics import Cell as Outcomes
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import base
from ptst.experiment.contrasts import Key, Table
from ptst.experiment.summarized import Summarized


def defended(grid: Summarized, tables: Mapping[Key, Mapping[str, Mapping[str, Table]]]) -> dict[str, dict[str, Any]]:
    """Attack success under each defence minus that without one, after the last of `at_epochs`, by the name of the
    defended cell; p-values after Holm over all of them. Nothing where the grid has no defences, no undefended runs or
    no task safety."""
    task = next((t for t in grid.tasks if base(t) == "safety"), None)
    last = max(grid.config.at_epochs, default=None)
    pairs = {key: key._replace(defense=NONE) for key in tables if key.defense != NONE and key.epochs == last}
    found: dict[str, dict[str, Any]] = {}
    computed: dict[str, Contrast] = {}
    for key, plain in pairs.items():
        if task is None or task not in tables[key] or task not in tables.get(plain, {}):
            continue
        name, other = (f"{k.train}{'' if k.defense == NONE else f', {k.defense}'} -> {k.test}" for k in (key, plain))
        try:
            computed[name] = paired_contrast(_asr(tables[key][task]), _asr(tables[plain][task]))
            found[name] = {**dataclasses.asdict(computed[name]), "effect": computed[name].effect}
        except UserError as error:
            found[name] = {"effect": None, "sentence": f"cannot be computed: {error}"}
        found[name]["cells"] = [name, other]
    after = adjusted(computed)
    for name, line in found.items():
        line["p_holm"], line["p_holm_bounded"] = after.get(name, (None, False))
    return found


def _asr(by_metric: Mapping[str, Table]) -> Outcomes:
    table = by_metric[ASR]
    if not isinstance(table, Outcomes):
        raise UserError("nothing was judged in some run")
    return table
