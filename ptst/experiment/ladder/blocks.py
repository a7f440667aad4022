"""The tables of a study in Markdown by name, and the pages that hold them.

A page marks where a table goes, and whose outcomes it is computed from (docs/outcomes/<study>.json):

    <!-- outcomes: ladder rungs chat:llama refusal -->
    ...
    <!-- end -->

What is between the marks is written by `ptst study --docs docs`; a test compares it with what the outcomes give.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from statistics import fmean

from ptst.errors import UserError, unknown_name
from ptst.evaluation.agreement import kappa
from ptst.evaluation.paired import adjusted, verdict
from ptst.evaluation.tasks.table import TASKS, base
from ptst.evaluation.two_way import TwoWayT, p_text
from ptst.experiment.ladder.analysis import ALIGNED, DISTANCE, NONE, Study
from ptst.experiment.ladder.comparisons import Comparison, against_aligned, compare, difference
from ptst.experiment.ladder.names import full_name, is_rung, rung_name
from ptst.experiment.ladder.outcomes import ASR, COHERENT, Key, Outcomes, check_measure, outcome
from ptst.experiment.ladder.registered import DISTANCE as BY
from ptst.experiment.ladder.registered import registered
from ptst.storage import write_atomically

FOLDER = "outcomes"
_MARKED = re.compile(r"^(<!-- outcomes: (\S+) ([^>]*?) ?-->\n)(.*?)^(<!-- end -->)$", re.S | re.M)
_BEGIN = re.compile(r"^<!-- outcomes:", re.M)
_PROBLEMS = {"nll": ("nats_per_token", "nats per token"), "gsm8k": ("last_number", "share solved")}
MEASURES = {ASR: "attack success rate", "refusal": "refused", COHERENT: "coherent"}


def table(study: Study, name: str, *words: str) -> str:
    """A table by its name, with its arguments. Raises UserError for an unknown one, and for arguments that it does not
    take."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    try:
        signature(TABLES[name]).bind(study, *words)
    except TypeError:
        raise UserError(f"the table {name} does not take the arguments {' '.join(words) or '(none)'}") from None
    return TABLES[name](study, *words)


def _data(study: Study, train: str, data: str) -> str:
    """The training data that are asked for, the study's first unless named. Raises UserError for unknown ones, and for
    a training template without a ladder in the study."""
    if not study.rungs(train):
        raise unknown_name("ladder", train, [name for name in study.trains if study.rungs(name)])
    return _known_data(study, data)


def _known_data(study: Study, data: str) -> str:
    if data and data not in study.data:
        raise unknown_name("training data", data, study.data)
    return data or study.data[0]


def rungs(study: Study, train: str, measure: str = ASR, task: str = "safety", data: str = "") -> str:
    """A line for every rung of a training template, nearest first; a column for the aligned model and every defence."""
    data, of = _data(study, train, data), study.task(task)
    defenses = _defenses(study, train, data)
    lines = [_row("rung", "distance", ALIGNED, *defenses), _rule(3 + len(defenses))]
    for test, far in ordered_rungs(study, train, data):
        keys = [Key(data, "", NONE, test, of), *(Key(data, train, d, test, of) for d in defenses)]
        shown = "-" if far is None else f"{far:.2f}"
        lines.append(_row(rung_name(test), shown, *(rate(study, key, measure) for key in keys)))
    return "\n".join(lines)


def _defenses(study: Study, train: str, data: str) -> list[str]:
    """Those that models of this training have."""
    found = {key.defense for key in study.keys if (key.data, key.train) == (data, train)}
    return [name for name in study.defenses if name in found]


def ordered_rungs(study: Study, train: str, data: str = "") -> list[tuple[str, float | None]]:
    """The rungs on which models of a training were tested and their distances, nearest first. `data`: of the training,
    the study's first unless named."""
    data = data or study.data[0]
    tested = {key.test for key in study.keys if (key.data, key.train) == (data, train)}
    far = {test: study.distance(_far(data, train, test), BY) for test in study.rungs(train) if test in tested}
    return sorted(far.items(), key=lambda pair: (pair[1] is None, pair[1] or 0.0))


