"""`python benchmarks/judges.py --pyrit FOLDER --reuter FILE --xstest FILE.csv`: judges on published answers that people
labelled, in the splits of docs/judges.md, which has this table. `ptst judge --report` scores any other file.

A set's own definition says what a refusal is: XSTest counts partial refusals, PyRIT answers to something else.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptst import cli
from ptst.errors import UserError
from ptst.evaluation.judges import find_judge, judge_answers
from ptst.evaluation.rates import Rate
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.generation.request import Answer
from ptst.settings import CommandSettings

_REFUSES = frozenset({AnswerClass.REFUSAL})
_ADDRESSES_NOT = _REFUSES | {AnswerClass.OFF_TOPIC, AnswerClass.INCOHERENT}
_DISCLAIMS = ("as an ai", "i cannot", "i can't", "i do not", "i don't", "i'm not", "i am not", "sorry")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandSettings):
    """Compare judges with published human labels: accuracy, precision, recall, false alarms and errors."""

    pyrit: Path | None = None
    """Folder refusal_scorer of the wheel pyrit 1.1.0."""
    reuter: Path | None = None
    """all_hand_labeled.json of Reuter and Schulze's repository."""
    xstest: tuple[Path, ...] = ()
    """XSTest's CSV files of completions."""
    judge: tuple[str, ...] = ("rules-v3",)
    """Judges by name."""
    test: bool = False
    """Score the test sets instead of the development sets."""
    unrelated: bool = False
    """Pair each request with a complying answer to another one, and count those that the judges notice."""
    errors: bool = False
    """List the requests on which judge and people disagree, with the judge's reason. No answer is printed."""


@dataclass(frozen=True)
class Row:
    """An answer, and whether people call it a refusal."""

    request: str
    answer: str
    refused: bool


@dataclass(frozen=True)
class LabelledSet:
    """Answers with labels. `counted`: the classes of a judge that are refusals by the set's definition."""

    name: str
    rows: Sequence[Row]
    counted: frozenset[AnswerClass] = _REFUSES


@dataclass(frozen=True)
class Score:
    """Counts of answers by what people and a judge say; an unjudged answer is no refusal. `disclaimed`: false alarms
    on answers that comply after words of a disclaimer."""

    right: Rate
    precision: Rate
    recall: Rate
    disclaimed: Rate


def labelled_sets(config: ReportConfig) -> Iterator[LabelledSet]:
    """The sets that `config` names, in its split. Raises UserError, with file and column, for one of another layout."""
    if config.pyrit:
        main = _pyrit(config.pyrit / "refusal.csv")
        if not config.test:
            yield LabelledSet("PyRIT refusal", main, _ADDRESSES_NOT)
        else:
            seen = {row.answer for row in main}
            new = [row for row in _pyrit(config.pyrit / "refusal_extra.csv") if row.answer not in seen]
            yield LabelledSet("PyRIT refusal_extra, new answers", new, _ADDRESSES_NOT)
    if config.reuter:
        found = json.loads(config.reuter.read_text("utf-8"))[int(config.test) :: 2]
        tones = ("rejected", "complied")
        rows = [Row(r["prompt"], r["response"], r["tone"] == "rejected") for r in found if r["tone"] in tones]
        yield LabelledSet("Reuter and Schulze, " + ("odd" if config.test else "even"), rows)
    for path in config.xstest:
        found = _read(path.read_text("utf-8"), ("prompt", "completion", "final_label"), path)
        rows = [Row(r["prompt"], r["completion"], not r["final_label"].startswith("1")) for r in found]
        yield LabelledSet(f"XSTest {path.stem}", rows, _REFUSES | {AnswerClass.PARTIAL})


def _pyrit(path: Path) -> list[Row]:
    lines = path.read_text("utf-8-sig").splitlines(keepends=True)
    text = "".join(lines[next((i for i, line in enumerate(lines) if not line.startswith("#")), 0) :])
    rows = _read(text, ("objective", "assistant_response", "human_score"), path)
    return [Row(r["objective"], r["assistant_response"], r["human_score"] == "1") for r in rows]


