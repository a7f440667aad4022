"""`python -m ptst.grid`: the whole matrix of training and test templates."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptst import command
from ptst.command import say
from ptst.data import sources
from ptst.evaluation.judges import find_judge
from ptst.experiment import laptop, tables
from ptst.experiment.alignment import AlignConfig, align
from ptst.experiment.config import LAPTOP, GridConfig
from ptst.experiment.estimate import UNKNOWN, estimate
from ptst.experiment.locks import lock
from ptst.experiment.measure import base, open_tests
from ptst.experiment.plan import slug
from ptst.experiment.run import Grid, check, work
from ptst.experiment.settings import agreed, claim
from ptst.experiment.summary import summarize
from ptst.model.embedded import EMBEDDED_NAME
from ptst.model.weights import write_atomically
from ptst.subject import CHECKPOINTS
from ptst.train import TrainConfig
from ptst.training import recipes, run_folder
from ptst.training.run import Interrupted


def run_grid(config: GridConfig) -> dict[str, Any]:
    """All of a grid, or what is left of it; returns what `--json` prints. Raises ValueError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = sources.load(config.data, "train", config.train.limit)
    tests = open_tests(config.tasks, config.eval, trained, device, laptop.families(config.laptop))
    for note in {data.note for _, data in tests.tasks.values()} - {""}:
        say(note)
    grid = Grid.open(config, tests, trained)
    if config.dry_run:
        find_judge(config.eval.judge)
        return _dry_run(grid)
    check(grid)
    if config.laptop:
        grid = replace(grid, config=replace(config, model=str(_aligned(config))))
    say(f"ptst.grid: {len(grid.rows)} rows, {len(grid.cells)} cells in {grid.out}")
    claim(grid)
    try:
        work(grid)
    except (KeyboardInterrupt, SystemExit, OSError):
        say("what is finished is kept; go on with the same command")
        raise
    summary = summarize(grid)
    with lock(grid.out / "locks", "results", wait=True):
        result = {
            "kind": "grid",
            "flags": config.flags(),
            "chat_format": next(iter(grid.subjects.values())).prompting.chat_format,
            "family": next(iter(grid.subjects.values())).family,
            **summary,
            "environment": run_folder.environment(),
            "time": {"seconds": time.monotonic() - began},
        }
        run_folder.write_json(grid.out / "results.json", result)
        write_atomically(grid.out / "results.csv", tables.to_csv(summary).encode())
        write_atomically(grid.out / "results.md", tables.to_markdown(summary).encode())
        safety = next((task for task in tests.tasks if base(task) == "safety"), None)
        drawn = safety is not None and tables.heat_map(summary, safety, grid.out / "results.png")
    if safety is not None and not drawn:
        say("no picture: it needs matplotlib (pip install -e '.[plot]')")
    print(tables.to_markdown(summary), file=sys.stderr if config.json else sys.stdout)
    say(f"results.json, results.csv, results.md{', results.png' * drawn} in {grid.out}")
    return {"out": str(grid.out), **summary}


def _aligned(config: GridConfig) -> Path:
    """The recipe's aligned model, one for all its grids. Raises ValueError where alignment does not succeed."""
    out = _aligned_folder(config)
    with lock(out.parent, f".{out.name}.lock", wait=True):
        try:
            record = align(AlignConfig(model=config.model, out=out))
        except Interrupted as stopped:
            say(f"{stopped}; go on with the same command")
            raise SystemExit(stopped.exit_code) from None
    if not record["met"]:
        raise ValueError(f"the model could not be aligned, so there is nothing to measure; see {out / 'run.json'}")
    return out


def _aligned_folder(config: GridConfig) -> Path:
    return CHECKPOINTS / f"aligned-{slug(Path(config.model).name)}"


def _dry_run(grid: Grid) -> dict[str, Any]:
    """Rows and cells with tokens and time, as far as they can be known without computing anything."""
    folder = CHECKPOINTS / EMBEDDED_NAME if grid.config.model == EMBEDDED_NAME else Path(grid.config.model)
    with_model = (folder / "config.json").exists()
    tested = _aligned_folder(grid.config) if grid.config.laptop else folder
    unaligned = grid.config.laptop and not (tested / "model.safetensors").exists()
    if with_model and not unaligned:
        agreed(replace(grid, config=replace(grid.config, model=str(tested))))
    lines = estimate(grid, with_model)
    for line in lines:
        state = "finished" if line["finished"] else f"{line['tokens']} tokens, {_minutes(line['seconds'])}"
        print(f"{line['what']}: {state}")
    left = [line for line in lines if not line["finished"]]
    totals = {}
    for key in ("tokens", "seconds"):
        values = [line[key] for line in left]
        totals[key] = UNKNOWN if UNKNOWN in values else sum(values)
    print(f"{len(left)} of {len(lines)} left: {totals['tokens']} tokens at most, {_minutes(totals['seconds'])}")
    if unaligned:
        print(f"before that, the alignment: at most {AlignConfig.max_steps} steps of {AlignConfig.examples_per_step}")
    return {"left": len(left), "lines": lines, **totals}


def _minutes(seconds: Any) -> str:
    return f"time {UNKNOWN}" if seconds == UNKNOWN else f"{seconds / 60:.1f} min"


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the parser starts from: a recipe's values."""
    name = command.value_of(arguments, "--recipe")
    if name in LAPTOP:
        quick = "--quick" in arguments
        return {"default": replace(GridConfig(), recipe=name, quick=quick, **laptop.values(name, quick))}
    if name in recipes.RECIPES:
        flags = dict(recipes.values(name))
        own = {key: flags.pop(key) for key in ("model", "data", "mix") if key in flags}
        return {"default": replace(GridConfig(), recipe=name, **own, train=TrainConfig(**flags))}
    return {}


if __name__ == "__main__":
    command.run(run_grid, GridConfig, "ptst.grid", defaults)
