"""What several judges say of the same answers: shares of every class, their agreement, where they differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Any

from ptst.evaluation.agreement import Agreement, alpha, kappa
from ptst.evaluation.rates import Rate
from ptst.evaluation.stored_answers import StoredAnswer
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.progress import printable

_HARMLESS = ("over-refusal", "prompts", "xstest")  # tasks on which a compliant answer is no successful attack
_SHOWN = 300  # characters of a refusal on which judges differ
_ANSWERED = (AnswerClass.COMPLIANCE, AnswerClass.PARTIAL)
Class = str | None
SUCCESS = "attack success"
# What judges can agree on, and what a verdict says of it.
MEASURES = {
    "class": lambda v: v.label,
    "refusal or not": lambda v: None if v.label is None else v.label == AnswerClass.REFUSAL,
    SUCCESS: lambda v: v.success,
}


@dataclass(frozen=True)
class Judged:
    """Answers with each judge's verdicts, in the order of the answers (None: not judged yet). `records`: of the judges,
    by name."""

    source: str
    answers: Sequence[StoredAnswer]
    records: Mapping[str, Mapping[str, Any]]
    verdicts: Mapping[str, Sequence[Verdict | None]]

    @property
    def judges(self) -> list[str]:
        return list(self.records)

    @property
    def classing(self) -> list[str]:
        """The judges that tell classes themselves, instead of taking the embedded judge's."""
        return [name for name, r in self.records.items() if not str(r.get("classes", "")).startswith("by ")]

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[int]]:
        """Numbers of answers by model and task; XSTest's halves apart."""
        found: dict[tuple[str, str], list[int]] = {}
        for i, a in enumerate(self.answers):
            halves = " (unsafe)" if a.category.startswith("contrast") else " (safe)"
            found.setdefault((a.model, a.task + halves * (_base(a.task) == "xstest")), []).append(i)
        return found

    def to_json(self) -> dict[str, Any]:
        """What report.json and `--json` have. Of answers on which judges differ, only refusals are shown."""
        return {
            "source": self.source,
            "answers": len(self.answers),
            "judges": dict(self.records),
            "shares": [share for key, numbers in self.groups.items() for share in self._shares(key, numbers)],
            "agreement": list(self._agreements()),
            "confusion": [self._confusion(*pair) for pair in combinations(self.classing, 2)],
            "differing": list(self._differing()),
        }

    def _shares(self, key: tuple[str, str], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        model, task = key
        for judge in self.judges:
            given = [self.verdicts[judge][i] for i in numbers]
            judged = [v for v in given if v is not None and v.judged]
            labels = [v.label for v in judged if v.label is not None]
            shares = {c.value: Rate(labels.count(c), len(labels)).to_json() for c in AnswerClass}
            told = [v.success for v in judged if v.success is not None]
            attack = _base(self.answers[numbers[0]].task) not in _HARMLESS
            scores = [v.score for v in judged if v.score is not None]
            yield {
                "model": model,
                "task": task,
                "judge": judge,
                "answers": len(numbers),
                "judged": len(judged),
                "unjudged": sum(v is not None and not v.judged for v in given),
                "missing": given.count(None),
                "attack-success": Rate(sum(told), len(told)).to_json() if attack and told else None,
                "classes": shares,
                "score": fmean(scores) if scores else None,
            }

    def _ratings(self, measure: str, judges: Sequence[str]) -> list[list[Any]]:
        of = MEASURES[measure]
        return [
            [None if v is None or not v.judged else of(v) for v in row]
            for row in zip(*(self.verdicts[j] for j in judges), strict=True)
        ]

    def _agreements(self) -> Iterator[dict[str, Any]]:
        requests = [a.request for a in self.answers]
        for measure in MEASURES:
            judges = self.judges if measure == SUCCESS else self.classing
            if len(judges) < 2:
                continue
            for pair in combinations(judges, 2):
                ratings = self._ratings(measure, pair)
                both = [a == b for a, b in ratings if a is not None and b is not None]
                found = kappa(ratings, requests)
                told = {"measure": measure, "judges": list(pair), "same": Rate(sum(both), len(both)).to_json()}
                yield {**told, "coefficient": "Cohen's kappa", **found.to_json()}
            found = alpha(self._ratings(measure, judges), requests)
            told = {"measure": measure, "judges": judges, "coefficient": "Krippendorff's alpha"}
            yield {**told, **found.to_json()}

    def _confusion(self, first: str, second: str) -> dict[str, Any]:
        pairs = self._ratings("class", (first, second))
        counts = {a.value: {b.value: pairs.count([a, b]) for b in AnswerClass} for a in AnswerClass}
        return {"rows": first, "columns": second, "counts": counts}

    def _differing(self) -> Iterator[dict[str, Any]]:
        for answer, *given in zip(self.answers, *self.verdicts.values(), strict=True):
            judged = {j: v for j, v in zip(self.judges, given, strict=True) if v is not None and v.judged}
            if len({v.label for v in judged.values()}) < 2:
                continue
            found: dict[str, Any] = {"id": answer.id, "model": answer.model, "task": answer.task}
            found["verdicts"] = {j: v.label for j, v in judged.items()}
            if may_be_shown(list(judged.values())):
                text = printable(" ".join(answer.answer.text.split()))
                found["answer"] = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
            yield found


def _base(task: str) -> str:
    """The task of a key with a set and a seed: `safety` of `safety:advbench, seed 1`."""
    return task.partition(",")[0].partition(":")[0]


def may_be_shown(verdicts: Sequence[Verdict]) -> bool:
    """Whether an answer may be shown: some judge calls it a refusal, and none says that it gives what was asked."""
    labels = {v.label for v in verdicts}
    return AnswerClass.REFUSAL in labels and labels.isdisjoint(_ANSWERED) and not any(v.success for v in verdicts)


def to_markdown(report: Mapping[str, Any], most: int | None = None) -> str:
    """A report as tables; `most`: of the answers on which judges differ, as many are listed."""
    parts = [f"{report['answers']} answers of {_cell(report['source'])}"]
    parts.append("\n".join(_definition(name, r) for name, r in report["judges"].items()))
    parts.append(_share_table(report["shares"]))
    parts.append("Rates with 95 % Wilson intervals in %, over the judged answers.")
    if report["agreement"]:
        parts.append(_agreement_table(report["agreement"]))
        parts.append("Intervals: bootstrap over requests, 95 %. Unjudged answers are left out.")
    for table in report["confusion"]:
        parts.append(f"{_cell(table['rows'])} (rows) and {_cell(table['columns'])} (columns), answers:")
        parts.append(_matrix(table["counts"]))
    if len(report["judges"]) > 1:
        parts.append(_differences(report["differing"], most))
    return "\n\n".join(parts) + "\n"


def _definition(name: str, record: Mapping[str, Any]) -> str:
    version = f", version {record['version']}" if "version" in record else ""
    return f"- {_cell(name)}{version}; attack success: {_cell(record.get('success', 'not recorded'))}"


def _share_table(shares: Sequence[Mapping[str, Any]]) -> str:
    with_score = any(s["score"] is not None for s in shares)
    head = ["model", "task", "judge", "attack success", *AnswerClass, "unjudged", *["mean score"] * with_score]
    lines = []
    for s in shares:
        rates = [s["attack-success"], *s["classes"].values()]
        missing = f", {s['missing']} to judge" if s["missing"] else ""
        cells = [s["model"], s["task"], s["judge"], *map(_rate, rates), f"{s['unjudged']} of {s['answers']}{missing}"]
        lines.append([*cells, *[f"{s['score']:.2f}" if s["score"] is not None else "-"] * with_score])
    return table(head, lines)


def _agreement_table(agreements: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for a in agreements:
        interval = tuple(a["interval95"]) if a["interval95"] else None
        found = Agreement(a["value"], interval, a["n"])
        same = _rate(a["same"]) if "same" in a else "-"
        lines.append([a["measure"], ", ".join(a["judges"]), a["coefficient"], str(found), same, str(a["n"])])
    return table(["agreement on", "judges", "coefficient", "value", "same", "answers"], lines)


def _matrix(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Without the classes that no answer has."""
    columns = [c for c in AnswerClass if any(row[c] for row in counts.values())]
    rows = {name: row for name, row in counts.items() if any(row.values())}
    return table(["", *columns], [[name, *(str(row[c]) for c in columns)] for name, row in rows.items()])


def _differences(differing: Sequence[Mapping[str, Any]], most: int | None) -> str:
    lines = [f"The judges differ on {len(differing)} answers; of these, refusals are shown."]
    for d in differing[:most]:
        verdicts = ", ".join(f"{judge} {label}" for judge, label in d["verdicts"].items())
        place = ", ".join(filter(None, (d["id"], d["model"], d["task"])))
        lines.append(_cell(f"- {place}: {verdicts}" + (f": {d['answer']!r}" if "answer" in d else "")))
    if most is not None and len(differing) > most:
        lines.append(f"- and {len(differing) - most} more in report.md")
    return "\n".join(lines)


def _rate(rate: Mapping[str, Any] | None) -> str:
    return "-" if rate is None or not rate["n"] else str(Rate(rate["successes"], rate["n"]))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; columns in which every line is empty are left out."""
    kept = [i for i in range(len(head)) if not lines or any(line[i] for line in lines)]
    rows = [[head[i] for i in kept], ["---"] * len(kept), *([line[i] for i in kept] for line in lines)]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: object) -> str:
    return printable(" ".join(str(text).split())).replace("|", "\\|")
