"""A study from its settings to its outcomes: aligned models, a grid for each, one analysis.

Several processes may work on a study. Each takes whatever is neither finished nor held by another: an alignment, a run,
a cell, of any part. What was killed is resumed by the same command. At the end every part is gone through once more,
checked and summarized as any grid; then all outcomes are gathered into one file, from which tables and figure come.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst import records
from ptst.errors import UserError
from ptst.evaluation.inspect_log import check_inspect
from ptst.evaluation.judges import find_judge
from ptst.evaluation.judging import add_verdicts
from ptst.evaluation.stored_answers import read_folder
from ptst.experiment.align_estimate import estimate_alignments
from ptst.experiment.config import GridConfig
from ptst.experiment.estimate import Estimate, seconds_per_token
from ptst.experiment.grid import Grid
from ptst.experiment.ladder import report
from ptst.experiment.ladder.analyse import STUDY
from ptst.experiment.ladder.gather import gather
from ptst.experiment.ladder.parts import StudyPart, aligned_name, plan_parts
from ptst.experiment.ladder.recipe import REFUSED
from ptst.experiment.ladder.study_amounts import study_plan
from ptst.experiment.run import (
    align_config,
    aligned_model,
    check_folder,
    claimed,
    found_model,
    open_grid,
    plan_grid,
    run_grid,
)
from ptst.experiment.status.at_work import WorkerFile
from ptst.experiment.status.study_plan import StudyPlan
from ptst.experiment.workers import Worker, failure, own_board
from ptst.hub.locate import locate_model
from ptst.progress import say
from ptst.records import CHECKPOINTS
from ptst.runs import check_writable
from ptst.settings import to_dict
from ptst.storage import LOCKS, lock, write_json

SECOND_JUDGE = "keywords-12"


@dataclass(frozen=True)
class StudyResult:
    """The folder with the outcomes and what is computed from them."""

    out: Path
    markdown: str
    contrasts: list[dict[str, Any]]


def run_study(config: GridConfig) -> StudyResult:
    """Do all of a study, or what is left of it. Raises UserError for a user's mistakes, before anything is trained, and
    where parts failed; Interrupted after a signal."""
    config.check()
    if config.inspect_log:
        check_inspect()
    check_writable(config.folder)
    parts = plan_parts(config)
    plan = study_plan(config, parts, _check(config, parts))
    config.folder.mkdir(parents=True, exist_ok=True)
    plan.write()
    with WorkerFile(config.folder):
        failed = _work(config, parts, plan)
    if failed:
        words = [word for name, error in failed.items() for word in ("; ", *failure(name, error))][1:]
        raise UserError((f"{len(failed)} of {len(parts)} parts failed, so there are no outcomes (", *words, ")"))
    return finish(config, parts)


def _check(config: GridConfig, parts: list[StudyPart]) -> dict[str, list[Grid]]:
    """Raise UserError for a mistake in settings, templates, data or prompts. Returns the grids of the passes over one
    part of each training data: those of further alignments differ in weights alone."""
    found: dict[str, list[Grid]] = {}
    for part in {part.data: part for part in reversed(parts)}.values():
        for of_pass in part.passes:
            grid = open_grid(of_pass)
            check_folder(grid, aligned=part.align_seed is None)
            grid.check()
            grid.check_composed(aligned=part.align_seed is None)
            found.setdefault(part.data, []).append(grid)
    return found


def _work(config: GridConfig, parts: list[StudyPart], plan: StudyPlan) -> dict[str, UserError]:
    """Do whatever other processes leave, then go through every part once more; errors by the part's name."""
    failed: dict[str, UserError] = {}
    left = list(parts)
    while left:
        before = len(left)
        took = False
        for part in list(left):
            with _collected(part, failed):
                folder = _model(config, part, wait=False)
                if folder is None:
                    continue
                for one in part.of_model(folder):
                    took = _take(one, plan) or took
            left.remove(part)
        if not took and len(left) == before:
            break  # others are aligning the rest
    for part in parts:
        if part.name not in failed:
            with _collected(part, failed):
                folder = _model(config, part, wait=True)
                assert folder is not None
                for one in part.of_model(folder):
                    run_grid(one)
    return failed