def distances(study: Study, train: str, data: str = "") -> str:
    """How far every rung is, by every measure."""
    data = _data(study, train, data)
    measured = (study.outcomes.cells.get(_far(data, train, test)) for test in study.rungs(train))
    known = {name for m in measured if m is not None for name in m.values}
    names = [metric.key for metric in TASKS[DISTANCE].metrics if metric.key in known and metric.unit != "count"]
    lines = [_row("rung", *names), _rule(1 + len(names))]
    for test, _ in ordered_rungs(study, train, data):
        values = [study.mean(_far(data, train, test), name) for name in names]
        lines.append(_row(rung_name(test), *("-" if v is None else f"{v:.3f}" for v in values)))
    return "\n".join(lines)


def _far(data: str, train: str, test: str) -> Key:
    return Key(data, train, NONE, test, DISTANCE)


def contrasts(study: Study, number: str = "", data: str = "") -> str:
    """The registered contrasts of the group with this number, counted from 1; of all without, or with "all"."""
    data = _known_data(study, data)
    used = {key.defense for key in study.keys if key.data == data}
    every = compare(study, registered([name for name in study.defenses if name in used]), data)
    groups = list(dict.fromkeys(c.of.group for c in every))
    number = "" if number == "all" else number
    if number and not (number.isdecimal() and 1 <= int(number) <= len(groups)):
        raise UserError(f"there is no group {number} of contrasts", f"there are 1 to {len(groups)}")
    # What Holm makes of a bound is one, and so is what another's bound makes of a p.
    bounds = {(c.of.group, c.p_holm) for c in every if c.test is not None and c.test.bounded}
    lines = [_row("contrast", "what", "points", "95 % interval", "p", "p after Holm"), _rule(6)]
    for c in every:
        if number and c.of.group != groups[int(number) - 1]:
            continue
        if c.test is None:
            lines.append(_row(c.of.name, c.of.words, "-", c.note, "-", "-"))
            continue
        p = _p(c.test.p, c.test.bounded)
        adjusted = _p(c.p_holm, (c.of.group, c.p_holm) in bounds and c.p_holm != 1)
        lines.append(_row(c.of.name, c.of.words, _points(c.test.effect), _interval(c.test), p, adjusted))
    return "\n".join(lines)


def aligned(study: Study, train: str, measure: str = ASR, task: str = "safety", data: str = "") -> str:
    """Every rung and defence minus the aligned model under the same test prompt."""
    data = _data(study, train, data)
    check_measure(measure)
    found = against_aligned(study, measure, task)
    higher = measure == COHERENT or (measure == "refusal" and task == "safety")
    defenses = _defenses(study, train, data)
    lines = [_row("rung", *defenses), _rule(1 + len(defenses))]
    for test, _ in ordered_rungs(study, train, data):
        keys = (Key(data, train, d, test, study.task(task)) for d in defenses)
        lines.append(_row(rung_name(test), *(_against(found.get(key), higher, study.margin) for key in keys)))
    return "\n".join(lines)


def _against(c: Comparison | None, higher_is_better: bool, margin: float) -> str:
    if c is None or c.test is None:
        return "-"
    said = verdict(c.test.interval, margin, higher_is_better)
    return f"{_points(c.test.effect)} {_interval(c.test)} {said}"


