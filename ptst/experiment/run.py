"""Working on a grid folder, alone or with other processes: rows are trained, cells are measured, nothing twice.

    settings.json                    what makes rows and cells what they are
    rows/<row>/                      a run folder of the trainer
    cells/<row>/<test>.<task>.json   the figures of a cell; beside it its answers and judged rows (.jsonl)
    locks/                           who works on what; a killed process lets go by itself

A row or cell is finished when its last file, which is written atomically, is there. A process takes whatever is not
finished and not locked, and waits when all that is left is in other hands.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ptst.data import order, sources
from ptst.data.examples import length_limit, prepare
from ptst.data.mix import Mixture, mix, parse_mix
from ptst.data.sources import Source
from ptst.errors import UserError, settings_group
from ptst.evaluation.answers import Answerer, AnswerFile
from ptst.evaluation.tasks.task import Tools
from ptst.experiment import plan
from ptst.experiment.config import GridConfig
from ptst.experiment.locks import lock
from ptst.experiment.measure import Tests
from ptst.experiment.plan import Cell, Row
from ptst.generation.multi_lora import Adapter, read_adapter
from ptst.generation.request import Statistics
from ptst.model.config import read_json
from ptst.model.decoder import Decoder
from ptst.model.weights import load_decoder, pick_dtype, write_atomically
from ptst.open import OpenModel, open_model
from ptst.progress import ProgressLine, say
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.templates import MODEL_DEFAULT, Template, with_default_system_prompt
from ptst.training import run_folder
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from ptst.training.run_plan import epoch_folders

PATIENCE = 0.5  # seconds between two looks at what others have finished


@dataclass(frozen=True)
class Grid:
    """A grid folder with everything that is to be done in it."""

    config: GridConfig
    out: Path
    rows: list[Row]
    cells: list[Cell]
    tests: Tests
    train_templates: dict[str, tuple[Template, Path | None]]
    test_templates: dict[str, tuple[Template, Path | None]]
    sources: dict[str, Source]
    """What training reads: `data`, what is mixed in by its flag's text, and `val-data`, where there is any."""

    @classmethod
    def open(cls, config: GridConfig, tests: Tests, trained: Source) -> Grid:
        """`trained`: the training data. Raises UserError for unknown templates, two that differ under one name, and
        other data that are not there."""
        train, test = plan.templates(config.train_templates), plan.templates(config.test_templates)
        for name in train.keys() & test.keys():
            if train[name][0] != test[name][0]:
                raise UserError(
                    f"{train[name][1]} and {test[name][1]} are different templates named {name}; rename one"
                )
        plan.distinct("template", [*train, *test])
        rows = plan.rows(list(train), config.seeds, config.at_epochs)
        cells = plan.cells(rows, list(test), list(tests.tasks))
        read = {"data": trained} | {text: sources.load(parse_mix(text)[0], "train") for text in config.mix}
        if config.train.val_data:
            read["val-data"] = sources.load(config.train.val_data, "validation")
        elif config.train.holdout:
            read["val-data"] = sources.load(config.data, "validation", holdout=config.train.holdout)
        return cls(config, config.folder, rows, cells, tests, train, test, read)

    def train_config(self, row: Row) -> TrainConfig:
        """The flags under which `ptst.train` makes a row."""
        assert row.template is not None
        _, path = self.train_templates[row.template]
        c = self.config
        return TrainConfig(
            **{f.name: getattr(c.train, f.name) for f in dataclasses.fields(c.train)},
            template=TrainConfig.template if path else row.template,
            template_file=path,
            model=c.model,
            data=c.data,
            mix=c.mix,
            at_epochs=c.at_epochs,
            seed=row.seed,
            out=self.out / "rows" / row.run,
        )

    def folder(self, row: Row) -> Path:
        """Where the row's weights lie."""
        run = self.out / "rows" / row.run
        return run if row.epochs is None else run / plan.epoch_name(row.epochs)

    def trained(self, row: Row) -> bool:
        """Whether there is nothing left to do for the row."""
        path = self.out / "rows" / row.run / "run.json"
        if row.template is None:
            return True
        record = read_json(path) if path.exists() else {}
        return (record.get("kind"), record.get("status")) == ("train", "finished")

    def file(self, cell: Cell, ending: str) -> Path:
        return self.out / "cells" / f"{cell.name}.{ending}"

    def measured(self, cell: Cell) -> bool:
        return self.file(cell, "json").exists()

    @cached_property
    def models(self) -> dict[str, OpenModel]:
        """By test template: the untouched model, chat format and stop ids. Raises UserError as `open_model`."""
        c = self.config
        family = c.eval.template_family or c.train.template_family or self.tests.family
        chat_format = c.eval.chat_format or c.train.chat_format
        return {
            name: open_model(c.model, template, family=family, chat_format=chat_format)
            for name, (template, _) in self.test_templates.items()
        }

    def mixture(self, name: str) -> Mixture:
        """What is trained on under a template. Raises UserError for what it cannot say, and as `mix`."""
        c = self.config.train
        others = [(self.sources[text], parse_mix(text)[1]) for text in self.config.mix]
        return mix([(self.sources["data"], c.epochs), *others], *self.reading(name), c.too_long, c.train_on)

    def reading(self, name: str) -> tuple[PromptFormat, int]:
        """How training reads its data under a template, and the longest example."""
        c, model = self.config.train, next(iter(self.models.values()))
        prompt_format = open_prompt_format(
            self.base,
            self.train_templates[name][0],
            c.template_family or self.sources["data"].family,
            c.chat_format,
            allow_role_markers="role-markers" in c.allow,
        )
        return prompt_format, length_limit(c.max_length, model.config.max_positions, c.micro_batch_tokens)

    @property
    def base(self) -> Path:
        return next(iter(self.models.values())).folder


