"""The experiment at the size of a laptop: align the default model, fine-tune it, see what is left (docs/laptop.md).

Of the settings tried, the one with the most on-topic answers to harmful requests where training and test are both
bare. `laptop-search` is for trying others: its requests (the alignment's stopping families) and seeds are none of those
that `laptop` reports.
"""

from importlib import resources
from typing import Any

from ptst.data.builtin.alignment_set import STOP_FAMILIES, TEST_FAMILIES
from ptst.evaluation.config import EvalSettings
from ptst.training.config import TrainSettings

RECIPES = ("laptop", "laptop-full", "laptop-search")
PROMPTS = 100  # of the 200 there are (--eval.limit 200): three seeds are done in less than two hours
SEEDS, SEARCH_SEEDS = (0, 1, 2), (100, 101)
_CHAT = ("chat:vanilla", "chat:alpaca", "chat:llama")


def values(name: str, quick: bool = False) -> dict[str, Any]:
    """GridConfig's fields by a recipe. `quick`: one seed, with and without the safety prompt, refusals only."""
    templates: tuple[str, ...] = ("chat:vanilla", "chat:llama") if quick else _CHAT
    if name == "laptop-full":
        templates = ("text:vanilla", "text:alpaca", *_CHAT, default_system_file())
    tasks = ("safety", "over-refusal") if quick else ("safety", "over-refusal", "margin", "nll:word-problems:50")
    return {
        "train_templates": templates,
        "test_templates": templates,
        "tasks": tasks,
        "seeds": (SEARCH_SEEDS if name == "laptop-search" else SEEDS)[: 1 if quick else None],
        "data": "word-problems:240",
        "train": TrainSettings(full=True, lr=1e-4),
        "eval": EvalSettings(limit=PROMPTS, batch_size=200),
    }


def families(name: str | None) -> tuple[str, ...] | None:
    """The families of requests that a recipe tests on; all of them (None) without one."""
    if name is None:
        return None
    return STOP_FAMILIES if name == "laptop-search" else TEST_FAMILIES


def default_system_file() -> str:
    """chat:vanilla with the model's default system prompt, as a template file."""
    return str(resources.files("ptst.experiment").joinpath("vanilla_default.toml"))
