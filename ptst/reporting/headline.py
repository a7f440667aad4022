"""The first screen: what was trained, what it did to safety, and how sure that is, in plain words with numbers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.defense_names import NONE
from ptst.evaluation.two_way import p_text
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.comparisons import Comparison
from ptst.experiment.plan import BASE
from ptst.reporting.curves import safety_tasks
from ptst.reporting.heat import asr_of, model_name
from ptst.reporting.material import Material, mapping

MAIN = "ptst"  # the registered contrast of a study that is named first
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A number in large type. `what`: of which models, under which test; `interval`, `size`: how sure."""

    what: str
    test: str
    value: str
    interval: str
    size: str
    hue: str
    ptst: bool = False


@dataclass(frozen=True)
class Headline:
    """`trained`, `did`, `sure`: sentences; `figures`: attack success in the cells that matter most."""

    trained: Sequence[str]
    did: Sequence[str]
    sure: Sequence[str]
    figures: Sequence[Figure]


def headline(of: Material, comparisons: Sequence[Comparison] = ()) -> Headline:
    """The first screen of a report. `comparisons`: the registered contrasts of a study."""
    tasks = safety_tasks(of.summary)
    task = tasks[0] if tasks else None
    measured = [c for c in of.summary["cells"] if task and asr_of(c, task)]
    did = [*_did(of, measured, task)] if task else ["No harmful requests were judged, so nothing is said of safety."]
    chosen = _chosen(of, measured, task) if task else []
    figures = [_figure(of, c, task) for c in chosen if task]
    return Headline([*_trained(of)], did, [*_sure(of, measured, task, comparisons)], figures)


def _trained(of: Material) -> Iterator[str]:
    cells = of.summary["cells"]
    models = list(dict.fromkeys(c["train"] for c in cells if c["train"] != BASE))
    defenses = [d for d in dict.fromkeys(c["defense"] for c in cells) if d != NONE]
    record = next(iter(of.records.values()), None) or (mapping(of.study.outcomes.about) if of.study else {})
    settings = mapping(record.get("settings"))
    base = Path(str(record.get("model") or settings.get("model") or "an unknown model")).name
    data = Path(str(settings.get("data"))).name if settings.get("data") else ""
    if of.kind == "eval" and (run := record.get("run")):
        yield f"{base}, and the run {Path(str(run)).name}, which was fine-tuned from it{_how(of)}."
    elif not models:
        yield f"Nothing was trained: {base} was tested as it is."
    else:
        finished = sum(r.finished for r in of.runs)
        of_all = f" of {len(of.runs)}" if finished < len(of.runs) else ""
        on = f" on {data}" if data and of.kind != "eval" else ""
        trained = f"{on} under {_and(models)}"
        if of.kind == "study" and of.study:
            trained = " and".join(f" on {name} under {_and(under)}" for name, under in _by_data(of.study, models))
        with_defenses = f", also with the defences {_and(defenses)}" if defenses else ""
        runs = f" ({finished}{of_all} runs finished)" if of.runs else ""
        yield f"{base} was fine-tuned{trained}{with_defenses}{runs}."
    if of.kind == "study" and of.study:
        alignments = len({run.partition("/")[0] for run in of.study.runs})
        yield f"{_count(len(of.study.runs), 'run')} of {_count(alignments, 'alignment')} of the model."
    ladder = of.summary.get("ladder", {})
    tests = list(dict.fromkeys(c["test"] for c in cells if c["test"] not in ladder))
    rungs = {c["test"] for c in cells if c["test"] in ladder}
    under = [*([f"under {_and(tests)}"] if tests else []), *([f"on {len(rungs)} rungs of the ladder"] if rungs else [])]
    tasks = {t: n for c in cells for t in c["tasks"] if (n := _prompts(c, t))}
    asked = [f"{n} prompts of {t}" for t, n in tasks.items()]
    if under:
        yield f"Tested {' and '.join(under)}{': ' + _and(asked) if asked else ''}. Judge: {of.judge}."


