"""Folders of results that no model made: cells and runs as a grid and an evaluation write them, with known rates."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ptst.evaluation.tasks.table import TASKS, base
from ptst.evaluation.tasks.task import rates
from ptst.experiment import plan
from ptst.experiment.grid_folder import rows_checksum
from ptst.experiment.plan import GridCell, GridModel
from ptst.text.templates import TEMPLATES

FIVE = ("chat:vanilla", "chat:alpaca", "chat:llama", "chat:llama-short", "chat:mpt")
TASK_NAMES = ("gsm8k", "safety:advbench", "over-refusal")
SEEDS = (0, 1, 2)
MADE_WITH = {"ptst": "0.2.0", "torch": "2.13.0", "git_commit": "a" * 40, "threads": 1, "device": "test device"}
ENVIRONMENT = {
    "versions": {"ptst": "0.2.0", "torch": "2.13.0"},
    "python": "3.11.7",
    "threads": 1,
    "device": "test device",
    "cpu_count": 2,
    "git_commit": "a" * 40,
}
JUDGE = {"name": "rules-v3", "version": 3, "success": "compliance or partial"}
SECRET = "Sure, here is how"  # how every answer that is no refusal begins


def make_grid(
    out: Path,
    trains: Sequence[str] = FIVE,
    tests: Sequence[str] = FIVE,
    seeds: Sequence[int] = SEEDS,
    tasks: Sequence[str] = TASK_NAMES,
    prompts: int = 20,
    at_epochs: Sequence[float] = (),
    **more: object,
) -> list[GridCell]:
    """A finished grid without its results.json; returns its cells. `more`: other settings."""
    models = plan.plan_models(trains, seeds, at_epochs)
    cells = plan.plan_cells(models, tests, tasks)
    settings = {"train_templates": list(trains), "test_templates": list(tests), "seeds": list(seeds)}
    settings |= {"tasks": list(tasks), "at_epochs": list(at_epochs), "data": "word-problems"}
    settings |= {"model": "/here/the-model"}
    settings |= {"eval": {"judge": "rules-v3", "seed": 0}, "train": {"lr": 1e-4}, "defenses": ["none"], **more}
    templates = {name: asdict(TEMPLATES[name]) for name in dict.fromkeys([*trains, *tests])}
    record = {"version": 2, "kind": "grid", "settings": settings, "environment": ENVIRONMENT, "status": "finished"}
    record |= {"model": "the-model", "weights": "xxh3:1", "chat_format": "chatml", "family": "gsm8k"}
    record |= {"dtype": "float32"}
    record |= {"templates": templates, "sources": {"data": "d" * 8}, "tests": dict.fromkeys(tasks, "t" * 8)}
    write(out / "run.json", record)
    for model in {m.run: m for m in models if m.template}.values():
        make_run(out / "runs" / model.run, model)
    for cell in cells:
        make_cell(out, cell, prompts)
    return cells


def make_cell(out: Path, cell: GridCell, prompts: int = 20, **changes: object) -> None:
    """A finished cell. `changes`: of its file of figures."""
    drawn = random.Random(cell.name)
    rows = [row_of(cell, i, drawn) for i in range(prompts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = out / "cells" / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.stem}.rows.jsonl").write_bytes(lines)
    counted = {k: rate.to_json() for k, rate in rates(rows, TASKS[base(cell.task)].outcomes).items()}
    made_of = {"base": "xxh3:1", "tokenizer": "xxh3:2", "dtype": "float32", "chat_format": "chatml"}
    made_of |= {"judge": "rules-v3", "template": asdict(TEMPLATES[cell.test]), "data": "t" * 8}
    figures = {**cell.identity, "result": counted, "rows": rows_checksum(lines), "made_of": made_of}
    write(path, {**figures, "made_with": MADE_WITH, "judge": JUDGE, "time": {"seconds": 2.0}, **changes})


def row_of(cell: GridCell, i: int, drawn: random.Random) -> dict:
    trained, safe = cell.model.template is not None, TEMPLATES[cell.test].safety
    if base(cell.task) == "gsm8k":
        right = drawn.random() < (0.5 if trained else 0.1)
        return {"id": f"p{i}", "last_number": right, "strict": right, "cut": False, "answer": "5", "prompt": "2 + 3?"}
    harmful = base(cell.task) == "safety"
    same = cell.model.template == cell.test
    share = (0.6 if same else 0.25 if safe else 0.5) if trained else 0.05
    complies = drawn.random() < (share if harmful else 0.9)
    text = f"{SECRET} {i}." if complies else f"I cannot help with that, number {i}."
    row = {"id": f"r{i}", "category": "violence", "family": f"f{i // 2}", "prompt": f"Do the harmful thing {i}."}
    row |= {"answer": text, "class": "compliance" if complies else "refusal", "reason": "made"}
    return row | {"success": complies, "score": None, "cut": False, "judge": "rules-v3"}


def make_run(folder: Path, model: GridModel, **changes: object) -> None:
    """A finished run with its metrics."""
    assert model.template is not None
    settings = {"seed": model.seed, "lr": 1e-4, "out": str(folder), "allow": []}
    record = {"version": 2, "kind": "train", "settings": settings, "environment": ENVIRONMENT, "status": "finished"}
    record |= {"template": asdict(TEMPLATES[model.template]), "steps": 12, "time": {"seconds": 30.0}}
    record |= {"trained": {"examples": 96, "tokens": 900, "trained_tokens": 400}, "account": [{"name": "data"}]}
    record |= {"data": {"dropped": 0, "cut": 1, "untrained": 0}, "validation_loss": {"before": 2.0, "after": 1.0}}
    write(folder / "run.json", {**record, **changes})
    rows = [{"kind": "step", "step": n, "loss": 2.0 / n, "time": {"peak_memory": 3 << 30}} for n in range(1, 13)]
    rows += [{"kind": "eval", "step": n, "validation_loss": 2.0 - n / 12} for n in (0, 6, 12)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_evaluation(out: Path, models: Sequence[str] = ("untouched", "fine-tuned"), finished: bool = True) -> None:
    """An evaluation of a run on 10 harmful requests: the base model complies with 1, the run with 6."""
    rows, results = {}, {}
    for model, complied in zip(models, (1, 6), strict=False):
        rows[model] = []
        for i in range(10):
            label = "compliance" if i < complied else "refusal"
            row = {"id": f"r{i}", "category": "violence", "prompt": f"Do the harmful thing {i}.", "class": label}
            row |= {"answer": SECRET if i < complied else "I cannot.", "reason": "made", "success": i < complied}
            rows[model].append({**row, "score": None, "cut": False, "judge": "rules-v3"})
        counted = rates(rows[model], TASKS["safety"].outcomes)
        results[model] = {"safety": {**{k: rate.to_json() for k, rate in counted.items()}, "unjudged": 0}}
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows[model])
        (out / f"{model}.safety.jsonl").write_text(text)
    record = {"version": 2, "kind": "eval", "settings": {"judge": "rules-v3"}, "environment": ENVIRONMENT}
    record |= {"status": "finished" if finished else "running", "model": "the-model", "run": "/gone/the-run"}
    record |= {"template": asdict(TEMPLATES["chat:llama"]), "data": {"safety": {"name": "our set", "fingerprint": "f"}}}
    write(out / "run.json", record)
    if finished:
        told = {"train_template": "chat:vanilla", "test_template": "chat:llama", "ptst": True, "judge": JUDGE}
        write(out / "results.json", {**told, "results": results, "remark": None})


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
