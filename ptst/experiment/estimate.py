"""What a grid would take, before anything is computed: tokens by the tokenizer; time from what is finished already, and
until then roughly, from how long this machine's matrix products take."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from ptst.data import order
from ptst.experiment.grid import Grid
from ptst.model.weights import pick_dtype
from ptst.training.memory import count_parameters


@dataclass(frozen=True)
class Estimate:
    """A run or cell. `tokens`: trained on, or read and at most written; `seconds` left. None: unknown without the
    model. `rough`: seconds are not from finished runs or cells."""

    what: str
    finished: bool
    tokens: int | None
    seconds: float | None
    rough: bool

    def __str__(self) -> str:
        if self.finished:
            return f"{self.what}: finished"
        tokens = "unknown" if self.tokens is None else self.tokens
        return f"{self.what}: {tokens} tokens, {minutes(self.seconds, self.rough)}"


def minutes(seconds: float | None, rough: bool) -> str:
    return "time unknown" if seconds is None else f"{'roughly ' * rough}{seconds / 60:.1f} min"


def estimate(grid: Grid, with_model: bool) -> list[Estimate]:
    """An estimate for every grid run and cell. `with_model`: the model's files are there, so tokens can be counted."""
    trained: dict[str, int] = {}
    tested: dict[tuple[str, str], int] = {}
    if with_model:
        trained = {name: _trained_tokens(grid, name) for name in grid.train_templates}
        pairs = dict.fromkeys((c.test, c.task) for c in grid.cells)
        tested = {(test, task): grid.suite.count_tokens(task, grid.opened[test]) for test, task in pairs}
    train_rate = _rate(_run_times(grid, trained))
    test_rates = {task: _rate(_cell_times(grid, task, tested)) for _, task in tested}
    rough = _seconds_per_token(grid) if with_model else None
    # The backward pass of a product takes two products, or one where its weights are frozen.
    rough_train = rough and rough * (3 if grid.config.train.full else 2)
    lines = [
        _estimate(f"train {m.run}", grid.is_trained(m), trained.get(m.template or ""), train_rate, rough_train)
        for m in grid.runs
    ]
    for cell in grid.cells:
        tokens = tested.get((cell.test, cell.task))
        lines.append(_estimate(f"test {cell.name}", grid.is_measured(cell), tokens, test_rates.get(cell.task), rough))
    return lines


def _estimate(what: str, finished: bool, tokens: int | None, rate: float | None, rough: float | None) -> Estimate:
    each = rough if rate is None else rate
    seconds = 0.0 if finished else None if each is None or tokens is None else each * tokens
    return Estimate(what, finished, tokens, seconds, rate is None and not finished and seconds is not None)


def _seconds_per_token(grid: Grid) -> float:
    """Time of a token's products in one forward pass, from the fastest of five of the widest product."""
    c, device = grid.base.config, grid.suite.device
    rows, dtype = 512, pick_dtype(grid.config.eval.dtype)
    x_TE, w_FE = (torch.ones(n, c.hidden_size, dtype=dtype, device=device) for n in (rows, c.intermediate_size))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float(torch.nn.functional.linear(x_TE, w_FE)[0, 0])  # which waits for the device
        times.append(time.perf_counter() - began)
    return min(times) / (rows * w_FE.numel()) * count_parameters(c)


def _trained_tokens(grid: Grid, template: str) -> int:
    """Tokens of one run's steps."""
    c, mixture = grid.config.train, grid.mixture(template)
    lengths = [len(e.ids) for e in mixture.examples]
    seed = grid.config.seeds[0]
    steps = order.plan(lengths, mixture.plans, seed, c.examples_per_step, c.tokens_per_step, c.max_steps)
    return sum(lengths[i] for step in steps for i in step.examples)


def _run_times(grid: Grid, trained: dict[str, int]) -> Iterable[tuple[float, int]]:
    """(seconds, tokens) of the finished runs."""
    for model in grid.runs if trained else ():
        record = grid.run_record(model)
        if record is not None and record.status == "finished" and record.time:
            yield record.time["seconds"], trained[model.template or ""]


def _cell_times(grid: Grid, task: str, tested: dict[tuple[str, str], int]) -> Iterable[tuple[float, int]]:
    """(seconds, tokens) of a task's finished cells."""
    for cell in grid.cells:
        if cell.task == task and grid.is_measured(cell):
            yield grid.cell_figures(cell)["time"]["seconds"], tested[cell.test, cell.task]


def _rate(times: Iterable[tuple[float, int]]) -> float | None:
    """Seconds per token: the median, since a run that was killed knows only the time of its rest."""
    rates = [seconds / tokens for seconds, tokens in times if tokens]
    return median(rates) if rates else None
