"""How `same_numbers.py` reads what a checkout wrote, whatever it calls its flags, files and keys.

The tables below are all that has to know of a renaming: on the left or first stands the name under which a number is
recorded, or any old one; beside it the other spellings. A number whose key is in no table is recorded under its own
name, so a key that was renamed without an entry here shows up as one number missing and another one added.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Flags (without a grid's "train." or "eval."): the workload's spelling, then others. The first that --help lists is
# given; where it lists none, the workload's own is.
FLAGS = {
    "--micro-tokens": ("--micro-batch-tokens",),
    "--recompute": ("--activation-checkpointing",),
}
# Keys, rules, levels, classes and the names in file names: the name in the record, then others.
NAMES = {
    "held_out_loss": ("validation_loss",),
    "held_out": ("validation",),
    "micro_tokens": ("micro_batch_tokens",),
    "recompute": ("activation_checkpointing",),
    "untouched": ("base", "base_model"),
    "fine-tuned": ("tuned", "finetuned", "fine_tuned"),
    "info": ("note",),
    "seams": ("token_boundaries",),
    "role_marks": ("role_markers",),
    "seam": ("token-boundary",),
    "role-marks": ("role-markers",),
    "own-template": ("chat-template",),
    "departure": ("known-difference",),
    "positions": ("position-ids",),
    "targets": ("labels",),
    "rows": ("runs",),
}
# Levels of nesting that may come and go around a number without changing what it is.
TRANSPARENT = {"rates", "values", "metrics", "figures"}
# What no comparison is about: times, settings, the machine; strings are never compared.
IGNORED = {
    "time",
    "seconds",
    "finished_at",
    "environment",
    "flags",
    "settings",
    "templates",
    "version",
    "format_version",
}
IGNORED |= {"schema_version"}
# Fields, by what they hold.
FIELDS = {
    "answer": ("answer", "answer_text", "text"),
    "cut": ("cut", "truncated", "hit_limit"),
    "asked": ("prompt", "question"),
    "class": ("class", "label", "answer_class"),
    "kind": ("kind", "type"),
    "step": ("step",),
    "results": ("results", "models"),
    "findings": ("findings",),
    "rule": ("rule", "rule_name"),
    "level": ("level", "severity"),
    "row": ("row", "source", "place"),
    "token": ("token", "token_index"),
    "rows": ("rows", "shown_rows"),
    "tokens": ("tokens",),
    "id": ("id", "token_id"),
    "trained": ("trained", "is_trained"),
    "target": ("target", "target_id", "label"),
    "position": ("position",),
    "cells": ("cells",),
    "train": ("train", "train_template"),
    "test": ("test", "test_template"),
}
# Files in a folder that a command wrote; the first pattern that matches anything counts.
METRICS = ("metrics.jsonl", "logs/metrics.jsonl")
SAMPLES = ("samples.jsonl", "logs/samples.jsonl")
RESULTS = ("results.json", "result.json")
STATES = ("state/step-*", "states/step-*", "checkpoints/step-*")
WEIGHTS = ("adapter_model.safetensors", "adapter/*.safetensors", "model*.safetensors", "model/*.safetensors")
BEST = ("best",)

_MEANT = {other: name for name, others in NAMES.items() for other in others}


class Unreadable(Exception):
    """Something of a checkout's output is not where any table says."""


def meant(name: Any) -> str:
    """The name under which a key, rule, level or class is recorded."""
    return _MEANT.get(str(name), str(name))


def canonical(part: dict[str, Any]) -> dict[str, Any]:
    """A recorded part under the names of today's tables, so that a record outlives an entry that is added to them."""
    found = {"/".join(meant(name) for name in key.split("/")): value for key, value in part.items()}
    if isinstance(found.get("findings"), list):
        found["findings"] = sorted(" ".join(meant(word) for word in f.split(" ")) for f in found["findings"])
    return found


def field(row: dict[str, Any], name: str) -> Any:
    for key in FIELDS[name]:
        if key in row:
            return row[key]
    raise Unreadable(f"none of {', '.join(FIELDS[name])} is among {', '.join(map(str, row))}; extend FIELDS")


def has(row: dict[str, Any], name: str) -> bool:
    return any(key in row for key in FIELDS[name])


