"""A machine on a simulated clock, which computes a grid token by token, and the amounts that a plan has of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from ptst.experiment.status.forecast import Forecast, Seen
from ptst.experiment.status.items import Item


@dataclass(frozen=True)
class Machine:
    """Seconds: of a token in a forward pass, of a decoding step besides, of loading a model, of composing one."""

    token: float
    step: float
    load: float
    compose: float
    batch: int = 64


CPU = Machine(token=4e-3, step=35e-3, load=2.0, compose=20.0)
GPU = Machine(token=2e-5, step=4e-3, load=15.0, compose=40.0, batch=256)


@dataclass(frozen=True)
class Task:
    """`prompts` of about `read` tokens; answers have `limit` tokens at most (0: prompts are scored), by the base model
    about `base` of them, by a tuned one `tuned`."""

    prompts: int
    read: int
    limit: int = 0
    base: float = 0.0
    tuned: float = 0.0


TASKS = {
    "safety": Task(40, 45, 48, base=36, tuned=32),
    "over-refusal": Task(200, 40, 48, base=44, tuned=40),
    "gsm8k": Task(100, 80, 300, base=170, tuned=90),
    "nll": Task(30, 110),
}
DEFENSES = {"none": 1.0, "mix-safety": 1.2, "constrained-sft": 1.0}  # tokens of a run
COMPOSED = ("wise-ft", "safe-lora")
ANSWER = 90  # tokens of an answer of the training data


@dataclass
class World:
    """A grid on a machine: what there is to do, and how long each item takes there, in the order of a worker."""

    machine: Machine
    full: bool = True
    rows: int = 500
    tasks: dict[str, Task] = field(default_factory=lambda: dict(TASKS))
    seed: int = 0
    items: dict[str, Item] = field(default_factory=dict)
    took: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        found, clock = [], 0.0
        for template, prompt in (("vanilla", 70), ("llama", 170)):
            for defense, more in DEFENSES.items():
                found.append(self._train(f"{template}.{defense}", defense, round(self.rows * more), prompt))
        models = [("untouched", "", "read")]
        for template in ("vanilla", "llama"):
            models += [(f"{template}.{d}", f"{template}.{d}", "read" if self.full else "") for d in DEFENSES]
            models += [(f"{template}.{d}", f"{template}.none", f"compose {d}") for d in COMPOSED]
        for model, needs, loads in models:
            first = True
            for test, system in (("vanilla", 0), ("llama", 130)):
                for name, task in self.tasks.items():
                    found.append(self._test(model, needs, loads, f"{test}.{name}", name, task, system, first))
                    first = False
        for item, seen in found:
            clock += seen.seconds + (seen.around or 0.0)
            self.items[item.what] = item
            self.took[item.what] = replace(seen, at=clock)

    def noise(self) -> float:
        return self.random.uniform(0.93, 1.07)

    def _train(self, name: str, defense: str, rows: int, prompt: int) -> tuple[Item, Seen]:
        tokens = rows * (prompt + ANSWER)
        shared = prompt > 100  # a system prompt, which the documents of a micro-batch share
        computed = rows * (prompt - 110 * shared + ANSWER)
        times = 3 if self.full else 2
        before = tokens if defense == "constrained-sft" else 0
        seconds = times * computed * self.machine.token * self.noise()
        around = 2 * self.machine.load + before * self.machine.token * self.noise()
        item = Item("train", name, defense, fixed=times * computed, before=before, parts=rows // 8, tokens=tokens)
        return item, Seen(seconds, around=around)

    def _test(self, model, needs, loads, cell, name, task, system, first) -> tuple[Item, Seen]:
        m = self.machine
        fixed = task.prompts * task.read + system * (1 if task.limit else task.prompts)
        mean = task.tuned if needs else task.base
        lengths = [min(task.limit, max(1, round(self.random.gauss(mean, mean / 3)))) for _ in range(task.prompts)]
        seconds, waiting, active = fixed * m.token, list(lengths), []
        while task.limit and (waiting or active):
            active += [waiting.pop() for _ in range(min(len(waiting), m.batch - len(active)))]
            seconds += m.step + len(active) * m.token
            active = [n - 1 for n in active if n > 1]
        loading = {"": 0.0, "read": m.load}.get(loads, m.compose)
        answered = sum(lengths) if task.limit else None
        rounds = -(-task.prompts // m.batch)
        item = Item(
            "test",
            f"{model}/{cell}",
            name,
            fixed=fixed,
            answers=task.prompts * task.limit,
            steps=(10.0 if m is CPU else 200.0) * rounds * task.limit,
            parts=task.prompts,
            tokens=fixed + task.prompts * task.limit,
            model=model,
            needs=needs,
            loads=loads,
            length=min(1.0, ANSWER / task.limit) if needs and task.limit else None,
        )
        return item, Seen(seconds * self.noise(), around=loading if first and loads else None, answered=answered)

    def after(self, *done: str) -> tuple[float, float]:
        """What the forecast says of the rest once these are done, and what the rest takes."""
        seen = {name: self.took[name] for name in done}
        said = Forecast(self.items, frozenset(done), seen).seconds
        rest = sum(s.seconds + (s.around or 0.0) for name, s in self.took.items() if name not in done)
        assert said is not None
        return said, rest

    def first(self, kind: str) -> str:
        return next(name for name, item in self.items.items() if item.kind == kind)
