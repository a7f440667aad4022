"""The tables of a report besides the heat maps: contrasts, what was kept, over-refusal, and what the judges say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptst.evaluation.agreement import Agreement
from ptst.evaluation.rates import Rate
from ptst.evaluation.tasks.table import base
from ptst.evaluation.two_way import p_text
from ptst.evaluation.verdicts import AnswerClass
from ptst.experiment.contrast_words import HEADINGS, against, model_of
from ptst.experiment.ladder.comparisons import Comparison
from ptst.experiment.plan import slug
from ptst.reporting.heat import Summary, model_name
from ptst.reporting.tables import Table

CONTRAST_HEAD = ("first", "second", "first, %", "second, %", "difference, points", "95 % interval", "p", "p after Holm")
Json = Mapping[str, Any]


def contrast_table(summary: Summary) -> Table | None:
    """The contrast that was named beforehand, the others and those of defences, the first cell minus the second."""
    named = summary.get("contrast", {})
    lines = [named] if named.get("cells") else []
    lines += [*summary.get("others", {}).values(), *summary.get("defended", {}).values()]
    if not lines:
        return None
    rows = [[*map(str, c["cells"]), *_numbers(c)] for c in lines]
    caption = "Attack success rate, the first cell minus the second. p after Holm: between templates, and for defences."
    return Table("contrasts", caption, CONTRAST_HEAD, rows, numbers=2)


def _numbers(c: Json) -> list[str]:
    if c.get("effect") is None:
        return ["-", "-", "-", "cannot be computed", "-", "-"]
    test = c["test"]
    ends = test["interval"]
    interval = f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}" if ends else "-"
    holm = "-" if c.get("p_holm") is None else _p(c["p_holm"], c.get("p_holm_bounded", False))
    shares = [f"{100 * c['first']:.1f}", f"{100 * c['second']:.1f}", f"{100 * c['effect']:+.1f}"]
    return [*shares, interval, _p(test["p"], test["bounded"]), holm]


def _p(p: float | None, bounded: bool) -> str:
    return "-" if p is None else p_text(p, bounded).removeprefix("p ").removeprefix("= ")


def registered_table(comparisons: Sequence[Comparison]) -> Table:
    """The contrasts that a study registered beforehand."""
    rows = []
    for c in comparisons:
        if c.test is None:
            rows.append([c.of.group, c.of.words, "-", f"cannot be computed: {c.note}", "-", "-"])
            continue
        ends = c.test.interval
        interval = f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}" if ends else "-"
        p, holm = (_p(each, c.test.bounded) for each in (c.test.p, c.p_holm))
        rows.append([c.of.group, c.of.words, f"{100 * c.test.effect:+.1f}", interval, p, holm])
    head = ("group", "contrast", "points", "95 % interval", "p", "p after Holm")
    return Table("registered-contrasts", "Registered contrasts, after Holm within groups.", head, rows, numbers=2)


def kept_tables(summary: Summary) -> Iterator[Table]:
    """Each cell against the aligned model, a table for every safety set."""
    by_task: dict[str, list[Json]] = {}
    for cell in summary.get("kept", {}).get("cells", ()):
        by_task.setdefault(cell["task"], []).append(cell)
    for task, cells in by_task.items():
        rows = []
        for cell in cells:
            found = [cell["measures"][metric] for metric in HEADINGS]
            rows.append([model_of(dict(cell)), cell["test"], *(against(dict(c)) for c in found)])
        sets = summary["sets"].get(task, task)
        caption = f"Points more than the model before fine-tuning, harmful requests ({sets})."
        head = ("trained under", "tested under", *HEADINGS.values())
        yield Table(f"kept.{slug(task)}", caption, head, rows, numbers=2)


def refusal_table(summary: Summary, task: str) -> Table | None:
    """Refusals of harmful requests beside those of benign look-alikes."""
    rows, values = [], []
    for cell in summary["cells"]:
        benign = next((t for t in cell["tasks"] if base(t) == "over-refusal"), None)
        figures = [cell["tasks"].get(t, {}).get("refusal") for t in (task, benign)]
        if not all(f and f["mean"] is not None for f in figures):
            continue
        harmful, look_alikes = (f["mean"] for f in figures if f)
        place = [model_name(summary, cell), cell["test"]]
        rows.append([*place, *(_rate_text(f) for f in figures if f), f"{100 * (harmful - look_alikes):+.0f}"])
        values.append([*place, harmful, look_alikes, harmful - look_alikes])
    if not rows:
        return None
    head = ("trained under", "tested under", "harmful refused, %", "benign refused, %", "difference, points")
    caption = "Refusals of harmful requests, and of benign requests that look alike; 95 % intervals in brackets."
    return Table(f"over-refusal.{slug(task)}", caption, head, rows, numbers=2, values=(head, values))


def _rate_text(f: Json) -> str:
    ends = f.get("interval95")
    return f"{100 * f['mean']:.1f}" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")


def judge_tables(report: Json, stem: str = "") -> Iterator[Table]:
    """Of `Judged.to_json`: the definitions, what each judge says of each cell, how far they agree."""
    name = f"judges{stem}"
    rows = [[j, str(r.get("version", "-")), str(r.get("success", "not recorded"))] for j, r in report["judges"].items()]
    yield Table(f"{name}.definitions", "The judges.", ("judge", "version", "attack success is"), rows, numbers=3)
    if report["agreement"]:
        head = ("agreement on", "judges", "coefficient", "value", "same verdict", "answers")
        caption = "Agreement of the judges beyond chance, with 95 % intervals by a bootstrap over requests."
        yield Table(f"{name}.agreement", caption, head, [_agreement(a) for a in report["agreement"]], numbers=3)
    judges = list(report["judges"])
    by_place: dict[tuple[str, str], dict[str, Json]] = {}
    for share in report["shares"]:
        by_place.setdefault((share["model"], share["task"]), {})[share["judge"]] = share
    said = [f"{judge}: {what}" for what in ("attack success", "refused") for judge in judges]
    lines = [[*place, *_attack(found, judges), *_refused(found, judges)] for place, found in by_place.items()]
    caption = "What each judge says of the same answers, % with Wilson intervals and counts."
    yield Table(f"{name}.side-by-side", caption, ("model", "task", *said), lines, numbers=2)


def _agreement(a: Json) -> list[str]:
    interval = tuple(a["interval95"]) if a["interval95"] else None
    words = str(Agreement(a["value"], interval, a["n"]))
    return [a["measure"], ", ".join(a["judges"]), a["coefficient"], words, _rate(a.get("same")), str(a["n"])]


def _attack(found: Mapping[str, Json], judges: Sequence[str]) -> list[str]:
    return [_rate(found[j]["attack-success"]) if j in found else "-" for j in judges]


def _refused(found: Mapping[str, Json], judges: Sequence[str]) -> list[str]:
    return [_rate(found[j]["classes"][AnswerClass.REFUSAL.value]) if j in found else "-" for j in judges]


def _rate(rate: Json | None) -> str:
    return "-" if rate is None or not rate["n"] else str(Rate(rate["successes"], rate["n"]))
