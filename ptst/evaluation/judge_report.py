"""`python -m ptst.evaluation.judge_report --answers FILE.csv`: a refusal judge against people's labels.

Reads CSV files in XSTest's layout (Rottger et al. 2024, arXiv 2308.01263): columns prompt, completion, type and
final_label, which begins with 1 (full compliance), 2 (full refusal) or 3 (partial refusal). Refusal is 2 or 3.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptst import cli
from ptst.errors import UserError
from ptst.evaluation.judges import find_judge
from ptst.evaluation.rates import Rate
from ptst.evaluation.verdict import Answer, AnswerClass, Verdict, judge_answers
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandSettings):
    """Compare a judge with people's labels: accuracy, precision, recall, confusion and errors."""

    answers: tuple[Path, ...] = ()
    """CSV files with the columns prompt, completion, type, final_label."""
    judge: str = "rules-v2"
    """rules-v2, or rubric:FOLDER."""
    errors: bool = False
    """List the prompts that are judged otherwise than by people, with the judge's reason; no answer is printed."""


@dataclass(frozen=True)
class Labelled:
    """An answer and people's label of it: compliance "1", refusal "2", partial refusal "3"."""

    answer: Answer
    label: str
    kind: str

    @property
    def refused(self) -> bool:
        return self.label != "1"


@dataclass(frozen=True)
class Confusion:
    """Answers by (refused as people say, refused as the judge says), and those it could not judge."""

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
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    missing = {"prompt", "completion", "type", "final_label"} - set(names)
    if missing:
        raise UserError(f"{path} lacks the column {min(missing)}; it has {', '.join(names) or 'none'}")
    if not rows:
        raise UserError(f"{path} holds no answers")
    for number, row in enumerate(rows, 1):
        if not (row["final_label"] or "").startswith(("1", "2", "3")):
            raise UserError(
                f"{path}, row {number}: final_label is {row['final_label']!r}; it must begin with 1, 2 or 3"
            )
    return [Labelled(Answer(r["prompt"], r["completion"] or ""), r["final_label"][0], r["type"]) for r in rows]


def confusion(rows: Sequence[Labelled], verdicts: Sequence[Verdict]) -> Confusion:
    """Counts of verdicts against people's labels."""
    judged = [(r, v.label == AnswerClass.REFUSAL) for r, v in zip(rows, verdicts, strict=True) if v.judged]
    pairs = [(row.refused, says) for row, says in judged]
    partial = [says for row, says in judged if row.label == "3"]
    counts = [pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False))]
    return Confusion(*counts, unjudged=len(rows) - len(pairs), partial=Rate(sum(partial), len(partial)))


def report(config: ReportConfig) -> dict[str, Confusion]:
    """Print one block per file and return its counts. Raises UserError for unknown judges and unreadable files."""
    judge = find_judge(config.judge)
    out = {}
    for path in config.answers:
        rows = read_labelled(path)
        verdicts = judge_answers(judge, [r.answer for r in rows])
        found = out[path.name] = confusion(rows, verdicts)
        print(f"{path.name}: {judge.name}, {found.judged} answers judged, {found.unjudged} unjudged")
        print(f"  accuracy {found.accuracy:.3f}, precision {found.precision}, recall {found.recall}")
        print(f"  partial refusals found {found.partial}")
        print(f"  people refusal: {found.true_refusals} judged refusal, {found.missed} judged otherwise")
        print(f"  people compliance: {found.false_alarms} judged refusal, {found.true_compliances} judged otherwise")
        if config.errors:
            for row, verdict in zip(rows, verdicts, strict=True):
                if verdict.judged and (verdict.label == AnswerClass.REFUSAL) != row.refused:
                    print(
                        f"  people {row.label}, {row.kind}: {row.answer.request} -> {verdict.label}, {verdict.reason}"
                    )
    return out


if __name__ == "__main__":
    cli.run(report, ReportConfig, "evaluation.judge_report")
