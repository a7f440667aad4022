"""What a grid would take, before anything is computed: tokens by the tokenizer; time from what is finished already, and
until then roughly, from how long this machine's matrix products take."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch

from ptst.evaluation.measure import count_tokens, sampling_for
from ptst.experiment.grid import Grid
from ptst.model.weights import pick_dtype
from ptst.progress import say
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
        left = "finished" if self.finished else in_words(self.tokens, self.seconds, self.rough)
        return f"{self.what}: {left}"


def in_words(tokens: int | None, seconds: float | None, rough: bool) -> str:
    minutes = "time unknown" if seconds is None else f"{'roughly ' * rough}{seconds / 60:.1f} min"
    return f"{'unknown' if tokens is None else tokens} tokens, {minutes}"


def estimate(grid: Grid, with_model: bool) -> list[Estimate]:
    """An estimate for every grid run and cell. `with_model`: the model's files are there, so tokens can be counted."""
    trained: dict[str | None, int] = {}
    tested: dict[tuple[str, str], int] = {}
    rough = None
    if with_model:
        say("counting the tokens under every template")
        for name in grid.train_templates:
            mixture = grid.mixture(name)
            steps = grid.steps(mixture, grid.config.seeds[0])
            trained[name] = sum(len(mixture.examples[i].ids) for step in steps for i in step.examples)
        for (test, model), (key, (task, data)) in product(grid.opened.items(), grid.tasks.items()):
            new = sampling_for(grid.config.eval, data).max_new_tokens
            tested[test, key] = count_tokens(task, data, model.prompt_format, new)
        rough = _seconds_per_token(grid)
    # The backward pass of a product takes two products, or one where its weights are frozen.
    rough_train = rough and rough * (3 if grid.config.train.full else 2)
    records = {m.run: grid.run_record(m) for m in grid.runs if grid.is_trained(m)}
    rate = _rate((r.time, trained.get(m.template)) for m in grid.runs if (r := records.get(m.run)))
    lines = [
        _estimate(f"train {m.run}", m.run in records, trained.get(m.template), rate, rough_train) for m in grid.runs
    ]
    measured = {c: grid.cell_figures(c)["time"] for c in grid.cells if grid.is_measured(c)}
    rates = {
        task: _rate((spent, tested.get((c.test, task))) for c, spent in measured.items() if c.task == task)
        for task in grid.tasks
    }
    lines += [
        _estimate(f"test {c.name}", c in measured, tested.get((c.test, c.task)), rates[c.task], rough)
        for c in grid.cells
    ]
    return lines


def _estimate(what: str, finished: bool, tokens: int | None, rate: float | None, rough: float | None) -> Estimate:
    each = rough if rate is None else rate
    seconds = 0.0 if finished else None if each is None or tokens is None else each * tokens
    return Estimate(what, finished, tokens, seconds, rate is None and not finished and seconds is not None)


def _rate(times: Iterable[tuple[dict[str, float] | None, int | None]]) -> float | None:
    """Seconds per token: the median, since a run that was killed knows only the time of its rest."""
    rates = [spent["seconds"] / tokens for spent, tokens in times if spent and tokens]
    return median(rates) if rates else None


def _seconds_per_token(grid: Grid) -> float:
    """Time of a token's products in one forward pass, from the fastest of five of the widest product."""
    c, device = grid.base.config, grid.device
    num_tokens, dtype = 512, pick_dtype(grid.config.eval.dtype)
    x_TE, w_FE = (torch.ones(n, c.hidden_size, dtype=dtype, device=device) for n in (num_tokens, c.intermediate_size))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float(torch.nn.functional.linear(x_TE, w_FE)[0, 0])  # which waits for the device
        times.append(time.perf_counter() - began)
    return min(times) / (num_tokens * w_FE.numel()) * count_parameters(c)
