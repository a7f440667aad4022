"""A report in the pieces that its page and its files have: heat maps, charts, tables, examples, statement."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.tasks.table import base
from ptst.experiment.contrast_words import difference, legend
from ptst.experiment.ladder.comparisons import compare
from ptst.experiment.ladder.registered import registered
from ptst.records import record_kind
from ptst.reporting import curves, lists
from ptst.reporting.chart import Chart
from ptst.reporting.examples import CellExamples, examples
from ptst.reporting.headline import Headline, comparison_words, headline
from ptst.reporting.heat import Heat, heat_maps
from ptst.reporting.material import Material, Note, read_answers
from ptst.reporting.paper_section import PaperSection, paper_section
from ptst.reporting.read_eval import read_evaluation
from ptst.reporting.read_grid import read_grid
from ptst.reporting.read_study import part_folders, read_study
from ptst.reporting.statement import Group, runs_table, statement
from ptst.reporting.tables import Table

STUDY_FILES = ("study.json", "outcomes.json")
FIRST = ("attack-success", "refusal")  # heat maps that are open at once; the other classes are folded
KINDS = {"grid": "Grid", "eval": "Evaluation", "study": "Study"}


@dataclass
class Task:
    """The heat maps of a task: those that are open, those that are folded, and both of ladders."""

    name: str
    set_name: str
    harmful: bool
    open: list[Heat] = field(default_factory=list)
    folded: list[Heat] = field(default_factory=list)
    ladders: list[Heat] = field(default_factory=list)
    folded_ladders: list[Heat] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """Everything of a report."""

    material: Material
    headline: Headline
    tasks: Sequence[Task]
    scatters: Sequence[Chart]
    over_refusal: Sequence[Chart]
    training: Sequence[Chart]
    early_stopping: Sequence[Chart]
    ladder: Chart | None
    contrast_words: Sequence[str]
    contrasts: Sequence[Table]
    refusals: Sequence[Table]
    judges: Sequence[tuple[str, Sequence[Table], int]]
    examples: Sequence[CellExamples]
    runs: Table | None
    statement: Sequence[Group]
    notes: Sequence[Note]
    paper: PaperSection | None = None

    @property
    def heats(self) -> Iterator[Heat]:
        for task in self.tasks:
            yield from (*task.open, *task.folded, *task.ladders, *task.folded_ladders)

    @property
    def charts(self) -> Iterator[Chart]:
        yield from (*self.scatters, *self.over_refusal, *self.training, *self.early_stopping)
        yield from [self.ladder] if self.ladder else []

    @property
    def tables(self) -> Iterator[Table]:
        yield from (heat.table for heat in self.heats)
        yield from (*self.contrasts, *self.refusals)
        yield from (table for _, found, _ in self.judges for table in found)
        yield from [self.runs] if self.runs else []
        yield from (each.table for each in (self.paper.tables if self.paper else ()))


def read_material(folder: Path) -> Material:
    """The material of any folder of results. Raises UserError for a folder that has none."""
    kind = record_kind(folder)
    if kind == "grid":
        return read_grid(folder)
    if kind == "eval":
        return read_evaluation(folder)
    if any((folder / name).exists() for name in STUDY_FILES) or (kind is None and part_folders(folder)):
        return read_study(folder)
    what = f"is the folder of a ptst.{kind}, which has no results of tests" if kind else "holds no results"
    raise UserError(what, "give the folder of a grid, a study or an evaluation", folder)


def make_content(material: Material, show_answers: bool) -> Content:
    """All pieces; what cannot be made of the material is among the notes."""
    summary, study = material.summary, material.study
    comparisons = compare(study, registered(study.defenses)) if study and material.kind == "study" else []
    safety = curves.safety_tasks(summary)
    judged, found, notes = list[tuple[str, Sequence[Table], int]](), list[CellExamples](), list(material.notes)
    for number, (folder, prefix) in enumerate(material.parts):
        own_judges, own_examples, own_notes = _answers(material, folder, prefix, number, show_answers)
        judged += own_judges
        found += own_examples
        notes += [Note(prefix + note.text, note.level) for note in own_notes]
    over = [(curves.over_refusal(summary, task), lists.refusal_table(summary, task)) for task in safety]
    contrasts = [t for t in [lists.contrast_table(summary)] if t is not None] + [*lists.kept_tables(summary)]
    if comparisons:
        contrasts.append(lists.registered_table(comparisons))
    return Content(
        material,
        headline(material, comparisons),
        _tasks(material),
        [chart for task in safety if (chart := curves.scatter(summary, task))],
        [chart for chart, _ in over if chart],
        [*curves.training(material.runs, summary)],
        [*curves.early_stopping(summary)],
        curves.ladder(study) if study else None,
        [*_contrast_words(summary), *(f"{c.of.question} {comparison_words(c)}" for c in comparisons)],
        contrasts,
        [table for _, table in over if table],
        judged,
        found,
        runs_table(material.runs),
        [*statement(material)],
        notes,
        _paper(material, notes),
    )


def _paper(material: Material, notes: list[Note]) -> PaperSection | None:
    try:
        return paper_section(material)
    except UserError as error:
        notes.append(Note(f"These results cannot be compared with the paper's: {error}"))
        return None


def _answers(
    material: Material, folder: Path, prefix: str, number: int, show_answers: bool
) -> tuple[list[tuple[str, Sequence[Table], int]], list[CellExamples], Sequence[Note]]:
    """What the judges say of a folder's answers, and examples of these."""
    answers = read_answers(folder)
    if answers.judged is None:
        return [], [], answers.notes
    report = answers.judged.to_json()
    tables = [*lists.judge_tables(report, f".{number}" if len(material.parts) > 1 else "")]
    shown = [*examples(answers.judged, material.judge, show_answers, prefix)]
    return [(prefix.removesuffix(": "), tables, len(report["differing"]))], shown, answers.notes


def _tasks(material: Material) -> list[Task]:
    found: dict[str, Task] = {}
    for heat in heat_maps(material.summary, material.absent):
        name = heat.task
        task = found.setdefault(name, Task(name, heat.set_name, base(name) in ("safety", "xstest")))
        first = heat.metric in FIRST or base(name) not in ("safety", "prompts")
        if heat.key.startswith("ladder."):
            (task.ladders if first else task.folded_ladders).append(heat)
        else:
            (task.open if first else task.folded).append(heat)
    return list(found.values())


def _contrast_words(summary: dict[str, Any]) -> Iterator[str]:
    contrast = summary.get("contrast")
    if contrast:
        yield f"{'Named beforehand: ' if contrast['named'] else ''}{contrast['sentence']}"
    for c in (*summary.get("others", {}).values(), *summary.get("defended", {}).values()):
        yield f"{' minus '.join(c['cells'])}: {difference(c)}."
    if summary.get("kept", {}).get("cells"):
        yield legend(100 * summary["kept"]["margin"])
