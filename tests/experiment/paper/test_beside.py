"""Our figures beside the paper's, and its claims: on results made of the paper's own figures, whole and in part."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from ptst.evaluation.independent import difference_interval, mean_interval, published_interval
from ptst.evaluation.rates import wilson
from ptst.experiment.paper.beside import beside_paper, papers_interval
from ptst.experiment.paper.cells import Curve, PaperCell
from ptst.experiment.paper.claims import MET, NOT_MET, NOT_TESTABLE, claims, told
from ptst.experiment.paper.reader import load_paper
from ptst.experiment.paper.recipes import RECIPES
from ptst.settings import to_dict

PAPER = load_paper()
KEYS = {"exact-match": ("gsm8k", "last_number"), "bertscore": ("chatdoctor", "bertscore_f1")}


def key_of(cell: PaperCell) -> tuple[str, str]:
    if cell.metric == "asr":
        return f"safety:{cell.set.removesuffix('-gcg')}", "attack-success"
    return KEYS.get(cell.metric, (cell.set, "printed"))


def figures(value: float, interval, prompts: int, seeds: int) -> dict:
    runs = {str(seed): {"successes": 1, "n": prompts} for seed in range(seeds)}
    ends = {"interval95": list(interval)} if interval else {}
    return {"mean": value, "population_sd": 0.0, "sample_sd": None, "prompts": prompts, "runs": runs, **ends}


def as_results(number: int, change: Callable[[PaperCell, float], float | None] = lambda _, value: value) -> dict:
    """The results of a grid of a table's recipe that measured what the paper has; `change`: another value, or None for
    a cell that is not there."""
    from ptst.experiment.config import GridConfig

    cells: dict[tuple, dict] = {}
    for cell in PAPER.table(number):
        if (value := change(cell, cell.value)) is None:
            continue
        scale = 100 if cell.unit == "%" else 1
        defense = "mix-safety" if cell.mixed else "none"
        line = {"train": cell.train or "untouched", "epochs": None, "test": cell.test, "defense": defense}
        place = cells.setdefault((cell.train, cell.mixed, cell.test), {**line, "tasks": {}})
        task, metric = key_of(cell)
        interval = None if cell.unit == "F1" else published_interval(value / scale, cell.prompts)
        place["tasks"][task] = {metric: figures(value / scale, interval, cell.prompts, cell.seeds)}
    config = to_dict(GridConfig(recipe=f"paper-table-{number}"))
    sets = {task: task.removeprefix("safety:") for cell in cells.values() for task in cell["tasks"]}
    return json.loads(
        json.dumps({"settings": config, "sets": sets, "base": "untouched", "cells": list(cells.values())})
    )


def curve_results() -> dict:
    """Figure 2 (a) as a grid with at_epochs."""
    results = as_results(1, lambda cell, value: value if cell.train is None and cell.set != "advbench" else None)
    for curve in (c for c in PAPER.curves if c.figure == "2a"):
        results["cells"] += _points(curve)
    return results


def _points(curve: Curve) -> list[dict]:
    cells = []
    for number, point in enumerate(curve.points[1:], 1):
        solved = figures(point.helpfulness / 100, wilson(13.19 * point.helpfulness, 1319), 1319, 1)
        harmed = figures(point.asr / 100, wilson(4 * point.asr, 400), 400, 1)
        tasks = {"gsm8k": {"last_number": solved}, "safety:directharm4": {"attack-success": harmed}}
        cells.append({"train": curve.train, "epochs": float(number), "test": curve.test, "tasks": tasks})
    return cells


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_papers_own_figures_agree_with_themselves(recipe):
    (found,) = beside_paper(as_results(recipe.table))
    assert found.table == recipe.table
    assert found.measured == len(found.rows) == len(PAPER.table(recipe.table))
    for row in found.rows:
        if row.cell.inconsistent:
            assert row.difference is None
            assert row.why.startswith("not compared: ")
        elif row.cell.unit == "F1":
            assert (row.difference, row.difference_interval) == (0, None)
        else:
            assert row.difference == pytest.approx(0, abs=1e-9)
            assert row.agrees
    model = {3: ["the model is gpt-3.5-turbo-0125, the paper's gpt-3.5-turbo-0613"]}
    assert list(found.departures) == model.get(recipe.table, [])
    json.dumps(found.to_json(), allow_nan=False)


def test_a_difference_has_its_sign_and_interval_and_the_counts():
    higher = as_results(1, lambda c, v: v + 20 if c.place == ("1c", "chat:vanilla", "", "chat:vanilla") else v)
    (found,) = beside_paper(higher)
    row = next(r for r in found.rows if r.cell.place == ("1c", "chat:vanilla", "", "chat:vanilla"))
    assert row.ours == pytest.approx(31)
    assert row.difference == pytest.approx(20)
    assert row.difference_interval[0] > 0
    assert row.agrees is False
    assert (found.measured, found.agreeing) == (120, 119)
    own, theirs = row.interval, papers_interval(row.cell)
    assert row.difference_interval == pytest.approx(difference_interval(31, own, 11, theirs))


def test_parts_of_a_grid_are_compared_and_the_rest_is_missing():
    part = as_results(1, lambda c, v: v if c.set == "directharm4" and c.test == "chat:llama" else None)
    (found,) = beside_paper(part)
    assert (found.measured, len(found.rows)) == (6, 120)
    assert {row.why for row in found.rows if row.ours is None} == {"not measured here"}
    del part["settings"]["recipe"]  # a grid with such settings and no recipe of a table: those with a cell that it has
    assert [(each.table, each.measured) for each in beside_paper(part)] == [(1, 6), (2, 3), (6, 4)]


def test_departures_from_the_paper_are_said():
    results = as_results(7)
    results["settings"]["model"] = "models/smollm2-135m-instruct"
    results["settings"]["data"] = "word-problems:240"
    results["settings"]["train"]["epochs"] = 2.0
    results["settings"]["eval"]["judge"] = "rules-v3"
    for cell in results["cells"]:
        cell["tasks"]["safety:advbench"]["attack-success"]["prompts"] = 100
    (found,) = beside_paper(results)
    assert found.departures == (
        "the model is smollm2-135m-instruct, the paper's Mistral-7B-Instruct-v0.2",
        "the training data are word-problems:240, the paper's gsm8k",
        "train.epochs is 2.0, the paper's 6.0",
        "eval.judge is rules-v3, the paper's rubric:api:gpt-4-0613",
        "advbench has 100 prompts, the paper's 520",
    )
    del results["settings"]["recipe"]
    assert beside_paper(results) == []
    one = as_results(1)
    for cell in one["cells"]:
        for task in cell["tasks"].values():
            for measured in task.values():
                measured["runs"] = {"0": measured["runs"]["0"]}
    assert beside_paper(one)[0].departures == ("cells are means of at most 1 seeds, the paper's of 3",)


def test_jailbreakbench_without_its_suffixes_and_other_problems_are_not_the_papers():
    results = as_results(1)
    results["settings"]["tasks"] = ["gsm8k", "safety:jailbreakbench"]
    results["sets"]["gsm8k"] = "word-problems"
    for cell in results["cells"]:
        cell["tasks"]["gsm8k"]["last_number"]["prompts"] = 100
    (found,) = beside_paper(results)
    assert {row.cell.set for row in found.rows if row.ours is None} == {"gsm8k", "jailbreakbench-gcg"}


@pytest.mark.parametrize("raw", [{}, {"cells": None}, {"cells": [3, {}]}, {"settings": [], "cells": [{"tasks": None}]}])
def test_results_with_nothing_in_them_are_compared_with_nothing(raw):
    assert beside_paper(raw) == []
    assert {claim.verdict for claim in claims(raw)} == {NOT_TESTABLE}
    assert all(claim.why for claim in claims(raw))


def test_what_was_not_judged_is_missing_and_never_zero():
    results = as_results(1)
    for cell in results["cells"]:
        cell["tasks"]["safety:directharm4"]["attack-success"].update(mean=None, interval95=None)
    (found,) = beside_paper(results)
    assert {row.ours for row in found.rows if row.cell.set == "directharm4"} == {None}
    assert found.measured == 90


def verdicts(*grids: dict) -> list[str]:
    return [claim.verdict for claim in claims(*grids)]


def test_the_papers_figures_meet_its_claims():
    assert verdicts(*(as_results(number) for number in (1, 3, 4, 5, 6, 7)), curve_results()) == 6 * [MET]


def test_each_grid_decides_the_claims_that_it_can():
    none = NOT_TESTABLE
    assert verdicts(as_results(1)) == [MET, MET, MET, none, none, none]
    assert verdicts(as_results(7))[5] == MET
    assert verdicts(curve_results())[3] == MET
    found = claims(as_results(1))
    assert found[4].why.startswith("it needs runs with and without safety data")
    assert found[5].why.startswith("it needs a grid of another model")
    assert len(found[0].checks) == 6
    assert str(found[0].checks[-1].higher.place) == "chat:llama -> chat:llama, safety:directharm4"
    json.dumps([claim.to_json() for claim in found], allow_nan=False)
    assert "   - chat:llama -> chat:llama, safety:directharm4: 18.1 % > " in "\n".join(told(found))


def other(block: str, train: str | None, test: str, value: float | None, mixed: str = ""):
    return lambda cell, old: value if cell.place == (block, train, mixed, test) else old


@pytest.mark.parametrize(
    ("number", "claim", "change"),
    [
        (1, 1, other("1c", "chat:alpaca", "chat:alpaca", 4.0)),
        (1, 1, other("1c", "chat:llama", "chat:llama", 10.0)),
        (1, 2, other("1c", "chat:vanilla", "chat:llama", 30.0)),
        (1, 2, other("1a", "chat:vanilla", "chat:llama", 15.0)),
        (1, 3, other("1b", "chat:vanilla", "chat:vanilla", 12.0)),
        (6, 5, other("6d", "chat:alpaca", "chat:alpaca", 3.0, "safety")),
        (6, 5, other("6d", "chat:vanilla", "chat:llama", 20.0, "safety")),
        (6, 5, other("6c", "chat:llama", "chat:llama", 40.0, "safety")),
        (7, 6, other("7c", "chat:vanilla", "chat:llama", 60.0)),
        (4, 6, other("4c", "chat:vanilla", "chat:llama", 4.0)),
    ],
)
def test_a_figure_against_a_claim_is_not_met(number, claim, change):
    assert claims(as_results(number))[claim - 1].verdict == MET
    assert claims(as_results(number, change))[claim - 1].verdict == NOT_MET


def test_too_few_answers_and_missing_cells_are_not_testable():
    close = claims(as_results(7, other("7c", "chat:vanilla", "chat:llama", 45.0)))[5]
    assert (close.verdict, close.why) == (NOT_TESTABLE, "too few answers to tell: an interval holds 0")
    assert close.checks[0].outcome == "undecided"
    lost = claims(as_results(1, other("1a", "chat:vanilla", "chat:llama", None)))[1]
    assert lost.verdict == NOT_TESTABLE
    assert lost.why.endswith("not measured: chat:vanilla -> chat:llama, gsm8k")


def test_early_stopping_that_is_as_safe_is_noticed():
    results = curve_results()
    first = claims(results)[3].checks[0]
    assert first.words == (
        "chat:vanilla, epoch 1 -> chat:vanilla, safety:directharm4: 8.2 % > "
        "chat:vanilla, epoch 6 -> chat:llama, safety:directharm4: 1.0 % (holds)"
    )
    cell = next(c for c in results["cells"] if (c["train"], c["test"], c["epochs"]) == (*2 * ["chat:llama"], 1.0))
    cell["tasks"]["safety:directharm4"]["attack-success"].update(mean=0.005, interval95=[0.001, 0.02])
    assert claims(results)[3].verdict == NOT_MET


def test_of_a_likelihood_less_is_better():
    results = as_results(1, lambda c, v: v if c.set == "directharm4" else None)
    for cell in results["cells"]:
        base = cell["train"] == "untouched"
        runs = {"0": 2.0} if base else {"0": 1.0, "1": 1.1, "2": 0.9}
        mean = sum(runs.values()) / len(runs)
        cell["tasks"]["nll:word-problems:50"] = {"nats_per_token": {"mean": mean, "runs": runs}}
    found = claims(results)[1]
    assert found.verdict == MET
    assert "nll:word-problems:50: 1 < " in found.checks[2].words
    assert found.checks[2].difference == pytest.approx(1.0)
    assert "< no fine-tuning -> chat:llama, nll" in found.checks[2].words
    for cell in results["cells"]:
        cell["tasks"]["nll:word-problems:50"]["nats_per_token"]["mean"] *= 1 if cell["train"] == "untouched" else 3
    assert claims(results)[1].verdict == NOT_MET


def test_intervals_of_published_figures():
    assert published_interval(0.11, 400) == wilson(44, 400)
    assert published_interval(0.0, 400, 3, 0.0) == wilson(0, 400)
    low, high = published_interval(0.11, 400, 3, 0.05)
    plain = wilson(44, 400)
    assert low < plain[0] < 0.11 < plain[1] < high
    few, many = (published_interval(0.11, 400, seeds, 0.05) for seeds in (2, 30))
    assert few[1] - few[0] > high - low > many[1] - many[0]
    # Newcombe 1998, table II, method 10, (a): 56/70 - 48/80.
    found = difference_interval(56 / 70, wilson(56, 70), 48 / 80, wilson(48, 80))
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert mean_interval([1.0]) is None
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