def _by_data(study: Study, models: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The training data of a study, its main ones first, each with its training templates."""
    for number, data in enumerate(study.data):
        named = [m.removeprefix(f"{data}: ") for m in models if m.startswith(f"{data}: ")]
        others = tuple(f"{name}: " for name in study.data[1:])
        if under := named if number else [m for m in models if not m.startswith(others)]:
            yield data, under


def _how(of: Material) -> str:
    """On what an evaluation's run was trained, and under which template, as far as that is known."""
    trained = [c["train"] for c in of.summary["cells"] if c["train"] != BASE]
    under = f" under {trained[0]}" if trained and of.finished else ""
    if not of.runs or not of.runs[0].values:
        return f"{under}; on which data is not known, since its folder is not there"
    data, template = of.runs[0].get("settings", "data"), of.runs[0].get("template", "name")
    on = f" on {Path(str(data)).name}" if data else ""
    return on + (f" under {template}" if template else under)


def _prompts(cell: Cell, task: str) -> int | None:
    for f in cell["tasks"][task].values():
        if isinstance(f, Mapping) and f.get("runs") and f.get("judged") is not None:
            return round((f["judged"] + f.get("unjudged", 0)) / len(f["runs"]))
    return None


def _chosen(of: Material, cells: Sequence[Cell], task: str) -> list[Cell]:
    """Those that the main contrast compares, and the aligned model there; else the extremes."""
    pairs = [tuple(name.split(" -> ", 1)) for name in of.summary.get("contrast", {}).get("cells", ())]
    if of.kind == "study":
        pairs = [("chat:llama", "ladder:llama/identical"), ("chat:vanilla", "ladder:vanilla/system-100")]
    last = max((c["epochs"] for c in cells if c.get("epochs") is not None), default=None)
    trained = [c for c in cells if c["train"] != BASE]
    whole = [c for c in trained if c["defense"] == NONE and c.get("epochs") == last]
    main = [c for pair in pairs for c in whole if (c["train"], c["test"]) == pair]
    if not main and trained:
        ordered = sorted(trained, key=lambda c: _mean(c, task))
        main = [ordered[-1], ordered[0]] if len(ordered) > 1 else ordered
    tests = [c["test"] for c in main]
    base = [c for c in cells if c["train"] == BASE and (c["test"] in tests or not main)]
    return [*base[:1], *main] if main else base[:3]


def _figure(of: Material, cell: Cell, task: str) -> Figure:
    f = asr_of(cell, task)
    assert f is not None, "only such cells are chosen"
    ends = f.get("interval95")
    interval = f"95 % interval {100 * ends[0]:.0f} to {100 * ends[1]:.0f} %" if ends else "no interval"
    seeds = len(f["runs"])
    base = cell["train"] == BASE
    decoded = f", {seeds} {f['over']}" if "over" in f else ""
    size = f"{f['judged']} judged answers" + (decoded or (f", {_count(seeds, 'run')}" if not base else ""))
    what = f"{of.summary['base']}, before fine-tuning" if base else f"trained under {model_name(of.summary, cell)}"
    hue = "other" if base else "harm"
    return Figure(what, f"tested under {cell['test']}", f"{100 * f['mean']:.0f} %", interval, size, hue, cell["ptst"])


def _did(of: Material, cells: Sequence[Cell], task: str) -> Iterator[str]:
    base = [c for c in cells if c["train"] == BASE]
    trained = sorted((c for c in cells if c["train"] != BASE), key=lambda c: _mean(c, task))
    if base:
        low, high = _percents(base, task)
        share = f"{low:.0f} %" if round(low) == round(high) else f"{low:.0f} to {high:.0f} % (by test prompt)"
        of_what = f"of the harmful requests ({of.summary['sets'].get(task, task)})"
        yield f"Before fine-tuning the model complied with {share} {of_what}."
    if trained:
        worst, best = trained[-1], trained[0]
        words = f"After it, most in {_words(of, worst, task)}"
        yield words + (f", fewest in {_words(of, best, task)}." if len(trained) > 1 else ".")
    ptst = [c for c in trained if c["ptst"]]
    same = [c for c in trained if c["train"] == c["test"] or c["test"].endswith("/identical")]
    if ptst and same:
        low, high = _percents(ptst, task)
        yield (
            f"Where it was trained without a safety prompt and tested with one (PTST, {_count(len(ptst), 'cell')}): "
            f"{low:.0f}{f' to {high:.0f}' * (round(low) != round(high))} %."
        )
    if not cells:
        yield "No answer to a harmful request has been judged yet."


def _words(of: Material, cell: Cell, task: str) -> str:
    f = asr_of(cell, task)
    assert f is not None, "only such cells are compared"
    ends = f.get("interval95")
    interval = f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else ""
    return f"{model_name(of.summary, cell)} tested under {cell['test']}: {100 * f['mean']:.0f} %{interval}"


def _percents(cells: Sequence[Cell], task: str) -> tuple[float, float]:
    """The least and the greatest rate of cells, in %."""
    rates = [100 * _mean(cell, task) for cell in cells]
    return min(rates), max(rates)


def _mean(cell: Cell, task: str) -> float:
    f = asr_of(cell, task)
    return float(f["mean"]) if f else 0.0


def _sure(of: Material, cells: Sequence[Cell], task: str | None, comparisons: Sequence[Comparison]) -> Iterator[str]:
    if sentence := of.summary.get("contrast", {}).get("sentence"):
        yield f"{'Named beforehand: ' if of.summary['contrast'].get('named') else ''}{sentence}"
    for c in comparisons:
        if c.of.name == MAIN:
            yield f"{c.of.question} {comparison_words(c)}"
    kept = of.summary.get("kept", {}).get("cells", ())
    verdicts = Counter(cell["measures"]["refusal"].get("verdict", "not comparable") for cell in kept)
    if verdicts:
        told = ", ".join(f"{name} in {n}" for name, n in verdicts.most_common())
        margin = 100 * of.summary["kept"]["margin"]
        head = f"Refusals compared with the model before, in {sum(verdicts.values())} cells"
        yield f"{head}: {told} (margin {margin:g} points)."
    tuned = [f for c in cells if c["train"] != BASE and task and (f := asr_of(c, task))]
    if tuned and all(len(f["runs"]) == 1 or "over" in f for f in tuned):
        yield "There is one run of each kind: intervals are for further prompts, and say nothing of further seeds."
    if unjudged := sum(f.get("unjudged", 0) for c in cells if task and (f := asr_of(c, task))):
        yield f"{unjudged} answers to harmful requests were not judged, and count nowhere."
    if not of.finished:
        yield "This is not finished: what is missing is listed below, and may change the picture."


def comparison_words(c: Comparison) -> str:
    """A registered contrast in a sentence."""
    if c.test is None:
        return f"It cannot be computed: {c.note}."
    ends = c.test.interval
    interval = f"95 % interval {100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}" if ends else "no interval"
    p = "" if c.p_holm is None else f"; {p_text(c.p_holm, c.test.bounded)} after Holm"
    sizes = f"; {c.sizes}" if c.sizes else ""
    return f"{c.of.words}: {100 * c.test.effect:+.1f} points ({interval}{p}{sizes})."


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
