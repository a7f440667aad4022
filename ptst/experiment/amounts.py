"""How much there is to compute in a grid, run by run and cell by cell, from its settings and the tokenizer alone.

The unit is a token of one forward pass (`ptst.experiment.status.items`). Nothing is encoded that need not be: runs that
differ in the seed alone count once, and of a large set of prompts some stand for all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from ptst.errors import UserError
from ptst.evaluation.measure import decodings, sampling_for
from ptst.experiment.grid import Grid
from ptst.experiment.hosted_grid import HostedGrid
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.run_size import RunSize
from ptst.experiment.status.items import Item, Items, read_items
from ptst.progress import say

SAMPLED = 200  # prompts at most that are encoded for an amount
# What a decoding step costs besides its tokens, reading the weights, in tokens of a forward pass.
_STEP = {"cpu": 10.0, "cuda": 200.0}


@dataclass
class Amounts:
    """Counts for a grid, and for others that differ in models or seeds alone. Raises UserError as `Grid.mixture` and
    `Prompt.encode`."""

    grid: Grid
    cells: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def items(self, models: Sequence[GridModel] | None = None, cells: Sequence[GridCell] | None = None) -> list[Item]:
        """What there is to do for these models and cells, by default the grid's own."""
        grid = self.grid
        models, cells = grid.models if models is None else models, grid.cells if cells is None else cells
        runs = {m.run: m.training for m in models if m.template is not None}
        return [*(self.run(model) for model in runs.values()), *(self.cell(cell) for cell in cells)]

    def run(self, model: GridModel) -> Item:
        size = self.run_size(model)
        return Item(
            "train",
            model.run,
            model.defense,
            fixed=size.amount,
            before=size.before,
            parts=size.steps,
            tokens=size.tokens,
        )

    def run_size(self, model: GridModel) -> RunSize:
        """Of the training of a model; that of a composed one has no defence."""
        if not isinstance(self.grid, HostedGrid):
            return self.grid.run_size(model.training)
        plan = self.grid.plans.get(model.run)  # of what is finished there is none
        tokens = plan.tokens if plan else 0
        return RunSize(0, tokens, float(tokens), 0.0, 0.0)

    def cell(self, cell: GridCell) -> Item:
        key = (cell.asked, cell.task)
        if key not in self.cells:
            self.cells[key] = _hosted_prompts(self.grid, *key) if self._hosted else _prompts(self.grid, *key)
        counts, model = self.cells[key], cell.model
        length = None
        if model.template is not None and counts["longest"] and not self._hosted:
            length = min(1.0, max(0.05, self.run_size(model).answer / counts["longest"]))
        return Item(
            "test",
            cell.name,
            cell.task,
            fixed=counts["fixed"],
            answers=counts["answers"],
            steps=counts["steps"],
            parts=int(counts["parts"]),
            tokens=int(counts["tokens"]),
            model=model.name,
            needs=model.run if model.template is not None else "",
            loads="" if self._hosted else self._loads(model),
            length=length,
        )

    @property
    def _hosted(self) -> bool:
        return isinstance(self.grid, HostedGrid)

    def _loads(self, model: GridModel) -> str:
        if model.is_composed:
            return f"compose {model.defense}"
        return "" if self.grid.is_adapter(model) else "read"


def planned(grid: Grid, known: Items | None = None) -> dict[str, Item]:
    """What there is to do in a grid. What is in its folder, or in `known`, is not counted again. Raises UserError as
    `Amounts`."""
    amounts, found = Amounts(grid), dict[str, Item](known or {})
    try:
        found |= read_items(grid.out)
    except UserError as error:
        say(f"note: {error}")
    runs = {f"train {m.run}": m for m in grid.runs}
    cells = {f"test {c.name}": c for c in grid.cells}
    found |= {what: amounts.run(model) for what, model in runs.items() if what not in found}
    found |= {what: amounts.cell(cell) for what, cell in cells.items() if what not in found}
    return {what: found[what] for what in (*runs, *cells)}


def _prompts(grid: Grid, asked: str, key: str) -> dict[str, float]:
    """Counts of a task under a template, by the names of Item's fields; `longest`: the limit of one answer."""
    task, data = grid.tasks[key]
    prompts = task.prompts(data.items)
    openings = any(p.opening is not None for p in prompts)  # they come in groups, which are computed together
    every = 1 if openings else max(1, len(prompts) // SAMPLED)
    some = prompts[::every]
    times = len(decodings(grid.config.eval, task, data))
    scale = times * len(prompts) / len(some) if some else 0.0
    prompt_format, limit = grid.opened[asked].prompt_format, sampling_for(grid.config.eval, data).max_new_tokens
    read, compared, generated, seen, ids = 0, 0, 0, None, list[list[int]]()
    for prompt in some:
        example = prompt.encode(prompt_format)
        shared = example.loss_mask.index(True) if prompt.opening is not None and seen is prompt.conversation else 0
        read, seen = read + len(example.ids) - shared, prompt.conversation
        if prompt.kind == "generate":
            generated += 1
            ids.append(example.ids)
        elif prompt.kind == "prompt":  # compared with the prompt of the training, which is about as long
            compared += len(example.ids)
    whole = scale * (read + compared)
    answers = round(scale * generated)
    saved = (answers - 1) * _common(ids) if answers > 1 else 0.0  # the prefix cache has what all begin with
    rounds = -(-answers // grid.config.eval.batch_size)
    step = _STEP["cuda" if grid.device == "cuda" else "cpu"]
    return {
        "fixed": whole - saved,
        "answers": float(answers * limit),
        "steps": step * rounds * limit,
        "parts": times * len(prompts),
        "tokens": round(scale * read) + answers * limit,
        "longest": float(limit if answers else 0),
    }


def _hosted_prompts(grid: Grid, asked: str, key: str) -> dict[str, float]:
    """The same at an endpoint, where nothing is known but that answers take time."""
    assert isinstance(grid, HostedGrid)
    size = grid.size(asked, key)
    counts = {"fixed": 0.0, "answers": float(size.tokens_out), "steps": 0.0, "parts": size.replies}
    return {**counts, "tokens": size.tokens_in + size.tokens_out, "longest": 0.0}


def _common(rows: Iterable[list[int]]) -> int:
    """How many ids all rows begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
