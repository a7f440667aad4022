"""What is written of a study's outcomes: the file itself, all tables in Markdown, and the figure."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.tasks.requests import HALVES, XSTEST
from ptst.evaluation.tasks.table import base
from ptst.experiment.ladder import blocks, figure
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.comparisons import compare
from ptst.experiment.ladder.outcomes import ASR, Outcomes
from ptst.experiment.ladder.registered import registered
from ptst.storage import write_atomically

OUTCOMES, REPORT, FIGURE = "outcomes.json", "report.md", "ladder.svg"


def write(outcomes: Outcomes, out: Path, judge: str | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Write all three into a folder, the last two by this judge; returns the tables and the registered contrasts.
    Raises UserError as `Study.of`."""
    Study.of(outcomes, judge)  # checks the judge
    out.mkdir(parents=True, exist_ok=True)
    outcomes.write(out / OUTCOMES)
    study = Study.of(Outcomes.read(out / OUTCOMES), judge)  # so that the file gives the same tables later
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
    for data in study.data:
        parts += _of_data(study, data, f" on {data}" if len(study.data) > 1 else "")
    for other in study.outcomes.judges:
        if other != study.judge:
            parts += [f"## {study.judge} and {other}", blocks.table(study, "judges", other)]
    return "\n\n".join(parts) + "\n"


def _of_data(study: Study, data: str, on: str) -> Iterator[str]:
    """The tables of what was trained on these data; `on`: how headings say so."""
    trained = {key.train for key in study.keys if key.data == data}
    ladders = [train for train in study.trains if train in trained and study.rungs(train)]
    for train in ladders:
        for measure, words in blocks.MEASURES.items():
            yield f"## Trained under {train}{on}: {words}, %, by rung, nearest first"
            yield blocks.table(study, "rungs", train, measure, "safety", data)
        yield f"## Trained under {train}{on}: distances"
        yield blocks.table(study, "distances", train, data)
        yield f"## Trained under {train}{on}: minus the aligned model, attack success, points"
        yield blocks.table(study, "aligned", train, ASR, "safety", data)
    if ladders:
        yield f"## Registered contrasts{on}"
        yield blocks.table(study, "contrasts", "all", data)
    for task in study.outcomes.prompts:
        for half in HALVES if base(task) == XSTEST.name else ("",):
            matrix = blocks.table(study, "matrix", task, f"{half}:refusal" if half else "refusal", data)
            if matrix.count("\n") > 1:
                yield f"## {task}{on}: {f'{half} prompts ' if half else ''}refused, %"
                yield matrix