def check(grid: Grid) -> None:
    """Raise UserError for mistakes that would otherwise show when some or all rows are trained: in the judge, the
    similarity, the templates, the data and the epochs to look at."""
    with settings_group("eval"):
        grid.tests.check(grid.models)
    for name, (template, _) in {**grid.train_templates, **grid.test_templates}.items():
        if template.system == MODEL_DEFAULT and with_default_system_prompt(template, grid.base).system is None:
            say(f"note: {grid.base} has no default system prompt, so {name} is the same as without one")
    runs = {row.run: row for row in grid.rows if row.template is not None and not grid.trained(row)}
    for name in dict.fromkeys(row.template for row in runs.values()):
        with settings_group("train"):
            mixture = grid.mixture(name)
            if "val-data" in grid.sources:
                c, source = grid.config.train, grid.sources["val-data"]
                prepare(source, *grid.reading(name), c.too_long, c.train_on)
        lengths = [len(e.ids) for e in mixture.examples]
        for c in [grid.train_config(row) for row in runs.values() if row.template == name and grid.config.at_epochs]:
            sizes = c.examples_per_step, c.tokens_per_step, c.max_steps
            epoch_folders(c, list(order.plan(lengths, mixture.plans, c.seed, *sizes)))


def work(grid: Grid) -> None:
    """Do all that is left, together with whoever else works on the folder. What fails is told and passed over; when all
    else is finished, ValueError tells it again."""
    runs = list({row.run: row for row in grid.rows if row.template is not None}.values())
    failed: dict[str, str] = {}
    server = _Server(grid, failed)
    total = len(runs) + len(grid.cells)

    def done() -> int:
        return sum(map(grid.trained, runs)) + sum(map(grid.measured, grid.cells))

    before = done()
    if before:
        say(f"{before} of {total} rows and cells are finished already")
    with ProgressLine("rows and cells", total, first=before) as progress:
        while (now := done()) < total:
            progress.update(now)
            if _train_one(grid, runs, server, failed) or server.measure_some():
                continue
            lost = {row.run for row in runs if row.run in failed and not grid.trained(row)}
            waiting = [c for c in grid.cells if c.name not in failed and c.row.run not in lost and not grid.measured(c)]
            if not waiting and all(row.run in lost or grid.trained(row) for row in runs):
                break
            progress.update(now, "the rest is in other hands")
            time.sleep(PATIENCE)
        progress.update(now := done())  # others may have finished meanwhile
    if now < total:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise UserError(
            f"{total - now} of {total} rows and cells could not be finished, so there are no results. What failed: "
            f"{told}"
        )


def _train_one(grid: Grid, runs: Sequence[Row], server: _Server, failed: dict[str, str]) -> bool:
    """Train a row that nobody has trained or is training; False where there is none. What went wrong goes into
    `failed`, and such a row is not tried again here."""
    for row in runs:
        if row.run in failed:
            continue
        # Of use to an unfinished run alone, and three times as large as the model where all of it is trained.
        state = grid.out / "rows" / row.run / "state"
        if grid.trained(row) and not state.exists():
            continue
        with lock(grid.out / "locks", f"row.{row.run}") as mine:
            if not mine:
                continue
            trained = grid.trained(row)
            if not trained:
                server.release()
                try:
                    with settings_group("train"):
                        fine_tune(grid.train_config(row))
                except ValueError as error:
                    failed[row.run] = str(error)
                    say(f"{row.run} failed: {error}")
                    return True
            shutil.rmtree(state, ignore_errors=True)
            if not trained:
                return True
    return False