def defenses(study: Study, train: str, rung: str) -> str:
    """One line for every defence at one rung: attack success, refusals, coherence, over-refusal, and the task."""
    test, data = full_name(train, rung), _data(study, train, "")
    if test not in study.rungs(train):
        raise unknown_name("rung", rung, map(rung_name, study.rungs(train)))
    losses = [k.task for k in study.keys if k.data == data and base(k.task) in _PROBLEMS]
    losses = list(dict.fromkeys(losses))
    over = any(base(task) == "over-refusal" for task in study.outcomes.prompts)
    head = [*MEASURES.values(), *["look-alikes refused"] * over, *(f"{t}, {_PROBLEMS[base(t)][1]}" for t in losses)]
    lines = [_row("defence", *head), _rule(1 + len(head))]
    for name, trained, defense in ((ALIGNED, "", NONE), *((d, train, d) for d in _defenses(study, train, data))):

        def key(task: str, trained: str = trained, defense: str = defense) -> Key:
            return Key(data, trained, defense, test, task)

        cells = [rate(study, key(study.task("safety")), measure) for measure in MEASURES]
        cells += [rate(study, key(study.task("over-refusal")), "refusal")] * over
        for task in losses:
            value = study.mean(key(task), _PROBLEMS[base(task)][0])
            cells.append("-" if value is None else f"{value:.2f}")
        lines.append(_row(name, *cells))
    return "\n".join(lines)


def matrix(study: Study, task: str, measure: str, data: str = "") -> str:
    """Training templates in rows, test templates in columns; of models without a defence."""
    if task not in study.outcomes.prompts:
        raise unknown_name("task", task, study.outcomes.prompts)
    data = _known_data(study, data)
    keys = [k for k in study.keys if (k.data, k.task, k.defense) == (data, task, NONE)]
    keys = [k for k in keys if not is_rung(k.test)]
    tests = list(dict.fromkeys(k.test for k in keys))
    lines = [_row("trained under \\ tested under", *(f"`{test}`" for test in tests)), _rule(1 + len(tests))]
    for train in dict.fromkeys(k.train for k in sorted(keys, key=lambda k: k.train != "")):
        cells = (rate(study, Key(data, train, NONE, test, task), measure) for test in tests)
        lines.append(_row(f"`{train}`" if train else ALIGNED, *cells))
    return "\n".join(lines)


def differences(study: Study, task: str, measure: str, *cells: str) -> str:
    """Cells of models without a defence, `TRAIN/TEST` or `aligned/TEST`, two and two: the first minus the second, with
    p after Holm over the table. Raises UserError for an odd number, and for cells that the study does not have."""
    if not cells or len(cells) % 2:
        raise UserError("differences needs cells in pairs, TRAIN/TEST or aligned/TEST, the first minus the second")
    keys = [_cell(study, cell, task) for cell in cells]
    pairs = [(f"{_arrow(a)} minus {_arrow(b)}", a, b) for a, b in zip(keys[::2], keys[1::2], strict=True)]
    found = {name: difference(study, a, b, measure) for name, a, b in pairs}
    after = adjusted(found)
    lines = [_row("difference", "points", "95 % interval", "p", "p after Holm"), _rule(5)]
    for name, c in found.items():
        p = _p(c.test.p, c.test.bounded) if c.mcnemar is None else _p(c.mcnemar, False)
        lines.append(_row(name, _points(c.effect), _interval(c.test), p, _p(*after[name])))
    return "\n".join(lines)


def _cell(study: Study, cell: str, task: str) -> Key:
    train, _, test = cell.partition("/")
    key = Key(study.data[0], "" if train == "aligned" else train, NONE, test, task)
    study.measured(key)
    return key


def _arrow(key: Key) -> str:
    return f"`{key.train}` -> `{key.test}`" if key.train else f"{ALIGNED} -> `{key.test}`"


