"""Working on a grid folder, alone or with other processes: runs are trained, cells are measured, nothing twice. A
worker takes whatever is neither finished nor locked, and waits while other workers finish the rest."""

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ptst import energy
from ptst.defenses.compose import load_defended
from ptst.errors import Setting, UserError, settings_group
from ptst.evaluation.answers import Answerer, AnswerFile, AskedSet
from ptst.evaluation.hosted_answers import HostedAnswerer
from ptst.evaluation.measure import decodings, find_tools, keep_replies, measure, reads, sampling_for, show_progress
from ptst.evaluation.readings import Readings
from ptst.evaluation.tasks.task import Prompt, TaskResult, Tools, over_decodings
from ptst.experiment.amounts import planned
from ptst.experiment.board import Board
from ptst.experiment.config import GridConfig
from ptst.experiment.grid import Grid
from ptst.experiment.grid_folder import rows_checksum
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.provenance import made_of, made_with
from ptst.experiment.status.at_work import remove_dead_notes
from ptst.experiment.status.items import Items, add_items
from ptst.experiment.status.observe import count_tokens
from ptst.experiment.status.watch import Part, Watch
from ptst.fingerprints import Fingerprint
from ptst.generation.multi_lora import Adapter, read_adapter
from ptst.model.decoder import Decoder
from ptst.model.quantized import Quantization
from ptst.model.weights import load_decoder, pick_dtype
from ptst.progress import ProgressLine, say
from ptst.storage import LOCKS, lock, remove_partial_files_of, write_atomically, write_json
from ptst.threads import threads_restored
from ptst.training.fine_tune import fine_tune

POLL = 0.5  # seconds between two checks of what other workers have finished


def work(worker: "Worker") -> None:
    """Do all that is left, together with other workers on the folder. What fails is reported and skipped; when
    everything else is finished, a UserError repeats it."""
    grid, waiting = worker.grid, False
    total = len(grid.runs) + len(grid.cells)
    before = worker.count_finished()
    if before:
        say(f"{before} of {total} runs and cells are finished already")
    if before == total:
        remove_dead_notes(grid.out)  # a process that was killed after its last cell left one
        return
    with own_board(worker) as progress:
        while (finished := worker.count_finished()) < total:
            progress.update(finished, "waiting for other workers" * waiting)
            if worker.train_one() or worker.measure_some():
                waiting = False
                continue
            if worker.nothing_left():
                break
            if not waiting:
                say("waiting for other workers")
            waiting = True
            time.sleep(POLL)
        finished = worker.count_finished()  # others may have finished meanwhile
        progress.refresh()
        progress.update(finished)
    if finished < total:
        words = [part for name, error in worker.failed.items() for part in ("; ", *failure(name, error))][1:]
        head = f"{total - finished} of {total} runs and cells failed, so there are no results ("
        raise UserError((head, *words, ")"))


@contextmanager
def own_board(
    worker: "Worker", what: str = "runs and cells", known: Items | None = None, watch: Watch | None = None
) -> Iterator[Board]:
    """The display of a worker's grid, over its runs and cells; `known`: amounts of what there is to do; `watch`: of all
    that is shown, where that is more than this grid."""
    out = worker.grid.out
    items = planned(worker.grid, known)
    add_items(out, items)
    with Board(what, out, watch or Watch([Part(out, "", items)], only=items)) as worker.board:
        yield worker.board
    worker.board = None


def failure(name: str, error: UserError) -> Iterator[str]:
    """The error of a run, a cell or a part `name`, in parts, its settings as the grid names them."""
    own = {f.name for f in dataclasses.fields(GridConfig)}
    yield f"{name}: "
    for part in error.parts:
        grouped = isinstance(part, Setting) and error.group and part not in own
        yield Setting(f"{error.group}.{part}") if grouped else part


