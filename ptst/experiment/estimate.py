"""What a grid would take, before anything is computed: tokens by the tokenizer; memory by plan; time from what is
finished already, and until then roughly, from how long this machine's matrix products take."""

import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from ptst.data.example_arrays import lengths_of
from ptst.evaluation.measure import TaskSize, task_size
from ptst.experiment.amounts import planned
from ptst.experiment.grid import Grid
from ptst.experiment.hosted_grid import HostedGrid
from ptst.experiment.plan import GridModel
from ptst.experiment.status.forecast import Forecast, Left
from ptst.experiment.status.items import Item
from ptst.experiment.status.observe import Observer
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
    """An estimate for every grid run and cell. `with_model`: the model's files are there, so tokens can be counted.
    Raises UserError for files of the grid that are damaged."""
    plans, items, guess = dict[str, MemoryPlan](), dict[str, Item](), None
    if with_model:
        say("counting the tokens under every template")
        guess = seconds_per_token(grid)
        if (busy := other_load()) is not None:
            cores = f"{os.cpu_count()} cores"
            say(f"note: other processes ask for {busy:.1f} cores here ({cores}), so that all times come out too long")
        plans = _plan_runs(grid)
        items = planned(grid)
    names = {f"train {m.run}": Item("train", m.run) for m in grid.runs}
    names |= {f"test {c.name}": Item("test", c.name) for c in grid.cells}
    found = Observer(grid.out).look(items or names)
    if found.damaged:
        raise found.damaged[0]
    for cell in grid.cells:
        if grid.is_measured(cell):
            grid.cell_figures(cell)  # which says what is wrong with them
    left = Forecast(items, found.finished, found.seen, guess).left
    return [*_runs(grid, plans, found.finished, left), *_cells(grid, bool(items), found.finished, left)]


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


def _runs(
    grid: Grid, plans: Mapping[str, MemoryPlan], finished: Collection[str], left: Mapping[str, Left]
) -> Iterator[Estimate]:
    """Estimates of the trainings. `plans`: of each, or of none without a model."""
    for m in grid.runs:
        plan, what = plans.get(m.run), f"train {m.run}"
        peak = plan.peak if plan and grid.config.train.micro_batch_tokens != "auto" else None
        yield Estimate(what, what in finished, plan.tokens if plan else None, *_seconds(what, finished, left), peak)


def _cells(grid: Grid, counted: bool, finished: Collection[str], left: Mapping[str, Left]) -> Iterator[Estimate]:
    """Estimates of the cells, as `_runs`. `counted`: there is a tokenizer to count with."""
    sizes: dict[tuple[str, str], TaskSize] = {}
    for (test, model), (key, (task, data)) in product((grid.opened if counted else {}).items(), grid.tasks.items()):
        sizes[test, key] = task_size(task, data, model.prompt_format, grid.config.eval)
    for c in grid.cells:
        size, what = sizes.get((c.asked, c.task)), f"test {c.name}"
        memory = None if size is None else _test_memory(grid, size)
        yield Estimate(what, what in finished, size.tokens if size else None, *_seconds(what, finished, left), memory)


def _seconds(what: str, finished: Collection[str], left: Mapping[str, Left]) -> tuple[float | None, bool]:
    """Seconds left, and whether they are rough."""
    if what in finished:
        return 0.0, False
    found = left.get(what, Left(None, False))
    return found.seconds, found.rough and found.seconds is not None


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
    longest = max(lengths_of(mixture.examples), default=1)
    limit = longest if settings.micro_batch_tokens == "auto" else settings.micro_batch_tokens
    steps = grid.steps(model, mixture)
    grid.note_size(model, mixture, steps)
    return plan_memory(grid.base.config, Method.of(settings), mixture.examples, steps, limit)


def _test_memory(grid: Grid, size: TaskSize) -> int:
    """Bytes of the weights, and of the KV cache that the engine would ask for."""
    config, settings = grid.base.config, grid.config.eval
    dtype, device = pick_dtype(settings.dtype), torch.device(grid.device)
    kept, batch_size = cache_dtype(dtype, device), min(settings.batch_size, size.answers)
    blocks = plan_blocks(config, kept, device, batch_size, size.longest, settings.kv_bytes or _UNLIMITED)
    return count_parameters(config) * dtype.itemsize + blocks * BLOCK_SIZE * bytes_per_token(config, kept)


def other_load() -> float | None:
    """How many cores other processes ask for, where they are so many that a measurement here suffers."""
    try:
        load = os.getloadavg()[0]  # of the last minute, so hardly of this process
    except OSError:
        return None
    return load if load > 0.5 * (os.cpu_count() or 1) else None


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