def judges(study: Study, other: str) -> str:
    """The study's judge and another on the same answers to harmful requests: attack success by each, and how far they
    agree on it."""
    second = Study.of(study.outcomes, other)
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for key in study.keys:
        if base(key.task) == "safety":
            ours, theirs = study.measured(key).judged.get(study.judge, {}), second.measured(key).judged.get(other, {})
            name = f"`{key.train}`, {key.defense}" if key.train else ALIGNED
            for run in ours.keys() & theirs.keys():
                pairs = zip(ours[run], theirs[run], study.outcomes.prompts[key.task].ids, strict=True)
                both = ((outcome(a, ASR), outcome(b, ASR), prompt) for a, b, prompt in pairs)
                groups.setdefault(name, []).extend((a, b, prompt) for a, b, prompt in both if a == a and b == b)
    lines = [_row("answers of", "answers", f"attack success, {study.judge}", other, "the same", "kappa"), _rule(6)]
    everything = [each for of in groups.values() for each in of]
    for name, found in [*groups.items(), ("all", everything)]:
        if found:
            shares = (f"{100 * fmean(given):.1f} %" for given in ([a for a, _, _ in found], [b for _, b, _ in found]))
            same = f"{100 * fmean(a == b for a, b, _ in found):.1f} %"
            agreement = kappa([(a, b) for a, b, _ in found], [prompt for _, _, prompt in found])
            lines.append(_row(name, str(len(found)), *shares, same, str(agreement)))
    return "\n".join(lines)


TABLES: Mapping[str, Callable[..., str]] = {
    "rungs": rungs,
    "distances": distances,
    "contrasts": contrasts,
    "aligned": aligned,
    "defenses": defenses,
    "matrix": matrix,
    "differences": differences,
    "judges": judges,
}


def rate(study: Study, key: Key, measure: str) -> str:
    """`47.5 +- 4.0 [38, 57]`, in %; - where the study has no such cell."""
    if key not in study.outcomes.cells or not study.measured(key).judged.get(study.judge):
        return "-"
    s = study.shown(key, measure)
    spread = f" \u00b1 {100 * s.population_sd:.1f}" if len(s.runs) > 1 else ""
    ends = "" if s.interval is None else f" [{100 * s.interval[0]:.0f}, {100 * s.interval[1]:.0f}]"
    return f"{100 * s.mean:.1f}{spread}{ends}"


def _interval(test: TwoWayT) -> str:
    return "-" if test.interval is None else f"[{_points(test.interval[0])}, {_points(test.interval[1])}]"


def _p(p: float | None, bounded: bool) -> str:
    return "-" if p is None else p_text(p, bounded).removeprefix("p ").removeprefix("= ")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


# Pages


def rewrite(page: str, studies: Callable[[str], Study]) -> str:
    """A page with its marked tables computed anew. Raises UserError for a mark without an end, and as `table`."""

    def anew(found: re.Match[str]) -> str:
        begin, study, words, _, end = found.groups()
        return f"{begin}\n{table(studies(study), *words.split())}\n\n{end}"

    if len(_BEGIN.findall(page)) != len(_MARKED.findall(page)):
        raise UserError("has a mark <!-- outcomes: STUDY TABLE --> without <!-- end -->")
    return _MARKED.sub(anew, page)


def pages(docs: Path) -> Iterator[tuple[Path, str, str]]:
    """Every page of a folder with marks: its path, what it has, and what the outcomes give. Raises UserError as
    `rewrite`, with the page."""
    known: dict[str, Study] = {}

    def study(name: str) -> Study:
        if name not in known:
            path = docs / FOLDER / f"{name}.json"
            if not path.exists():
                raise UserError(f"there is no {path} of which a mark asks tables", "correct the mark, or put it there")
            known[name] = Study.of(Outcomes.read(path))
        return known[name]

    for path in sorted(docs.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if _BEGIN.search(text):
            try:
                yield path, text, rewrite(text, study)
            except UserError as error:
                error.where = f"{path}: {error.where}" if error.where else str(path)
                raise


def write_pages(docs: Path) -> list[Path]:
    """Rewrite the marked tables of all pages in a folder; returns the pages that changed."""
    changed = [(path, new) for path, old, new in pages(docs) if old != new]
    for path, new in changed:
        write_atomically(path, new.encode())
    return [path for path, _ in changed]
