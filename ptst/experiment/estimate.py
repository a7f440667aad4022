"""What a grid would take, before anything is computed: tokens by the tokenizer; memory by plan; time from what is
finished already, and until then roughly, from how long this machine's matrix products take."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import median

import torch

from ptst.evaluation.measure import TaskSize, sampling_for, task_size
from ptst.experiment.grid import Grid
from ptst.experiment.hosted_grid import HostedGrid
from ptst.experiment.plan import GridModel
from ptst.generation.kv_cache import BLOCK_SIZE, bytes_per_token, cache_dtype, plan_blocks
from ptst.model.weights import pick_dtype
from ptst.progress import say
from ptst.training.memory import MemoryPlan, Method, count_parameters, gigabytes
from ptst.training.run_plan import plan_memory

_PATIENCE = 1.0  # seconds of measuring
_UNLIMITED = 2**62  # bytes of KV cache: what is free here says nothing of the machine that the grid is for


@dataclass(frozen=True)
class Estimate:
    """A run or cell. `tokens`: trained on, or read and at most written; `seconds` left; `memory`: bytes at the peak of
    a run, or of weights and KV cache. None: unknown without the model, memory also where micro-batches are to fit what
    will be free. `rough`: seconds are not from finished runs or cells."""

    what: str
    finished: bool
    tokens: int | None
    seconds: float | None
    rough: bool
    memory: int | None
    cost: float | None = None
    """At most, at an endpoint with a price."""

    def __str__(self) -> str:
        left = in_words(self.tokens, self.seconds, self.rough, self.memory, self.cost)
        return f"{self.what}: {'finished' if self.finished else left}"


def in_words(
    tokens: int | None, seconds: float | None, rough: bool, memory: int | None, cost: float | None = None
) -> str:
    minutes = "time unknown" if seconds is None else f"{'roughly ' * rough}{seconds / 60:.1f} min"
    room = "" if memory is None else f", {gigabytes(memory)} of memory"
    price = "" if cost is None else f", cost at most {cost:,.4f}"
    return f"{'unknown' if tokens is None else tokens} tokens, {minutes}{room}{price}"


def estimate(grid: Grid, with_model: bool) -> list[Estimate]:
    """An estimate for every grid run and cell. `with_model`: the model's files are there, so tokens can be counted."""
    rough = None
    if with_model:
        say("counting the tokens under every template")
        rough = seconds_per_token(grid)
    return [*_runs(grid, rough), *_cells(grid, rough)]


def estimate_hosted(grid: HostedGrid) -> list[Estimate]:
    """The same of a grid at an endpoint: tokens, and what they cost at most where prices were given. Raises UserError
    as `plan_hosted`."""
    price, lines = grid.config.eval.api_price, []
    for m in grid.runs:
        plan = grid.plans.get(m.run)
        tokens, cost = (plan.tokens, plan.cost) if plan else (None, None)
        lines.append(Estimate(f"train {m.run}", plan is None, tokens, None if plan else 0.0, False, None, cost))
    for c in grid.cells:
        size, done = grid.size(c.asked, c.task), grid.is_measured(c)
        cost = None if price is None or done else size.cost(price)
        seconds = 0.0 if done else None
        lines.append(Estimate(f"test {c.name}", done, size.tokens_in + size.tokens_out, seconds, False, None, cost))
    return lines


def _runs(grid: Grid, rough: float | None) -> list[Estimate]:
    """Estimates of the trainings. `rough`: seconds of a token's products in one forward pass, None without a model."""
    settings = grid.config.train
    plans = {} if rough is None else _plan_runs(grid)
    # The backward pass of a product takes two products, or one where its weights are frozen.
    rough = rough and rough * (3 if settings.full else 2)
    records = {m.run: grid.run_record(m) for m in grid.runs if grid.is_trained(m)}
    tokens = {m.run: plans[m.run].tokens if plans else None for m in grid.runs}
    rate = _rate((record.time, tokens[run]) for run, record in records.items() if record)
    lines = []
    for m in grid.runs:
        peak = plans[m.run].peak if plans and settings.micro_batch_tokens != "auto" else None
        seconds = _seconds(m.run in records, tokens[m.run], rate, rough)
        lines.append(Estimate(f"train {m.run}", m.run in records, tokens[m.run], *seconds, peak))
    return lines