def find(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    raise Unreadable(f"{folder.name} has none of {', '.join(patterns)}; extend that table")


def numbers(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every number in a JSON value, under its recorded names joined by slashes."""
    found: dict[str, Any] = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            name = meant(key)
            if name not in IGNORED:
                found |= numbers(inner, path if name in TRANSPARENT else (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found |= numbers(inner, (*path, str(i)))
    elif isinstance(value, int | float):
        found["/".join(path)] = exact(value)
    return found


def exact(value: Any) -> Any:
    """A float as its shortest exact spelling, so that JSON cannot change it; a whole one is that whole number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else repr(value)
    return value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def weights(folder: Path) -> str:
    """sha256 over the bytes of the trained tensors, in the order of their names."""
    tensors: dict[str, torch.Tensor] = {}
    for path in find(folder, WEIGHTS):
        tensors |= load_file(path)
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run(folder: Path) -> dict[str, Any]:
    """All numbers of a training run: of each step and look, the sample answers, the weights."""
    found: dict[str, Any] = {"weights": weights(folder)}
    for row in json_lines(find(folder, METRICS)[0]):
        found |= numbers(row, ("step" if "loss" in row else "look", str(field(row, "step"))))
    if not any(name.startswith("step/") for name in found):
        raise Unreadable(f"{folder.name}: no row of the metrics has a loss")
    try:
        samples = json_lines(find(folder, SAMPLES)[0])
        found["samples"] = digest([field(row, "answer") for row in samples])
    except Unreadable:
        found["samples"] = None
    found["best weights"] = next((weights(folder / name) for name in BEST if (folder / name).exists()), None)
    return found


def evaluation(folder: Path, printed: dict[str, Any]) -> dict[str, Any]:
    """Rates and values of every model and task, and digests of the answers behind them."""
    results = field(printed, "results")
    found = numbers(results)
    stored = json.loads(find(folder, RESULTS)[0].read_text("utf-8"))
    if numbers(field(stored, "results")) != found:
        raise Unreadable(f"what {folder.name} stores is not what was printed")
    for model, tasks in results.items():
        for task in tasks:
            for name, values in _answers(folder, {meant(_file_name(model)), meant(_file_name(task))}).items():
                found[f"{meant(model)}/{meant(task)}/{name}"] = values
    return found


def _answers(folder: Path, wanted: set[str]) -> dict[str, Any]:
    """Of the file of judged rows whose path has all these names: a short digest of each answer with its finish, and the
    classes. Empty for a task that asks for no answers."""
    for path in sorted(folder.rglob("*.jsonl")):
        parts = path.relative_to(folder).with_suffix("").as_posix().replace("/", ".").split(".")
        rows = json_lines(path) if wanted <= {meant(_file_name(part)) for part in parts} else []
        if rows and has(rows[0], "answer") and has(rows[0], "asked"):
            found = {"answers": [digest([field(r, "answer"), bool(field(r, "cut"))])[:12] for r in rows]}
            if has(rows[0], "class"):
                found["classes"] = digest([meant(field(r, "class")) for r in rows])
            return found
        if rows and not has(rows[0], "answer"):
            return {"rows": digest([sorted(map(str, numbers(r).values())) for r in rows])}
    raise Unreadable(f"{folder.name} has no rows of {' and '.join(sorted(wanted))}")


def _file_name(name: str) -> str:
    """A name with nothing in it that a file name may have to spell otherwise."""
    return re.sub(r"[^\w-]+", "-", name)


def audit(report: dict[str, Any]) -> dict[str, Any]:
    """Counts, findings (rule, level, row number, token index), and every shown row's tokens."""
    findings = sorted(_findings(field(report, "findings")))
    found: dict[str, Any] = {"findings": findings}
    for row in field(report, "rows"):
        tokens = [[field(t, name) for name in ("id", "trained", "target", "position")] for t in field(row, "tokens")]
        place = _number(field(row, "row"))
        found |= {f"row {place}/tokens": len(tokens), f"row {place}/digest": digest(tokens)}
    rest = {k: v for k, v in report.items() if k not in (*FIELDS["findings"], *FIELDS["rows"])}
    return found | numbers(rest)


def _findings(findings: list[dict[str, Any]]) -> Iterator[str]:
    for f in findings:
        yield f"{meant(field(f, 'rule'))} {meant(field(f, 'level'))} row {_number(field(f, 'row'))} {field(f, 'token')}"


def _number(place: Any) -> str:
    """The number of a row of the data, from however its place is written."""
    return str(place).rpartition(":")[2]


def grid(folder: Path) -> dict[str, Any]:
    """All numbers of a grid's results, its cells by their templates, and the weights of its rows."""
    results = json.loads(find(folder, RESULTS)[0].read_text("utf-8"))
    cells = {f"{meant(field(c, 'train'))} -> {field(c, 'test')}": c for c in field(results, "cells")}
    found = numbers({k: v for k, v in results.items() if k not in FIELDS["cells"]} | {"cells": cells})
    trained = {path.parent for path in folder.rglob("*.safetensors") if path.name in WEIGHTS}
    if not trained:
        raise Unreadable(f"{folder.name} has no trained weights")
    return found | {f"weights/{path.name}": weights(path) for path in trained}
