"""What a grid would take, before anything is computed: tokens by the tokenizer, time by what is finished already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptst.data.mix import mix, parse_mix
from ptst.data.prepare import length_limit
from ptst.evaluation.answers import Answerer
from ptst.evaluation.margin import COMPLYING, REFUSING
from ptst.experiment.measure import MARGIN_PROMPTS
from ptst.experiment.plan import Cell, Row
from ptst.experiment.run import Grid
from ptst.model.config import DecoderConfig, read_json
from ptst.text.encode import Prompting
from ptst.text.own_template import with_default_system
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family

UNKNOWN = "unknown"


def estimate(grid: Grid, with_model: bool) -> list[dict[str, Any]]:
    """For every training run and cell its name, whether it is finished, tokens (trained on, or read and at most
    written) and seconds; UNKNOWN without a model, and seconds until something of the kind is finished."""
    runs = list({row.run: row for row in grid.rows if row.template is not None}.values())
    trained: dict[str, Any] = {}
    tested: dict[tuple[str, str], int] = {}
    if with_model:
        trained = {name: _trained_tokens(grid, name) for name in grid.train_templates}
        tested = {(c.test, c.task): 0 for c in grid.cells}
        tested = {key: _tested_tokens(grid, *key) for key in tested}
    rate_trained = _rate([_spent(grid, row, trained) for row in runs])
    rates = {task: _rate([_measured(grid, c, tested) for c in grid.cells if c.task == task]) for _, task in tested}
    lines = []
    for row in runs:
        tokens = trained.get(row.template or "", UNKNOWN)
        lines.append(_line(f"train {row.run}", grid.trained(row), tokens, rate_trained))
    for cell in grid.cells:
        tokens = tested.get((cell.test, cell.task), UNKNOWN)
        lines.append(_line(f"test {cell.name}", grid.measured(cell), tokens, rates.get(cell.task)))
    return lines


def _line(what: str, finished: bool, tokens: Any, rate: float | None) -> dict[str, Any]:
    seconds: Any = UNKNOWN if rate is None or tokens == UNKNOWN else rate * tokens
    return {"what": what, "finished": finished, "tokens": tokens, "seconds": 0.0 if finished else seconds}


def _trained_tokens(grid: Grid, name: str) -> int:
    c = grid.config.train
    template, _ = grid.train_templates[name]
    source = grid.sources["data"]
    subject = next(iter(grid.subjects.values()))
    family = find_family(c.template_family or source.family)
    prompting = Prompting(
        with_default_system(template, grid.base), family, subject.prompting.chat_format, subject.prompting.tokenizer
    )
    longest = length_limit(c.max_length, DecoderConfig.from_folder(grid.base).max_positions, c.micro_tokens)
    others = [(grid.sources[text], parse_mix(text)[1]) for text in grid.config.mix]
    mixture = mix([(source, c.epochs), *others], prompting, longest, c.too_long, c.train_on)
    return round(sum(part["tokens"] * part["epochs"] for part in mixture.counts))


def _tested_tokens(grid: Grid, test: str, task: str) -> int:
    subject, (what, _) = grid.subjects[test], grid.tests.tasks[task]
    nobody = Answerer(None, subject.prompting, subject.stop_ids, 1)  # type: ignore[arg-type]
    if task == "margin":
        asked = [Conversation((Message("user", p.prompt),)) for p in grid.tests.tasks[task][1].items[:MARGIN_PROMPTS]]
        openings = len(REFUSING) + len(COMPLYING)
        return sum(len(subject.prompting.encode(c).ids) + 3 * openings for c in asked)  # an opening has some 3 tokens
    asked = grid.tests.conversations(task, nobody)
    if not what.sampled:
        return sum(len(subject.prompting.encode(c).ids) for c in asked)
    prompts = sum(len(subject.prompting.encode(c.prompt()).ids) for c in asked)
    return prompts + len(asked) * grid.tests.sampling(task).max_new_tokens


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
    """Seconds per token over all that is finished."""
    pairs = [k for k in known if k is not None]
    tokens = sum(n for _, n in pairs)
    return sum(s for s, _ in pairs) / tokens if tokens else None
