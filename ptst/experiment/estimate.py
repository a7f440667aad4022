"""What a grid would take, before anything is computed: tokens by the tokenizer; time by what is finished already, and
until then roughly, by how long this machine's matrix products take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from ptst.data import order
from ptst.experiment.plan import Cell, Row
from ptst.experiment.run import Grid
from ptst.model.config import DecoderConfig, read_json
from ptst.model.weights import pick_dtype
from ptst.training.memory import count_parameters

UNKNOWN = "unknown"


def estimate(grid: Grid, with_model: bool) -> list[dict[str, Any]]:
    """For every training run and cell its name, whether it is finished, tokens (trained on, or read and at most
    written), seconds, and whether these are rough; tokens and seconds are UNKNOWN without a model."""
    runs = list({row.run: row for row in grid.rows if row.template is not None}.values())
    trained: dict[str, Any] = {}
    tested: dict[tuple[str, str], int] = {}
    if with_model:
        trained = {name: _trained_tokens(grid, name) for name in grid.train_templates}
        tested = {(c.test, c.task): 0 for c in grid.cells}
        tested = {(test, task): grid.tests.count_tokens(task, grid.models[test]) for test, task in tested}
    rate_trained = _rate([_spent(grid, row, trained) for row in runs])
    rates = {task: _rate([_measured(grid, c, tested) for c in grid.cells if c.task == task]) for _, task in tested}
    rough = _pass_seconds(grid) if with_model else None
    # The backward pass of a product is two, or one where its weights stay as they are.
    rough_trained = rough and rough * (3 if grid.config.train.full else 2)
    lines = []
    for row in runs:
        tokens = trained.get(row.template or "", UNKNOWN)
        lines.append(_line(f"train {row.run}", grid.trained(row), tokens, rate_trained, rough_trained))
    for cell in grid.cells:
        tokens = tested.get((cell.test, cell.task), UNKNOWN)
        lines.append(_line(f"test {cell.name}", grid.measured(cell), tokens, rates.get(cell.task), rough))
    return lines


def _line(what: str, finished: bool, tokens: Any, rate: float | None, rough: float | None) -> dict[str, Any]:
    each = rough if rate is None else rate
    seconds: Any = 0.0 if finished else UNKNOWN if each is None or tokens == UNKNOWN else each * tokens
    return {
        "what": what,
        "finished": finished,
        "tokens": tokens,
        "seconds": seconds,
        "rough": rate is None and not finished and seconds != UNKNOWN,
    }


def _pass_seconds(grid: Grid) -> float:
    """What a token's products in one pass through the model take here, from the fastest of five of the widest one."""
    c, device = DecoderConfig.from_folder(grid.base), grid.tests.device
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


def _spent(grid: Grid, row: Row, trained: dict[str, Any]) -> tuple[float, int] | None:
    if not trained or not grid.trained(row):
        return None
    run = read_json(grid.out / "rows" / row.run / "run.json")
    return run["time"]["seconds"], trained[row.template or ""]


def _measured(grid: Grid, cell: Cell, tested: dict[tuple[str, str], int]) -> tuple[float, int] | None:
    if not grid.measured(cell):
        return None
    return read_json(grid.file(cell, "json"))["time"]["seconds"], tested[cell.test, cell.task]


def _rate(known: Sequence[tuple[float, int] | None]) -> float | None:
    """Seconds per token of what is finished: the median, since one that was killed knows the time of its rest alone."""
    rates = [seconds / tokens for seconds, tokens in filter(None, known) if tokens]
    return median(rates) if rates else None
