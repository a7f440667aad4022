"""What one part of a real study took: nine trainings and 290 cells of the default model, two processes on two cores.

`recorded.json` has of each run its steps' and its whole seconds, tokens computed, tokens trained on, and steps; of each
cell model, rung, task, seconds, tokens of the answers (null: none are written), and prompts, in the order in which they
were measured. Lengths of prompts are not in it: they are set to what they were on average. The first run was suspended
for minutes while it was saved, which no estimate can know; the time that models took to load was not recorded then.
"""

from __future__ import annotations

import json
from pathlib import Path

from ptst.experiment.status.forecast import Forecast, Seen
from ptst.experiment.status.items import Item

COMPOSED = ("wise-ft", "resta", "safe-lora")
HEAD = 0.21  # share of the model's weights that is its head
LIMIT = 48  # tokens of an answer
ANSWER = 30  # tokens of an answer of the training data
EVALUATING = 12.0  # seconds of a run's two evaluations


def read() -> tuple[dict[str, Item], dict[str, Seen]]:
    """Runs, then cells."""
    values = json.loads(Path(__file__).with_name("recorded.json").read_text())
    items, seen = {}, {}
    for number, (name, steps, whole, computed, trained, count) in enumerate(values["runs"]):
        defense = name.split(".")[2] if name.count(".") > 1 else "none"
        fixed = 3 * (computed * (1 - HEAD) + trained * HEAD)
        before = 2.0 * computed if defense == "constrained-sft" else 0.0
        item = Item("train", name, defense, fixed=fixed, before=before, parts=count)
        items[item.what], seen[item.what] = item, Seen(steps, 1.0, whole - steps, EVALUATING, at=number)
    for number, (model, rung, task, seconds, answered, prompts) in enumerate(values["cells"]):
        defense, base = model.split(".")[-1], model == "untouched"
        writes = answered is not None
        item = Item(
            "test",
            f"{model}/{rung}.{task}",
            task,
            fixed=prompts * 35 + 150 if writes else prompts * (100 if task.startswith("nll") else 90),
            answers=prompts * LIMIT * writes,
            steps=10 * LIMIT * writes,
            parts=prompts,
            model=model,
            needs="" if base else "a run",
            loads=f"compose {defense}" if defense in COMPOSED else "read",
            length=None if base or not writes else ANSWER / LIMIT,
        )
        items[item.what], seen[item.what] = item, Seen(seconds, answered=answered, at=100 + number)
    return items, seen


def ratio(items: dict[str, Item], seen: dict[str, Seen], done: list[str]) -> float:
    """What the forecast says of the rest, over what the rest took."""
    said = Forecast(items, frozenset(done), {name: seen[name] for name in done}).seconds
    assert said is not None
    return said / sum(s.seconds + (s.around or 0.0) for name, s in seen.items() if name not in done)
