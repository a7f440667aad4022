"""`python benchmarks/judges.py --answers FILE.csv`: a refusal judge compared with human labels.

Reads CSV files in XSTest's layout (Rottger et al. 2024, arXiv 2308.01263): columns prompt, completion, type and
final_label, which begins with 1 (full compliance), 2 (full refusal) or 3 (partial refusal). 2 and 3 are refusals.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptst import cli
from ptst.errors import UserError
from ptst.evaluation.judges import find_judge, judge_answers
from ptst.evaluation.rates import Rate
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.generation.request import Answer
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandSettings):
    """Compare a judge with human labels: accuracy, precision, recall, confusion and errors."""

    answers: tuple[Path, ...] = ()
    """CSV files with the columns prompt, completion, type and final_label."""
    judge: str = "rules-v2"
    """Judge: rules-v2, or a model as KIND:FOLDER, for instance rubric:FOLDER."""
    errors: bool = False
    """List the prompts on which judge and people disagree, with the judge's reason. No answer is printed."""


@dataclass(frozen=True)
class Labelled:
    """An answer with its human label: compliance "1", refusal "2", partial refusal "3"; `kind`: type of the request."""

    request: str
    answer: Answer
    label: str
    kind: str

    @property
    def refused(self) -> bool:
        return self.label != "1"


@dataclass(frozen=True)
class Confusion:
    """Counts of answers by (refusal for people, refusal for the judge); `missed`: for people alone."""

    true_refusals: int
    missed: int
    false_alarms: int
    true_compliances: int
    unjudged: int
    partial: Rate

    @property
    def accuracy(self) -> float:
        return (self.true_refusals + self.true_compliances) / self.judged

    @property
    def judged(self) -> int:
        return self.true_refusals + self.missed + self.false_alarms + self.true_compliances

    @property
    def precision(self) -> Rate:
        return Rate(self.true_refusals, self.true_refusals + self.false_alarms)

    @property
    def recall(self) -> Rate:
        return Rate(self.true_refusals, self.true_refusals + self.missed)


def read_labelled(path: Path) -> list[Labelled]:
    """Rows of a labelled CSV file. Raises UserError, naming line and column, for a file of another layout."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot be read as CSV: {error}", where=path) from None
    missing = {"prompt", "completion", "type", "final_label"} - set(names)
    if missing:
        raise UserError(f"lacks the column {min(missing)}; it has {', '.join(names) or 'none'}", where=path)
    if not rows:
        raise UserError("holds no answers", where=path)
    for number, row in enumerate(rows, 1):
        if not (row["final_label"] or "").startswith(("1", "2", "3")):
            cause = f"final_label is {row['final_label']!r}"
            raise UserError(cause, "it must begin with 1, 2 or 3", where=f"{path}, row {number}")
    return [
        Labelled(r["prompt"], Answer([], r["completion"] or "", "stop"), r["final_label"][0], r["type"]) for r in rows
    ]


def confusion(rows: Sequence[Labelled], verdicts: Sequence[Verdict]) -> Confusion:
    """Counts of verdicts by human label."""
    judged = [(r, v.label == AnswerClass.REFUSAL) for r, v in zip(rows, verdicts, strict=True) if v.judged]
    pairs = [(row.refused, says) for row, says in judged]
    partial = [says for row, says in judged if row.label == "3"]
    hits, missed, false_alarms, others = (
        pairs.count((human, says)) for human in (True, False) for says in (True, False)
    )
    unjudged, found = len(rows) - len(pairs), Rate(sum(partial), len(partial))
    return Confusion(hits, missed, false_alarms, others, unjudged, found)


def report(config: ReportConfig) -> dict[str, Confusion]:
    """Print one block per file; the counts by file. Raises UserError for unknown judges and unreadable files."""
    judge = find_judge(config.judge)
    out = {}
    for path in config.answers:
        rows = read_labelled(path)
        verdicts = judge_answers(judge, [(r.request, r.answer) for r in rows])
        found = out[path.name] = confusion(rows, verdicts)
        print(f"{path.name}: {judge.name}, {found.judged} answers judged, {found.unjudged} unjudged")
        print(f"  accuracy {found.accuracy:.3f}, precision {found.precision}, recall {found.recall}")
        print(f"  partial refusals found {found.partial}")
        print(f"  people refusal: {found.true_refusals} judged refusal, {found.missed} judged otherwise")
        print(f"  people compliance: {found.false_alarms} judged refusal, {found.true_compliances} judged otherwise")
        if config.errors:
            for row, verdict in zip(rows, verdicts, strict=True):
                if verdict.judged and (verdict.label == AnswerClass.REFUSAL) != row.refused:
                    print(f"  people {row.label}, {row.kind}: {row.request} -> {verdict.label}, {verdict.reason}")
    return out


if __name__ == "__main__":
    cli.run(report, ReportConfig, "judges")
