"""What is written of a study's outcomes: the file itself, all tables in Markdown, and the figure."""

import dataclasses
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.experiment.ladder import blocks, figure
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.comparisons import compare
from ptst.experiment.ladder.outcomes import Outcomes
from ptst.experiment.ladder.registered import registered
from ptst.storage import write_atomically

OUTCOMES, REPORT, FIGURE = "outcomes.json", "report.md", "ladder.svg"


def write(outcomes: Outcomes, out: Path, judge: str | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Write all three into a folder, the last two by this judge; returns the tables and the registered contrasts.
    Raises UserError as `Study.of`."""
    study = Study.of(outcomes, judge)
    out.mkdir(parents=True, exist_ok=True)
    outcomes.write(out / OUTCOMES)
    markdown = to_markdown(study)
    write_atomically(out / REPORT, markdown.encode())
    if (picture := drawn(study)) is not None:
        write_atomically(out / FIGURE, picture.encode())
    contrasts = [dataclasses.asdict(found) for found in compare(study, registered(study.defenses))]
    return markdown, contrasts


def drawn(study: Study) -> str | None:
    """The figure; None for a study without a ladder."""
    try:
        return figure.draw(study)
    except UserError:
        return None


def to_markdown(study: Study) -> str:
    """Every table that a study has."""
    parts = ["# Outcomes"]
    for train in study.trains:
        if not study.rungs(train):
            continue
        for measure, words in blocks.MEASURES.items():
            head = f"## Trained under {train}: {words}, %, by rung, nearest first"
            parts += [head, blocks.table(study, "rungs", train, measure)]
        parts += [f"## Trained under {train}: distances", blocks.table(study, "distances", train)]
        parts += [f"## Trained under {train}: minus the aligned model, attack success, points"]
        parts += [blocks.table(study, "aligned", train)]
    if any(study.rungs(train) for train in study.trains):
        parts += ["## Registered contrasts", blocks.table(study, "contrasts")]
    for task in study.outcomes.prompts:
        matrix = blocks.table(study, "matrix", task, "refusal")
        if matrix.count("|") > 8:
            parts += [f"## {task}: refused, %", matrix]
    for other in study.outcomes.judges:
        if other != study.judge:
            parts += [f"## {study.judge} and {other}", blocks.table(study, "judges", other)]
    return "\n\n".join(parts) + "\n"