def _cells(grid: Grid, rough: float | None) -> list[Estimate]:
    """Estimates of the cells, as `_runs`."""
    sizes: dict[tuple[str, str], TaskSize] = {}
    opened = {} if rough is None else grid.opened
    for (test, model), (key, (task, data)) in product(opened.items(), grid.tasks.items()):
        new = sampling_for(grid.config.eval, data).max_new_tokens
        sizes[test, key] = task_size(task, data, model.prompt_format, new)
    tokens = {c: sizes[c.asked, c.task].tokens if sizes else None for c in grid.cells}
    measured = {c: grid.cell_figures(c)["time"] for c in grid.cells if grid.is_measured(c)}
    rates = {task: _rate((spent, tokens[c]) for c, spent in measured.items() if c.task == task) for task in grid.tasks}
    lines = []
    for c in grid.cells:
        memory = _test_memory(grid, sizes[c.asked, c.task]) if sizes else None
        seconds = _seconds(c in measured, tokens[c], rates[c.task], rough)
        lines.append(Estimate(f"test {c.name}", c in measured, tokens[c], *seconds, memory))
    return lines


def _plan_runs(grid: Grid) -> dict[str, MemoryPlan]:
    """Memory and tokens of every run; those that differ in the seed alone are planned once."""
    found: dict[tuple[str | None, str], MemoryPlan] = {}
    for model in grid.runs:
        if (model.template, model.defense) not in found:
            found[model.template, model.defense] = _plan_run(grid, model)
    return {model.run: found[model.template, model.defense] for model in grid.runs}


def _plan_run(grid: Grid, model: GridModel) -> MemoryPlan:
    """Memory and tokens of a run."""
    mixture, settings = grid.mixture(model), grid.train_config(model)
    longest = max((len(e.ids) for e in mixture.examples), default=1)
    limit = longest if settings.micro_batch_tokens == "auto" else settings.micro_batch_tokens
    return plan_memory(grid.base.config, Method.of(settings), mixture.examples, grid.steps(model, mixture), limit)


def _test_memory(grid: Grid, size: TaskSize) -> int:
    """Bytes of the weights, and of the KV cache that the engine would ask for."""
    config, settings = grid.base.config, grid.config.eval
    dtype, device = pick_dtype(settings.dtype), torch.device(grid.device)
    kept, batch_size = cache_dtype(dtype, device), min(settings.batch_size, size.answers)
    blocks = plan_blocks(config, kept, device, batch_size, size.longest, settings.kv_bytes or _UNLIMITED)
    return count_parameters(config) * dtype.itemsize + blocks * BLOCK_SIZE * bytes_per_token(config, kept)


def _seconds(finished: bool, tokens: int | None, rate: float | None, rough: float | None) -> tuple[float | None, bool]:
    """Seconds left, and whether they are rough."""
    each = rough if rate is None else rate
    seconds = 0.0 if finished else None if each is None or tokens is None else each * tokens
    return seconds, rate is None and not finished and seconds is not None


def _rate(times: Iterable[tuple[dict[str, float] | None, int | None]]) -> float | None:
    """Seconds per token: the median, since a run that was killed knows only the time of its rest."""
    rates = [spent["seconds"] / tokens for spent, tokens in times if spent and tokens]
    return median(rates) if rates else None


def seconds_per_token(grid: Grid) -> float:
    """Time of a token's products in one forward pass, from the widest product."""
    c = grid.base.config
    product = _seconds_of_product(c.hidden_size, c.intermediate_size, pick_dtype(grid.config.eval.dtype), grid.device)
    return product / (c.hidden_size * c.intermediate_size) * count_parameters(c)


@cache
def _seconds_of_product(num_in: int, num_out: int, dtype: torch.dtype, device: str) -> float:
    """Time that the product of a token with a matrix takes among many tokens: of the fastest of as many tries as take
    a second, since what else the machine is doing only slows them down."""
    num_tokens = 512
    x_TE, w_FE = (torch.ones(n, num_in, dtype=dtype, device=device) for n in (num_tokens, num_out))
    best, end = math.inf, time.perf_counter() + _PATIENCE
    while (began := time.perf_counter()) < end or best == math.inf:
        float(torch.nn.functional.linear(x_TE, w_FE)[0, 0])  # which waits for the device
        best = min(best, time.perf_counter() - began)
    return best / num_tokens
