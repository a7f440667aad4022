"""`python -m ptst.grid`: the whole matrix of training and test templates."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptst import cli
from ptst.data import sources
from ptst.errors import UserError
from ptst.evaluation.judges import find_judge
from ptst.evaluation.tasks.table import base
from ptst.experiment import laptop, tables
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.alignment import AlignRecord, align, fingerprint
from ptst.experiment.config import GridConfig
from ptst.experiment.estimate import UNKNOWN, estimate
from ptst.experiment.locks import lock
from ptst.experiment.measure import open_tests
from ptst.experiment.plan import slug
from ptst.experiment.run import Grid, check, work
from ptst.experiment.settings import agreed, claim
from ptst.experiment.summary import summarize
from ptst.hub.locate import locate_model
from ptst.hub.wheel import model_folder
from ptst.model.weights import write_atomically
from ptst.open import CHECKPOINTS
from ptst.progress import say
from ptst.records import find_record, weights_fingerprint
from ptst.runs import differences
from ptst.settings import EMBEDDED_MODEL
from ptst.training import recipes, run_folder
from ptst.training.interrupt import Interrupted


def run_grid(config: GridConfig) -> dict[str, Any]:
    """All of a grid, or what is left of it; returns what `--json` prints. Raises UserError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = sources.load(config.data, "train", config.train.limit, holdout=config.train.holdout)
    families, holdout = laptop.families(config.laptop), config.train.holdout
    tests = open_tests(config.tasks, config.eval, trained, device, families, holdout)
    for note in {data.note for _, data in tests.tasks.values()} - {""}:
        say(note)
    grid = Grid.open(config, tests, trained)
    if config.dry_run:
        find_judge(config.eval.judge)
        return _dry_run(grid)
    check(grid)
    if config.laptop:
        agreed(grid, aligned=False)
        grid = replace(grid, config=replace(config, model=str(_aligned(config))))
    say(f"ptst.grid: {len(grid.rows)} rows, {len(grid.cells)} cells in {grid.out}")
    claim(grid)
    try:
        work(grid)
    except Interrupted as stopped:
        say(f"{stopped}; what is finished is kept; resume with the same command")
        raise SystemExit(stopped.exit_code) from None
    except (KeyboardInterrupt, SystemExit, OSError):
        say("what is finished is kept; resume with the same command")
        raise
    summary = summarize(grid)
    with lock(grid.out / "locks", "results", wait=True):
        result = {
            "kind": "grid",
            "flags": config.flags(),
            "model": config.model,
            "data": trained.name,
            "chat_format": next(iter(grid.models.values())).prompt_format.chat_format.name,
            "family": next(iter(grid.models.values())).prompt_format.family.name,
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
        say("no picture: it needs matplotlib (pip install matplotlib)")
    print(tables.to_markdown(summary), file=sys.stderr if config.json else sys.stdout)
    say(f"results.json, results.csv, results.md{', results.png' * drawn} in {grid.out}")
    return {"out": str(grid.out), **summary}


def _aligned(config: GridConfig) -> Path:
    """The recipe's aligned model, one for all its grids; one that `ptst.align` made there with other settings is taken
    as well. Raises UserError where alignment does not succeed."""
    out = _aligned_folder(config)
    with ExitStack() as held:
        if not held.enter_context(lock(out.parent, f".{out.name}.lock")):
            say(f"{out} is being aligned by another process; waiting for it")
            held.enter_context(lock(out.parent, f".{out.name}.lock", wait=True))
        record = find_record(out, AlignRecord)
        asked = AlignConfig(model=config.model, out=out)
        weights = weights_fingerprint(locate_model(config.model, CHECKPOINTS))
        if record and (record.status, record.weights, record.data) == ("finished", weights, fingerprint()):
            if other := differences(record, replace(record, config=asked)):
                words = "; ".join("".join(difference) for difference in other)
                say(f"note: {out} was aligned with other settings than the recipe's: {words}")
        else:
            try:
                record = align(asked)
            except Interrupted as stopped:
                say(f"{stopped}; resume with the same command")
                raise SystemExit(stopped.exit_code) from None
            except UserError as error:
                mismatch = "out" in error.remedy and not isinstance(error.remedy, str)
                raise UserError(error.cause, f"remove {out} to align anew" if mismatch else error.remedy) from None
    if not record.met:
        raise UserError(
            f"the model could not be aligned, so there is nothing to measure; {out / 'run.json'} has what was seen. "
            f"Remove {out} and align with other settings: python -m ptst.align --model {config.model} --out {out}"
        )
    return out


def _aligned_folder(config: GridConfig) -> Path:
    return CHECKPOINTS / f"aligned-{slug(Path(config.model).name)}"


def _dry_run(grid: Grid) -> dict[str, Any]:
    """Rows and cells with tokens and time, as far as they can be known without computing anything."""
    model = grid.config.model
    folder = model_folder(model, CHECKPOINTS) if model == EMBEDDED_MODEL else Path(model)
    with_model = (folder / "config.json").exists()
    tested = _aligned_folder(grid.config) if grid.config.laptop else folder
    unaligned = grid.config.laptop and not (tested / "model.safetensors").exists()
    if with_model:
        asked = grid if unaligned else replace(grid, config=replace(grid.config, model=str(tested)))
        agreed(asked, aligned=not unaligned)
    lines = estimate(grid, with_model)
    for line in lines:
        left_to_do = f"{line['tokens']} tokens, {_minutes(line['seconds'], line['rough'])}"
        print(f"{line['what']}: {'finished' if line['finished'] else left_to_do}")
    left = [line for line in lines if not line["finished"]]
    totals, rough = {}, any(line["rough"] for line in left)
    for key in ("tokens", "seconds"):
        values = [line[key] for line in left]
        totals[key] = UNKNOWN if UNKNOWN in values else sum(values)
    print(f"{len(left)} of {len(lines)} left: {totals['tokens']} tokens at most, {_minutes(totals['seconds'], rough)}")
    if unaligned:
        print(f"before that, the alignment: at most {AlignConfig.max_steps} steps of {AlignConfig.examples_per_step}")
    return {"left": len(left), "lines": lines, **totals}


def _minutes(seconds: Any, rough: bool) -> str:
    return f"time {UNKNOWN}" if seconds == UNKNOWN else f"{'roughly ' * rough}{seconds / 60:.1f} min"


def start(arguments: list[str]) -> tuple[GridConfig, str] | None:
    """The settings to start from: a recipe's."""
    name = cli.value_of(arguments, "--recipe")
    if name in laptop.RECIPES or name in recipes.RECIPES:
        return GridConfig(recipe=name, quick="--quick" in arguments), ""
    return None


def main() -> None:
    cli.run(run_grid, GridConfig, "grid", start)


if __name__ == "__main__":
    main()
