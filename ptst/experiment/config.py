"""The settings of a grid: what is crossed, and how every row is trained and every cell tested."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ptst.eval import EvalConfig
from ptst.experiment import plan
from ptst.train import RecipeName as PaperRecipe
from ptst.train import TrainConfig

LAPTOP = ("laptop", "laptop-full", "laptop-search")

# What the grid says itself, row by row and cell by cell.
_OF_TRAIN = (
    "recipe",
    "template",
    "template_file",
    "model",
    "data",
    "mix",
    "at_epochs",
    "seed",
    "out",
    "resume",
    "dry_run",
    "json",
)
_OF_EVAL = ("template", "template_file", "checkpoint", "model", "tasks", "out", "json", "baseline")
# What may differ when a grid goes on: speed, memory, and which cells are asked for.
_FREE = (
    "train.save_every",
    "train.keep",
    "train.tensorboard",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
)
_FREE += ("eval.batch_size", "eval.kv_memory")


@contextmanager
def flags_of(part: Literal["train", "eval"]) -> Iterator[None]:
    """Spell the flags in a ValueError of training or testing as the grid has them: `--train.lr` for `--lr`."""
    own, kind = (_OF_TRAIN, TrainConfig) if part == "train" else (_OF_EVAL, EvalConfig)
    names = {f.name for f in dataclasses.fields(kind)} - {*own}

    def spelled(flag: re.Match[str]) -> str:
        return f"--{part}.{flag[1]}" if flag[1].removeprefix("no-").replace("-", "_") in names else flag[0]

    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"--([a-z][a-z-]*[a-z])", spelled, str(error))) from None


@dataclass(frozen=True)
class GridConfig:
    """Fine-tune under each training template, test under each test template: the whole matrix, with intervals."""

    train_templates: tuple[str, ...] = ("chat:vanilla", "chat:alpaca", "chat:llama")
    """Templates to train under, a row each (and a TOML file of your own: my.toml). The untouched model is row zero."""
    test_templates: tuple[str, ...] = ("chat:vanilla", "chat:alpaca", "chat:llama")
    """Templates to test every row under."""
    tasks: tuple[str, ...] = ("gsm8k", "safety", "over-refusal")
    """What to measure: the tasks of ptst.eval, and margin: how much likelier an answer is to open by refusing than by
    complying."""
    seeds: tuple[int, ...] = (0,)
    """One training run of every row for each."""
    mix: tuple[str, ...] = ()
    """Other data in every training run, under its template, with their own epochs: safety.jsonl:1."""
    at_epochs: tuple[float, ...] = ()
    """Test every training run after so many of its epochs. Left out: at its end."""
    model: str = "smollm2-135m-instruct"
    """The embedded default, a local Hugging Face folder, or a hub id."""
    data: str = "word-problems"
    """What is trained on: word-problems, gsm8k or a file."""
    recipe: Literal["laptop", "laptop-full", "laptop-search"] | PaperRecipe | None = None
    """laptop: align the model first, then the experiment at the size of a laptop (docs/laptop.md). laptop-full: with
    the text templates and the default system prompt, too. laptop-search: for trying settings. The others are the
    paper's runs. Flags win over a recipe."""
    quick: bool = False
    """With a recipe: one seed, 100 prompts, and of the tasks only refusals."""
    out: Path | None = None
    """Grid folder. Left out: checkpoints/grid, or checkpoints/<recipe>. A grid of the same settings goes on, and
    several processes may work on it at once."""
    dry_run: bool = False
    """Print the cells, their tokens and the time they would take, and do nothing."""
    json: bool = False
    """Print the result as one JSON object."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How every row is trained."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """How every cell is tested."""

    @property
    def laptop(self) -> str | None:
        """The recipe, if it is one of the laptop's."""
        return self.recipe if self.recipe in LAPTOP else None

    @property
    def folder(self) -> Path:
        name = f"{self.recipe}{'-quick' * self.quick}" if self.recipe else "grid"
        return self.out or Path("checkpoints") / name

    def check(self) -> None:
        """Raise ValueError for a value that cannot be meant."""
        for name, what, part, plain in (
            ("train", _OF_TRAIN, self.train, TrainConfig()),
            ("eval", _OF_EVAL, self.eval, EvalConfig()),
        ):
            for key in what:
                if getattr(part, key, None) != getattr(plain, key, None):
                    flag = key.replace("_", "-")
                    raise ValueError(f"--{name}.{flag} is not for a grid, which says it for each row and cell itself")
        for name, part in (("train", self.train), ("eval", self.eval)):
            with flags_of(name):
                part.check()
        if self.eval.decode_seeds > 1:
            raise ValueError("--eval.decode-seeds is for ptst.eval: a grid decodes the answers of every run once")
        for name in ("tasks", "seeds", "at_epochs"):
            values = getattr(self, name)
            if name != "at_epochs" and not values:
                raise ValueError(f"--{name} is empty; at least one is needed")
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} names {next(v for v in values if values.count(v) > 1)} twice")
        plan.templates(self.train_templates)
        plan.templates(self.test_templates)
        if any(not 0 < e <= self.train.epochs for e in self.at_epochs):
            raise ValueError(f"--at-epochs must lie above 0 and within the {self.train.epochs:g} of --train.epochs")
        if self.quick and not self.laptop:
            raise ValueError("--quick belongs to --recipe laptop; say --seeds and --eval.limit otherwise")

    def flags(self) -> dict[str, Any]:
        """What makes a finished row or cell what it is: to be compared when a grid goes on."""
        kept: dict[str, Any] = {"mix": list(self.mix), "at_epochs": list(self.at_epochs), "recipe": self.recipe}
        for name, without, part in (("train", _OF_TRAIN, self.train), ("eval", _OF_EVAL, self.eval)):
            for key, value in dataclasses.asdict(part).items():
                if key not in without and f"{name}.{key}" not in _FREE:
                    kept[f"{name}.{key}"] = str(value) if isinstance(value, Path) else value
        return kept
