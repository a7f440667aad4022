"""`python -m ptst.grid`: the whole matrix of training and test templates."""

import dataclasses
import io
import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from ptst import cli
from ptst.experiment.config import RECIPES, GridConfig
from ptst.experiment.ladder.recipe import RECIPES as LADDER
from ptst.experiment.paper.recipes import RECIPES as TABLES
from ptst.experiment.paper.recipes import describe
from ptst.progress import console, printable, say
from ptst.training.launch import worker_ranks

if TYPE_CHECKING:
    from ptst.experiment.estimate import Estimate


def run_command(config: GridConfig) -> dict[str, Any] | None:
    """Do a grid, or print its plan; returns what `--json` prints (of workers that a launcher started, on the first).
    Raises UserError for a user's mistakes, and SystemExit with 130 or 143 after Ctrl-C or SIGTERM."""
    rank, local = worker_ranks()
    console.quiet = rank > 0  # one speaks for all
    try:
        with redirect_stdout(io.StringIO()) if rank else nullcontext():
            done = _run(config, local)
    finally:
        console.quiet = False  # every worker prints its own error
    return None if rank else done


def _run(config: GridConfig, local: int | None) -> dict[str, Any]:
    say(f"ptst.grid: {config.model}, data {config.data}")
    from ptst.experiment import tables
    from ptst.experiment.run import run_grid
    from ptst.threads import choose_threads
    from ptst.training.interrupt import Interrupted
    from ptst.training.parallel import take_gpu

    config.check()
    take_gpu(local)
    choose_threads(config.threads, config.folder)
    if config.dry_run:
        return _dry_run(config)
    try:
        if config.study:
            return _study(config)
        if config.recipe in TABLES:
            _warn(config)
        done = run_grid(config)
    except Interrupted as stopped:
        say(f"{stopped}; finished runs and cells are kept; resume with the same command")
        raise SystemExit(stopped.exit_code) from None
    except (KeyboardInterrupt, OSError):
        say("finished runs and cells are kept; resume with the same command")
        raise
    print(printable(tables.to_markdown(done.summary)), file=sys.stderr if config.json else sys.stdout)
    say(f"results.json, results.csv, results.md{', results.png' * done.picture} in {done.out}")
    say(f"another judge of the same answers: ptst judge {done.out} --judge NAME")
    if not done.picture:
        say("no heat map: it needs the task safety and matplotlib (pip install matplotlib)")
    return {"out": str(done.out), **done.summary}


def _study(config: GridConfig) -> dict[str, Any]:
    from ptst.experiment.ladder.study import run_study

    done = run_study(config)
    print(printable(done.markdown), file=sys.stderr if config.json else sys.stdout, end="")
    say(f"outcomes.json, report.md, ladder.svg in {done.out}; to compute them anew: ptst study {done.out}")
    return {"out": str(done.out), "contrasts": done.contrasts}


def _dry_run(config: GridConfig) -> dict[str, Any]:
    from ptst.experiment.ladder.study import plan_study
    from ptst.experiment.run import plan_grid

    if config.recipe in TABLES:
        return _plan_table(config)
    lines, note = (plan_study if config.study else plan_grid)(config)
    planned = _told(lines)
    if note:
        print(printable(note))
    return planned


def _plan_table(config: GridConfig) -> dict[str, Any]:
    from ptst.experiment.paper.dry_run import plan_table

    plan = plan_table(config)
    planned = _told(plan.lines)
    print(printable("\n".join(plan.told(_flag))))
    return {**planned, "paper": plan.to_json(_flag)}


def _warn(config: GridConfig) -> None:
    """Say before anything is computed which models of a table are there no more."""
    from ptst.experiment.paper.needs import shut_down

    for need in shut_down(config):
        say(f"note: {need.tell(_flag)}")


def _flag(setting: str) -> str:
    return cli.flag_of(GridConfig, setting, "" if setting == "model" else "eval")


def _told(lines: list["Estimate"]) -> dict[str, Any]:
    """Print the lines of a plan and their sum; returns both for `--json`."""
    from ptst.experiment.estimate import in_words

    for line in lines:
        print(printable(str(line)))
    left = [line for line in lines if not line.finished]
    tokens = None if any(line.tokens is None for line in left) else sum(line.tokens or 0 for line in left)
    seconds = None if any(line.seconds is None for line in left) else sum(line.seconds or 0.0 for line in left)
    memory = max((line.memory for line in left if line.memory is not None), default=None)
    rough = any(line.rough for line in left)
    costs = [line.cost for line in left if line.cost is not None]
    cost = sum(costs) if costs and len(costs) == len(left) else None
    print(f"{len(left)} of {len(lines)} left: at most {in_words(tokens, seconds, rough, memory, cost)}")
    return {
        "left": len(left),
        "lines": [dataclasses.asdict(x) for x in lines],
        "tokens": tokens,
        "seconds": seconds,
        "memory": memory,
        "cost": cost,
    }


def start(arguments: list[str]) -> tuple[GridConfig, str] | None:
    """The settings to start from: a recipe's."""
    name = cli.value_of(arguments, "--recipe")
    if name not in RECIPES:
        return None
    if name in TABLES:
        return GridConfig(recipe=name, quick="--quick" in arguments), describe(name)
    model = cli.value_of(arguments, "--model")  # a recipe may know it, and the recipe ladder aligns its own alone
    if model and name in LADDER:
        return GridConfig(recipe=name, quick="--quick" in arguments, model=model), ""
    return GridConfig(recipe=name, quick="--quick" in arguments), ""


def main() -> None:
    cli.run(run_command, GridConfig, "grid", start)


if __name__ == "__main__":
    main()
