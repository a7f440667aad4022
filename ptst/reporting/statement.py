"""The reproducibility statement: everything that somebody needs who wants to do it again, or to doubt it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptst import __version__
from ptst.records import bare
from ptst.reporting.material import Material
from ptst.reporting.runs import StoredRun
from ptst.reporting.tables import Table

NOT_READ = "not read: no meter could be (RAPL of the processor, often for root alone; NVML of the GPU)"
_NOT_SETTINGS = ("config", "print_config", "debug", "json", "dry_run")


@dataclass(frozen=True)
class Group:
    """A part of the statement: names and values."""

    title: str
    pairs: Sequence[tuple[str, str]]
    folded: bool = False


def statement(of: Material) -> Iterator[Group]:
    """All groups, the settings last."""
    yield Group("Hardware, time and energy", [*_machine(of)])
    yield Group("Audit", [*_audit(of.runs)])
    for name, record in of.records.items():
        yield Group(f"Model and data of {name}", [*_prints(record)])
    yield Group("Versions", [*_versions(of)])
    for name, record in of.records.items():
        settings = record.get("settings")
        if isinstance(settings, Mapping):
            yield Group(f"Every setting of {name}", [*_flat(settings)], folded=True)
        if isinstance(templates := record.get("templates"), Mapping):
            yield Group(f"Words of the templates of {name}", [*_flat(templates, own=True)], folded=True)


def runs_table(runs: Sequence[StoredRun]) -> Table | None:
    """What every run was trained on and how it went; None where there is none."""
    if not runs:
        return None
    head = ["run", "seed", "status", "steps", "examples", "tokens", "in the loss"]
    head += ["loss before", "loss after", "seconds"]
    rows = []
    for run in runs:
        counts = [run.get("trained", key) for key in ("examples", "tokens", "trained_tokens")]
        losses = [run.get("validation_loss", key) for key in ("before", "after")]
        status = "finished" if run.finished else str(run.values.get("status", "unreadable"))
        own = [run.name, _text(run.get("settings", "seed")), status, _text(run.values.get("steps"))]
        rows.append([*own, *map(_text, counts), *(_number(x) for x in losses), _seconds(run.get("time", "seconds"))])
    caption = "Runs: steps, examples as often as they were seen, their tokens, those in the loss, validation losses."
    return Table("runs", caption, head, rows, numbers=3)


def _machine(of: Material) -> Iterator[tuple[str, str]]:
    found = [run.get("environment") for run in of.runs]
    places = [r for r in [*(r.get("environment") for r in of.records.values()), *found] if isinstance(r, Mapping)]
    devices = dict.fromkeys(
        f"{p.get('device')}, {p.get('cpu_count')} cores, {p.get('threads')} threads" for p in places
    )
    yield "Hardware", "; ".join(devices) or "not recorded"
    if peak := max((run.peak_memory for run in of.runs), default=0):
        yield "Peak memory of training", f"{peak / 2**30:.1f} GiB"
    training = [s for run in of.runs if isinstance(s := run.get("time", "seconds"), (int, float))]
    yield "Training", f"{_duration(sum(training))} in {len(training)} runs" if training else "not recorded"
    testing = of.seconds.get("testing")
    yield "Testing", f"{_duration(testing)} in all cells" if testing else "not recorded"
    yield "Energy", _energy([*(run.get("time", "joules") for run in of.runs), *of.testing_joules])


def _energy(each: Sequence[Any]) -> str:
    """In kWh by meter. `each`: joules by meter of every run and cell, None of those without a meter."""
    kilowatt_hours: dict[str, float] = {}
    counted = [joules for joules in each if isinstance(joules, Mapping) and joules]
    for joules in counted:
        for name, count in joules.items():
            if isinstance(count, (int, float)):
                kilowatt_hours[name] = kilowatt_hours.get(name, 0.0) + count / 3.6e6
    if not kilowatt_hours:
        return NOT_READ
    meters = ", ".join(f"{name} {value:.3g} kWh" for name, value in kilowatt_hours.items())
    of = f"{len(counted)} of {len(each)} runs and cells"
    return f"{meters}, in {of}; all that the machine did meanwhile, so what ran side by side is counted twice"


def _audit(runs: Sequence[StoredRun]) -> Iterator[tuple[str, str]]:
    """What the audit at the start and at every step of a run let pass."""
    finished = [run for run in runs if run.finished]
    if not finished:
        yield "Verdict", "no finished run was trained here, so there is none"
        return
    allowed = dict.fromkeys(rule for run in finished for rule in run.get("settings", "allow") or ())
    known = [run for run in finished if run.get("account")]
    yield (
        "Verdict",
        f"passed: {len(finished)} of {len(runs)} runs finished, and training stops at the first error of the audit "
        "that is not allowed, before its first step and at every step",
    )
    yield "Errors that were allowed", ", ".join(map(str, allowed)) or "none"
    yield "Visits of every example counted", f"in {len(known)} of {len(finished)} finished runs"
    for words, key in (("Rows dropped", "dropped"), ("Rows cut", "cut"), ("Rows without a trained token", "untrained")):
        numbers = [n for run in finished if isinstance(n := run.get("data", key), int)]
        yield words, f"{sum(numbers)} in all runs" if numbers else "not recorded"


def _prints(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("model", "weights", "tokenizer", "run", "run_weights", "adapter_weights", "chat_format", "dtype"):
        if record.get(name):
            yield name.replace("_", " "), bare(str(record[name]))
    family = record.get("family")
    if family:
        yield "family", str(family.get("name")) if isinstance(family, Mapping) else str(family)
    for group, words in (("sources", "training data"), ("tests", "test data"), ("data", "test data")):
        found = record.get(group)
        for name, value in found.items() if isinstance(found, Mapping) else ():
            yield f"{words} {bare(str(name))}", str(value.get("fingerprint") if isinstance(value, Mapping) else value)


def _versions(of: Material) -> Iterator[tuple[str, str]]:
    for words, n in of.made_with.items():
        yield "Cells made with", f"{words} ({n} cells)"
    seen = set[tuple[str, str]]()
    for record in of.records.values():
        environment = record.get("environment")
        if not isinstance(environment, Mapping):
            continue
        versions = environment.get("versions")
        own = {**(versions if isinstance(versions, Mapping) else {}), "python": environment.get("python")}
        own["git commit"] = environment.get("git_commit") or "not known"
        for name, value in own.items():
            pair = (str(name), str(value) if value is not None else "not installed")
            if pair not in seen:
                seen.add(pair)
                yield pair
    yield "This page written by", f"ptst {__version__}"


def _flat(values: Mapping[str, Any], prefix: str = "", own: bool = False) -> Iterator[tuple[str, str]]:
    """Every value by its path. `own`: texts stay as they are; else folders of this machine are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.", own)
        elif name not in _NOT_SETTINGS:
            yield f"{prefix}{name}", _setting(value, own)


def _setting(value: Any, own: bool) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(each, own) for each in value) or "none"
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return bare(value) if isinstance(value, str) and not own else str(value)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "-"


def _seconds(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, (int, float)) else "-"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{hours} h {minutes} min" if hours else f"{minutes} min"