@contextmanager
def _collected(part: StudyPart, failed: dict[str, UserError]) -> Iterator[None]:
    """A part's mistake is told and kept, so that the others are done."""
    try:
        yield
    except UserError as error:
        failed[part.name] = error
        say(f"failed: {''.join(failure(part.name, error))}")


def _model(config: GridConfig, part: StudyPart, wait: bool) -> Path | None:
    """The model folder of a part, aligned first where need be; None while another process aligns it."""
    if part.align_seed is None:
        return locate_model(config.model, CHECKPOINTS)
    out = CHECKPOINTS / aligned_name(config.model, part.align_seed)
    return aligned_model(config, out, part.align_seed, wait, REFUSED)


def _take(config: GridConfig, plan: StudyPlan) -> bool:
    """Train and measure what is neither finished nor held by another process; whether anything was. The display is of
    the whole study."""
    grid = open_grid(config)
    check_folder(grid)
    with claimed(grid, config):
        worker, took = Worker(grid), False
        say(f"{len(grid.runs)} runs, {len(grid.cells)} cells in {grid.out}")
        if worker.count_finished() == len(grid.runs) + len(grid.cells):
            return False
        with own_board(worker, "the study", plan.parts.get(grid.out.name), plan.watch()) as progress:
            while worker.train_one() or worker.measure_some():
                took = True
                progress.update()
    return took


def finish(config: GridConfig, parts: list[StudyPart]) -> StudyResult:
    """Judge all answers by the second judge, gather the outcomes, and write what is computed from them."""
    out = config.folder
    with lock(out / LOCKS, "outcomes", wait=True):
        for part in parts:
            found = read_folder(part.folder)
            add_verdicts(found, found.verdicts, find_judge(SECOND_JUDGE))
        gathered = [part.gathered() for part in parts]
        outcomes = gather(gathered, _about(config, parts))
        write_json(out / STUDY, {"parts": [[p.folder.name, p.alignment, p.data, p.seeds] for p in gathered]})
        markdown, contrasts = report.write(outcomes, out)
    return StudyResult(out, markdown, contrasts)


def _about(config: GridConfig, parts: list[StudyPart]) -> dict[str, Any]:
    """What the outcomes are of; no path of this machine."""
    settings = records.without_folders(to_dict(replace(config, out=None, config=None)))
    settings["model"] = Path(config.model).name
    weights = {part.alignment: records.read_json(part.folder / records.FILE)["weights"] for part in parts}
    here = records.environment()
    made = {"versions": here["versions"], "device": here["device"], "git_commit": here["git_commit"]}
    return {"judge": config.eval.judge, "settings": settings, "models": weights, "gathered_with": made}


def plan_study(config: GridConfig) -> tuple[list[Estimate], str]:
    """A dry run: every alignment, run and cell with its tokens and time, and a note ("")."""
    config.check()
    lines, parts = list[Estimate](), plan_parts(config)
    seeds = [part.align_seed for part in parts if part.align_seed is not None]
    folders = {seed: CHECKPOINTS / aligned_name(config.model, seed) for seed in seeds}
    for part in parts:
        folder = None if part.align_seed is None else folders[part.align_seed]
        ready = folder is None or (folder / "model.safetensors").exists()
        passes = part.passes if folder is None or not ready else part.of_model(folder)
        known = set[str]()
        for one in passes:
            for line in plan_grid(one, ready)[0]:
                if line.what not in known:  # a run serves all passes
                    known.add(line.what)
                    lines.append(replace(line, what=f"{part.name}: {line.what}"))
    return [*_plan_alignments(config, parts, list(folders.values())), *lines], ""


def _plan_alignments(config: GridConfig, parts: list[StudyPart], folders: list[Path]) -> list[Estimate]:
    """Estimates of the alignments that come first."""
    if not folders:
        return []
    grid = open_grid(parts[0].passes[-1])
    rough = seconds_per_token(grid) if found_model(config)[1] else None
    return estimate_alignments(align_config(config, folders[0]), folders, rough)
