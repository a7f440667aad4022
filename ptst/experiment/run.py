"""A grid from its settings to its results: aligned first where the recipe says so, worked on, summarized."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst.api.names import hosted_model
from ptst.errors import Setting, UserError
from ptst.evaluation.inspect_log import check_inspect, write_inspect_logs
from ptst.evaluation.judges import find_judge
from ptst.evaluation.long_results import write_long_results
from ptst.evaluation.long_table import write_long_table
from ptst.evaluation.tasks.table import base
from ptst.experiment import tables
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.alignment import AlignRecord, align, check_aligned, fingerprint
from ptst.experiment.config import GridConfig
from ptst.experiment.estimate import Estimate, estimate, estimate_hosted
from ptst.experiment.grid import Grid
from ptst.experiment.grid_record import GridRecord
from ptst.experiment.hosted_grid import HostedGrid
from ptst.experiment.hosted_worker import HostedWorker
from ptst.experiment.plan import check_distinct, slug
from ptst.experiment.provenance import check_cells, judge_anew
from ptst.experiment.summary import summarize
from ptst.experiment.workers import Worker, work
from ptst.fingerprints import weights_fingerprint
from ptst.hub.locate import locate_model
from ptst.hub.wheel import model_folder
from ptst.progress import say
from ptst.records import CHECKPOINTS, find_record
from ptst.runs import Run, check_writable, differences, merged, share
from ptst.settings import EMBEDDED_MODEL
from ptst.storage import LOCKS, lock, remove_partial_files_of, write_atomically, write_json

_FILES = [f"results.{end}" for end in ("json", "csv", "md", "png", "parquet")] + ["answers.parquet", "answers.csv"]


@dataclass(frozen=True)
class GridResult:
    """The summary (ptst.experiment.summary) and the folder that holds it; `picture`: whether a heat map was drawn."""

    out: Path
    summary: dict[str, Any]
    picture: bool


def run_grid(config: GridConfig) -> GridResult:
    """Do all of a grid, or what is left of it. Raises UserError for a user's mistakes, and where some runs or cells
    failed; Interrupted after a signal."""
    config.check()
    if config.inspect_log:
        check_inspect()
    check_writable(config.folder)
    grid = open_grid(config)
    check_folder(grid, aligned=not config.laptop)
    grid.check()
    grid.check_composed(aligned=not config.laptop)
    grid.agree()
    if config.laptop:
        grid = with_aligned(grid, _aligned(config))
        check_folder(grid)
        grid.check_composed()
    say(f"{len(grid.runs)} runs, {len(grid.cells)} cells in {grid.out}")
    # With the settings as they were given: the aligned model is no model to align again.
    with claimed(grid, config) as run:
        work(HostedWorker(grid) if isinstance(grid, HostedGrid) else Worker(grid))
        check_cells(grid)
        say("summarizing the cells")
        summary = {**summarize(grid), **grid.figures()}
        for note in grid.notes():
            say(note)
        with lock(grid.out / LOCKS, "results", wait=True):
            remove_partial_files_of(*(grid.out / name for name in _FILES))
            record = run.finish()
            write_json(grid.out / "results.json", {**record.to_json(), **summary})
            write_atomically(grid.out / "results.csv", tables.to_csv(summary).encode())
            write_atomically(grid.out / "results.md", tables.to_markdown(summary).encode())
            write_long_table(grid.out)
            write_long_results(grid.out)
            if config.inspect_log:
                write_inspect_logs(grid.out)
            safety = next((task for task in grid.tasks if base(task) == "safety"), None)
            picture = safety is not None and tables.heat_map(summary, safety, grid.out / "results.png")
    return GridResult(grid.out, summary, picture)


def plan_grid(config: GridConfig, aligned: bool = True, judged: bool = True) -> tuple[list[Estimate], str]:
    """A dry run: every run and cell with its tokens and time, and a note on the alignment that comes first ("").
    `aligned`: the model is the one that is to be tested, not one that a study aligns first. Without `judged`, the judge
    need not be there."""
    grid = open_grid(config)
    if judged:
        find_judge(config.eval.judge, config.eval.allow, config.eval)
    if isinstance(grid, HostedGrid):
        return estimate_hosted(grid), ""
    folder, with_model = found_model(config)
    tested = _aligned_folder(config) if config.laptop else folder
    unaligned = not aligned or (config.laptop is not None and not (tested / "model.safetensors").exists())
    if with_model:
        asked = grid if unaligned else with_aligned(grid, tested)
        check_folder(asked, aligned=not unaligned)
        grid.check_tuned()
        asked.check_composed(aligned=not unaligned)
    steps = f"at most {AlignConfig.max_steps} steps of {AlignConfig.examples_per_step}"
    return estimate(grid, with_model), f"the alignment comes first: {steps}" if unaligned else ""


def found_model(config: GridConfig) -> tuple[Path, bool]:
    """The folder of the model, and whether its files are there already."""
    folder = model_folder(config.model, CHECKPOINTS) if config.model == EMBEDDED_MODEL else Path(config.model)
    return folder, (folder / "config.json").exists()


def open_grid(config: GridConfig) -> Grid:
    """The grid of these settings, of models of this machine or of an endpoint. Raises UserError as `Grid.open`."""
    return (Grid if hosted_model(config.model) is None else HostedGrid).open(config)


def check_folder(grid: Grid, aligned: bool = True) -> None:
    """Raise UserError where the folder holds another grid, and for templates or tasks that would share files with those
    in it. `aligned`: the model that is to be tested exists already."""
    record = grid.record()
    if not aligned and (old := find_record(grid.out, GridRecord)) is not None:
        record = replace(record, weights=old.weights, model=old.model, tokenizer=old.tokenizer)
    record = merged(grid.out, record)
    check_distinct("template", list(record.templates))
    check_distinct("task", list(record.tests))


@contextmanager
def claimed(grid: Grid, config: GridConfig) -> Iterator[Run[GridRecord]]:
    """A grid's folder to be worked on, its finished cells checked; `config`: the settings as they were given, with the
    model before its alignment. Raises UserError as `share`, `judge_anew` and `check_cells`."""
    with share(grid.out, replace(grid.record(), config=config)) as run:
        judge_anew(grid)
        check_cells(grid)
        yield run


def with_aligned(grid: Grid, model: Path) -> Grid:
    """The grid with another base model, of which the defences know what it was before its alignment."""
    config = grid.config
    aligned = replace(grid, config=replace(config, model=str(model), defense=config.defended))
    aligned.run_sizes.update(grid.run_sizes)  # the same tokenizer and shape
    return aligned


def aligned_model(
    config: GridConfig, out: Path, seed: int = 0, wait: bool = True, refused: float = AlignConfig.refused
) -> Path | None:
    """The recipe's model, aligned into the folder `out`, one for all its grids; one that `ptst.align` made there with
    other settings serves, too. `refused`: of the alignment's stopping rule. Without `wait`, None while another process
    aligns it. Raises UserError where the alignment does not succeed, Interrupted after a signal."""
    with ExitStack() as held:
        if not held.enter_context(lock(out.parent, f".{out.name}.lock")):
            if not wait:
                return None
            say(f"{out} is being aligned by another process; waiting for it")
            held.enter_context(lock(out.parent, f".{out.name}.lock", wait=True))
        record = find_record(out, AlignRecord)
        asked = replace(align_config(config, out, seed), refused=refused)
        weights = weights_fingerprint(locate_model(config.model, CHECKPOINTS))
        same = record is not None and weights.matches(record.weights) and record.data == fingerprint()
        if record and same and record.status == "finished":
            check_aligned(out, record)
            if other := differences(record, replace(record, config=asked)):
                words = "; ".join("".join(difference) for difference in other)
                say(f"note: {out} was aligned with other settings than the recipe's: {words}")
        else:
            try:
                record = align(asked)
            except UserError as error:
                if Setting("out") in error.parts:
                    error.remedy = f"remove {out} to align anew"
                raise
    if not record.met:
        again = f"python -m ptst.align --model {config.model} --out {out}" + (f" --seed {seed}" if seed else "")
        raise UserError(
            f"the model could not be aligned, so there is nothing to measure ({out / 'run.json'} has the evaluations)",
            f"remove {out} and align with other settings: {again}",
        )
    return out


def align_config(config: GridConfig, out: Path, seed: int = 0) -> AlignConfig:
    """The settings with which a recipe's model is aligned."""
    allowed = (*config.train.allow, *config.eval.allow)
    return AlignConfig(model=config.model, chat_format=config.chat_format, allow=allowed, seed=seed, out=out)


def _aligned(config: GridConfig) -> Path:
    folder = aligned_model(config, _aligned_folder(config))
    assert folder is not None, "it waits"
    return folder


def _aligned_folder(config: GridConfig) -> Path:
    return CHECKPOINTS / f"aligned-{slug(Path(config.model).name)}"