class Worker:
    """This process's part of the work, and its models: the base model with any adapters, loaded once, or one fully
    fine-tuned or composed model. `failed`: errors by the name of a run or cell, which is then skipped."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.board: Board | None = None
        self.failed: dict[str, UserError] = {}
        self.loaded: tuple[Path | GridModel, Decoder] | None = None
        self.adapters: dict[str, Adapter] = {}
        self.weights: dict[GridModel, Fingerprint] = {}  # of those that were loaded
        self.loading: float | None = None  # seconds that the next cell's model took to load
        self.readings = Readings()
        self.prompts: dict[str, list[Prompt]] = {}  # by task

    def count_finished(self) -> int:
        return sum(map(self.grid.is_trained, self.grid.runs)) + sum(map(self.grid.is_measured, self.grid.cells))

    def nothing_left(self) -> bool:
        """Whether all that is not finished failed here, or depends on what failed here."""
        grid = self.grid
        untrained = {model.run for model in grid.runs if not grid.is_trained(model)}
        lost = untrained & self.failed.keys()
        measured = (c.name in self.failed or c.model.run in lost or grid.is_measured(c) for c in grid.cells)
        return untrained == lost and all(measured)

    # Training

    def train_one(self) -> bool:
        """Train a run that is neither finished nor locked; False where there is none."""
        for model in self.grid.runs:
            # Checkpoints serve an unfinished run only, and take three times the model's size in full fine-tuning.
            checkpoints = self.grid.run_folder(model) / "state"
            if model.run in self.failed or (self.grid.is_trained(model) and not checkpoints.exists()):
                continue
            with lock(self.grid.out / LOCKS, f"run.{model.run}") as mine:
                if not mine:
                    continue
                was_trained = self.grid.is_trained(model)
                if was_trained or self._train_shown(model):
                    shutil.rmtree(checkpoints, ignore_errors=True)
                if not was_trained:
                    return True
        return False

    def _train_shown(self, model: GridModel) -> bool:
        with self._busy(f"train {model.run}"):
            return self._train(model)

    def _busy(self, *names: str) -> AbstractContextManager[None]:
        """While this worker has these items in hand: it is shown where there is a display."""
        return nullcontext() if self.board is None else self.board.busy(*names)

    def _train(self, model: GridModel) -> bool:
        # Training loads its own model: free the memory.
        self.loaded, self.adapters, self.weights = None, {}, {}
        vars(self).pop("tools", None)
        gc.collect()
        try:
            with settings_group("train"), threads_restored():  # a run that is resumed keeps its number
                self._fine_tune(model)
        except UserError as error:
            self._fail(model.run, error)
            return False
        return True

    def _fine_tune(self, model: GridModel) -> None:
        self.grid.write_template(model)
        fine_tune(self.grid.train_config(model))

    # Measuring

    @cached_property
    def tools(self) -> Tools:
        """The judge and the similarity, which may be models, too."""
        tools = find_tools(self.grid.config.eval, self.grid.tasks, self.grid.device)
        keep_replies(tools.judge, self.grid.out)
        return tools

    def measure_some(self) -> bool:
        """Measure cells that are ready and not locked, several adapters at a time where one cell alone does not fill
        the batch; False where there are none."""
        grid = self.grid
        left = [c for c in grid.cells if c.name not in self.failed and not grid.is_measured(c)]
        open_cells = grid.with_weights(left) if left else []
        for i, first in enumerate(open_cells):
            with ExitStack() as held:
                together = self._together(first, open_cells[i + 1 :])
                mine = [c for c in together if held.enter_context(lock(grid.out / LOCKS, f"cell.{c.name}"))]
                mine = [c for c in mine if not grid.is_measured(c)]
                remove_partial_files_of(*(grid.cell_file(c, end) for c in mine for end in ("json", "rows.jsonl")))
                if mine:
                    with self._busy(*(f"test {c.name}" for c in mine)):
                        self._measure(mine)
                    return True
        return False

    def _together(self, first: GridCell, others: Sequence[GridCell]) -> list[GridCell]:
        """Cells that are measured at once: the first, and where it is answered as many others, under whatever template,
        that the same weights answer, with an adapter or without, as fill two batches."""
        grid, weights = self.grid, self._all_weights(first.model)
        found, prompts = [first], self._answered(first)
        for cell in others if prompts else ():
            if prompts >= 2 * grid.config.eval.batch_size:
                break
            if self._answered(cell) and self._all_weights(cell.model) == weights:
                found.append(cell)
                prompts += self._answered(cell)
        return found

    def _answered(self, cell: GridCell) -> int:
        """How many answers a cell has, over all decodings; none where prompts are scored or read."""
        return sum(p.kind == "generate" for p in self._prompts(cell)) * self.grid.config.eval.decode_seeds

    def _prompts(self, cell: GridCell) -> list[Prompt]:
        if cell.task not in self.prompts:
            task, data = self.grid.tasks[cell.task]
            self.prompts[cell.task] = task.prompts(data.items)
        return self.prompts[cell.task]

    def _measure(self, cells: Sequence[GridCell]) -> None:
        """Measure cells that the same weights answer."""
        cells = [cell for cell in cells if self._has_sound_answers(cell)]
        for cell in cells:
            self._weights(cell.model)
        if not cells:
            return
        grid, began = self.grid, time.monotonic()
        before = self.loaded and self.loaded[0]  # not the model itself, which makes room for the next
        try:
            decoder, adapters = self._decoder(cells[0].model), self._adapters(cells)
        except UserError as error:  # a run's files on disk are damaged
            if len(cells) == 1:
                self._fail(cells[0].name, error)
            else:  # one run's are enough; the others are measured without it
                for cell in cells:
                    self._measure([cell])
            return
        answerer = Answerer(
            decoder,
            grid.opened[cells[0].asked].prompt_format,
            grid.config.eval,
            adapters=adapters,
            models={self._adapter(cell): grid.answers_model(self._weights(cell.model)) for cell in cells},
            readings=self.readings,
        )
        self.loading = time.monotonic() - began if self.loaded and self.loaded[0] != before else None
        named = zip(*((c.model.name, c.asked, c.task) for c in cells), strict=True)
        models, tests, tasks = (", ".join(dict.fromkeys(names)) for names in named)
        total = sum(map(self._answered, cells)) or len(self._prompts(cells[0]))
        with ProgressLine(f"{models} under {tests}: {tasks}", total) as progress:
            progress.update(0)
            self._measure_with(replace(answerer, on_progress=show_progress(progress)), cells)

    def _asked_sets(self, cell: GridCell) -> list[AskedSet]:
        """What is answered in a cell, by decoding."""
        grid, prompts = self.grid, [p for p in self._prompts(cell) if p.kind == "generate"]
        (task, data), path = grid.tasks[cell.task], grid.cell_file(cell, "answers.jsonl")
        asked = partial(AskedSet, self._adapter(cell), prompts, grid.opened[cell.asked].prompt_format, path=path)
        seeds = decodings(grid.config.eval, task, data) if prompts else ()
        return [asked(sampling=sampling_for(grid.config.eval, data, seed)) for seed in seeds]

    def _measure_with(self, answerer: Answerer, cells: Sequence[GridCell]) -> None:
        """Measure cells one after another; all generated answers are made with those of the first."""
        together = [asked for cell in cells for asked in self._asked_sets(cell)][1:]
        shared = 0.0  # seconds of generating, which the first cell spends for all
        for cell in cells:
            began, joules = time.monotonic(), energy.joules()
            task, data = self.grid.tasks[cell.task]
            one = replace(
                answerer,
                prompt_format=self.grid.opened[cell.asked].prompt_format,
                adapter=self._adapter(cell),
                besides=together if cell == cells[0] else (),  # what failed of the others is asked again in its turn
                trained_with=self.grid.trained_with(cell) if reads(task, data) else None,
            )
            results = None
            try:
                results = self._by_decoding(cell, one)
            except UserError as error:
                self._fail(cell.name, error)
            seconds = time.monotonic() - began
            if len(cells) > 1 and cell == cells[0]:
                seconds = shared = seconds / len(cells)
            else:
                seconds += shared
            if results is not None:
                self._write(cell, results, {"seconds": seconds, **energy.spent(joules)})

    def _by_decoding(self, cell: GridCell, answerer: Answerer | HostedAnswerer) -> dict[int, TaskResult]:
        """A cell's results by decoding seed. Raises UserError as `measure`."""
        grid, found = self.grid, dict[int, TaskResult]()
        (task, data), path = grid.tasks[cell.task], grid.cell_file(cell, "answers.jsonl")
        with settings_group("eval"):
            for seed in decodings(grid.config.eval, task, data):
                sampling = sampling_for(grid.config.eval, data, seed)
                found[seed] = measure(task, data, answerer, sampling, self.tools, path)
                if isinstance(answerer, Answerer):
                    answerer = replace(answerer, besides=())  # they were answered with the first
        return found

    def _write(self, cell: GridCell, results: Mapping[int, TaskResult], spent: Mapping[str, Any]) -> None:
        result = over_decodings(results) if len(results) > 1 else next(iter(results.values()))
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
        write_atomically(self.grid.cell_file(cell, "rows.jsonl"), rows.encode())
        figures = {**cell.identity, "result": result.to_json(), "rows": rows_checksum(rows.encode())}
        figures |= {"decodings": {seed: r.to_json() for seed, r in results.items()}} if len(results) > 1 else {}
        figures |= {"made_of": made_of(self.grid, cell, self._weights(cell.model)), "made_with": self.made_with}
        figures |= {"judge": self.grid.judge_record, **self._more(cell)}
        write_json(self.grid.cell_file(cell, "json"), {**figures, "time": {**spent, **self._times(cell)}})

    def _times(self, cell: GridCell) -> dict[str, float]:
        """What the time of a cell depends on, for the estimate of others: seconds that loading its model took before,
        where it was loaded for this cell, and tokens of its answers."""
        loading, self.loading = self.loading, None
        path = self.grid.cell_file(cell, "answers.jsonl")
        tokens = count_tokens(path) if path.exists() else 0
        return ({} if loading is None else {"loading": loading}) | ({"tokens": tokens} if tokens else {})

    def _more(self, cell: GridCell) -> dict[str, Any]:
        """What else is written of a measured cell."""
        return {}

    def _has_sound_answers(self, cell: GridCell) -> bool:
        """Whether the answers that an earlier worker kept are those of this cell; if not, the cell alone fails."""
        grid, path = self.grid, self.grid.cell_file(cell, "answers.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.exists():
                AnswerFile(path, grid.asked(cell, self._weights(cell.model)))
        except UserError as error:
            self._fail(cell.name, error)
            return False
        return True

    def _fail(self, name: str, error: UserError) -> None:
        self.failed[name] = error
        if self.board is not None:
            kind = "test" if "/" in name else "train"
            self.board.file.fail(f"{kind} {name}", "".join(failure(name, error)).removeprefix(f"{name}: "))
        say(f"failed: {''.join(failure(name, error))}")

    @cached_property
    def made_with(self) -> dict[str, Any]:
        return made_with()

    def _weights(self, model: GridModel) -> Fingerprint:
        """Of the model's folder, taken before it is loaded."""
        if model not in self.weights:
            self.weights[model] = self.grid.weights(model)
        return self.weights[model]

    def _adapter(self, cell: GridCell) -> str | None:
        """The name of the adapter that answers; None where the decoder alone does."""
        return cell.model.name if self.grid.is_adapter(cell.model) else None

    def _all_weights(self, model: GridModel) -> Path | GridModel:
        """Where all weights come from: a folder (under an adapter, the base model's), or a model to be composed."""
        if model.is_composed:
            return model
        return self.grid.weights_folder(GridModel() if self.grid.is_adapter(model) else model)

    def _decoder(self, model: GridModel) -> Decoder:
        source, grid = self._all_weights(model), self.grid
        if self.loaded is None or self.loaded[0] != source:
            self.loaded = None
            gc.collect()  # or both models are in memory for a while
            how = pick_dtype(grid.config.eval.dtype), grid.device
            if isinstance(source, GridModel):
                composition = grid.composition(source)
                say(f"composing {source.name}: {composition.told}")
                self.loaded = (source, load_defended(composition, *how))
            else:
                own = source == grid.base.folder  # a whole model of its own is no quantized base
                quantization = Quantization.of(grid.quantize) if own else None
                say(f"loading {source}{f', its projections rounded to {grid.quantize}' * bool(quantization)}")
                self.loaded = (source, load_decoder(source, *how, quantization))
        return self.loaded[1]

    def _adapters(self, cells: Sequence[GridCell]) -> dict[str, Adapter]:
        for model in {c.model for c in cells if self.grid.is_adapter(c.model)}:
            if model.name not in self.adapters:
                self.adapters[model.name] = read_adapter(self._decoder(model), self.grid.weights_folder(model))
        return self.adapters