class _Server:
    """The models of this process: the base, loaded once, with any adapters over it, or one fully trained row. What goes
    wrong with a cell is noted in `failed`, and the cell is passed over."""

    def __init__(self, grid: Grid, failed: dict[str, str]):
        self.grid, self.failed = grid, failed
        self.dtype = pick_dtype(grid.config.eval.dtype)
        self.device = grid.tests.device
        self.loaded: tuple[str, Decoder] | None = None
        self.adapters: dict[str, Adapter] = {}

    def release(self) -> None:
        """Leave the memory to training, which loads a model of its own."""
        self.loaded, self.adapters = None, {}
        vars(self).pop("tools", None)
        gc.collect()

    @cached_property
    def tools(self) -> Tools:
        """The judge and whatever else measures answers: a model too, it may be."""
        return self.grid.tests.tools()

    def measure_some(self) -> bool:
        """Measure cells that are ready and free, several adapters at a time where one cell alone does not fill the
        batch; False where there are none."""
        grid = self.grid
        ready = [c for c in grid.cells if c.name not in self.failed and grid.trained(c.row)]
        open_cells = [c for c in ready if not grid.measured(c)]
        for first in open_cells:
            alike = [first]
            if not self._is_full(first.row):
                prompts = grid.tests.count(first.task)
                alike += [
                    c
                    for c in open_cells
                    if c != first and (c.test, c.task) == (first.test, first.task) and not self._is_full(c.row)
                ]
                alike = alike[: max(1, -(-2 * grid.config.eval.batch_size // prompts))]
            with ExitStack() as held:
                mine = [c for c in alike if held.enter_context(lock(grid.out / "locks", f"cell.{c.name}"))]
                mine = [c for c in mine if not grid.measured(c)]
                if mine:
                    self._measure(mine)
                    return True
        return False

    def _is_full(self, row: Row) -> bool:
        return row.template is not None and self.grid.config.train.full

    def _measure(self, cells: Sequence[Cell]) -> None:
        """Cells of one test template and one task."""
        grid, (test, task) = self.grid, (cells[0].test, cells[0].task)
        model, config = grid.models[test], grid.config.eval
        for cell in cells:
            grid.file(cell, "json").parent.mkdir(parents=True, exist_ok=True)
            try:
                AnswerFile(grid.file(cell, "answers.jsonl"))
            except ValueError as error:  # nobody's trouble but this cell's
                self._fail(cell, error)
        cells = [cell for cell in cells if cell.name not in self.failed]
        if not cells:
            return
        try:
            answerer = Answerer(
                self._decoder(cells[0].row),
                model.prompt_format,
                config,
                adapters=self._adapters(cells),
            )
        except ValueError as error:  # what a row has left on the disk is damaged
            if len(cells) == 1:
                self._fail(cells[0], error)
            else:  # of which one is enough; the others are measured without it
                for cell in cells:
                    self._measure([cell])
            return
        names = {cell: cell.row.name if cell.row.name in answerer.adapters else None for cell in cells}
        files = {names[cell]: grid.file(cell, "answers.jsonl") for cell in cells}
        with ProgressLine(f"{', '.join(c.row.name for c in cells)} under {test}: {task}", len(cells)) as inner:
            inner.update(0)

            def on_progress(done: int, statistics: Statistics) -> None:
                total = grid.tests.count(task) * (len(cells) if grid.tests.generates(task) else 1)
                saved = f", {statistics.cached_tokens} prompt tokens shared" if statistics.cached_tokens else ""
                rate = statistics.progress(statistics.answers + total - done)
                inner.update(0, f"{done}/{total} answers  {rate}{saved}")

            shared = 0.0
            for cell in cells:
                began = time.monotonic()
                others = {name: path for name, path in files.items() if name != names[cell]}
                one = replace(answerer, on_progress=on_progress, adapter=names[cell], other_files=others)
                result = None
                try:
                    with settings_group("eval"):
                        result = grid.tests.measure(task, one, files[names[cell]], self.tools)
                except ValueError as error:
                    self._fail(cell, error)
                seconds = time.monotonic() - began
                if grid.tests.generates(task) and cell == cells[0]:  # which asks for the answers of all
                    seconds = shared = seconds / len(cells)
                else:
                    seconds += shared
                if result is None:
                    continue
                rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
                write_atomically(grid.file(cell, "rows.jsonl"), rows.encode())
                figures = {**dataclasses.asdict(cell.row), "test": test, "task": task, "result": result.to_json()}
                figures["time"] = {"seconds": seconds}
                run_folder.write_json(grid.file(cell, "json"), figures)

    def _fail(self, cell: Cell, error: ValueError) -> None:
        self.failed[cell.name] = str(error)
        say(f"{cell.name} failed: {error}")

    def _decoder(self, row: Row) -> Decoder:
        name, folder = (row.name, self.grid.folder(row)) if self._is_full(row) else (plan.UNTOUCHED, self.grid.base)
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None
            gc.collect()  # or both models are in memory for a while
            self.loaded = (name, load_decoder(folder, self.dtype, self.device))
        return self.loaded[1]

    def _adapters(self, cells: Sequence[Cell]) -> dict[str, Adapter]:
        for row in {c.row for c in cells if c.row.template is not None and not self._is_full(c.row)}:
            if row.name not in self.adapters:
                self.adapters[row.name] = read_adapter(self._decoder(row), self.grid.folder(row))
        return self.adapters