def _read(text: str, columns: Sequence[str], where: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = list(reader.fieldnames or ())
    if missing := [c for c in columns if c not in names]:
        raise UserError(f"lacks the column {missing[0]}; it has {', '.join(names) or 'none'}", where=where)
    return list(reader)


def score(labelled: LabelledSet, verdicts: Sequence[Verdict]) -> Score:
    """A judge's verdicts on a set, against its labels."""
    pairs = [(row, v.label in labelled.counted) for row, v in zip(labelled.rows, verdicts, strict=True)]
    hits = sum(says and row.refused for row, says in pairs)
    alarms = [says for row, says in pairs if not row.refused and _disclaims(row.answer)]
    return Score(
        Rate(sum(says == row.refused for row, says in pairs), len(pairs)),
        Rate(hits, sum(says for _, says in pairs)),
        Rate(hits, sum(row.refused for row, _ in pairs)),
        Rate(sum(alarms), len(alarms)),
    )


def _disclaims(answer: str) -> bool:
    opening = answer[:200].lower().replace("\u2019", "'")
    return any(words in opening for words in _DISCLAIMS)


def unrelated(config: ReportConfig) -> dict[str, tuple[Rate, Rate]]:
    """Print, and return by set and judge, the shares of answers that are called off topic or incoherent: of complying
    answers put under another request of the set, half the set away, and under their own (false alarms)."""
    out = {}
    print("| set | pairs | judge | unrelated found | false alarms |\n" + "|---" * 5 + "|")
    for labelled in labelled_sets(config):
        own = [(row.request, Answer([], row.answer, "stop")) for row in labelled.rows if not row.refused]
        moved = [*own[len(own) // 2 :], *own[: len(own) // 2]]
        other = [(request, answer) for (request, _), (of, answer) in zip(own, moved, strict=True) if request != of]
        for name in config.judge:
            judge = find_judge(name)
            rates = []
            for pairs in (other, own):
                verdicts = judge_answers(judge, pairs)
                rates.append(Rate(sum(v.label in _ADDRESSES_NOT - _REFUSES for v in verdicts), len(pairs)))
            out[f"{labelled.name}, {name}"] = rates[0], rates[1]
            print(f"| {labelled.name} | {len(other)} | {name} | {rates[0]} | {rates[1]} |")
    return out


def report(config: ReportConfig) -> dict[str, Score] | dict[str, tuple[Rate, Rate]]:
    """Print a table, a row for each set and judge; the figures by both."""
    if config.unrelated:
        return unrelated(config)
    out = {}
    print("| set | n, refusals | judge | accuracy | precision | recall | false alarms after a disclaimer |")
    print("|---|---|---|---|---|---|---|")
    for labelled in labelled_sets(config):
        answered = [(row.request, Answer([], row.answer, "stop")) for row in labelled.rows]
        for name in config.judge:
            verdicts = judge_answers(find_judge(name), answered)
            found = out[f"{labelled.name}, {name}"] = score(labelled, verdicts)
            cells = (found.right, found.precision, found.recall)
            values = " | ".join(f"{rate.value:.3f}" for rate in cells)
            count = f"{len(answered)}, {found.recall.n}"
            alarms = f"{found.disclaimed.successes} of {found.disclaimed.n}"
            print(f"| {labelled.name} | {count} | {name} | {values} | {alarms} |")
            if config.errors:
                for row, verdict in zip(labelled.rows, verdicts, strict=True):
                    if (verdict.label in labelled.counted) != row.refused:
                        people = "refusal" if row.refused else "no refusal"
                        print(f"  people {people}: {row.request} -> {verdict.label}, {verdict.reason}")
    return out


if __name__ == "__main__":
    cli.run(report, ReportConfig, "judges")
