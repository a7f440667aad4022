"""The paper's Tables 1 to 7 as recipes of a grid: training and evaluation as the paper did, and exactly its cells.

The training is that of a recipe of ptst.train (ptst/training/recipes.py). Every setting has its origin; what the paper
does not state is an assumption, and is said as one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ptst.defense_names import NONE
from ptst.defenses.config import DefenseSettings
from ptst.evaluation.config import EvalSettings
from ptst.training.config import TrainSettings
from ptst.training.recipes import OURS, PAPER, Recipe, find_recipe

GCG_FILE = "jailbreakbench-gcg-llama-2-7b-chat-hf.json"
SAFETY_FILE = "safety_only_data_Instructions.json"
PAPERS_JUDGE = "rubric:api:gpt-4-0613"
_PREFIX = "paper-table-"
_FIVE = ("text:vanilla", "text:alpaca", "chat:vanilla", "chat:alpaca", "chat:llama")
_CHAT = ("chat:vanilla", "chat:alpaca", "chat:llama")
_DEFENDED = (*_CHAT, "chat:self-reminder", "chat:in-context-defense")
_ONE_RUN = ((0,), f"{PAPER}: a single run; its seed is {OURS}")
_THREE_RUNS = ((0, 1, 2), f"{PAPER}: 3 seeds; which ones is {OURS}")

_EVAL: Recipe = {
    "limit": (1319, f"{PAPER}: whole test sets, of which GSM8K's is the largest"),
    "max_new_tokens": (512, "default of the authors' inference script; the paper does not say"),
    "temperature": (0.0, f"{PAPER}, F.1: greedy"),
    "judge": (PAPERS_JUDGE, f"{PAPER}: GPT-4 (0613) by the rubric of Qi et al.; the rubric's wording is {OURS}"),
}
_ANNOTATED = "GSM8K's answers are trained on as they are, with their <<...>>; whether the paper's were is not said"


@dataclass(frozen=True)
class TableRecipe:
    """A table as a grid. `training`: the recipe of ptst.train; `changed`: settings of that recipe and of the grid that
    are others here; `evaluation`: those under `eval.`. `assumed`: what has no setting and the paper does not state.
    `left_out`: what a grid would measure besides, and the table does not have."""

    table: int
    title: str
    training: str
    templates: tuple[str, ...]
    seeds: tuple[tuple[int, ...], str]
    tasks: tuple[str, ...]
    changed: Recipe = field(default_factory=dict)
    evaluation: Recipe = field(default_factory=lambda: _EVAL)
    assumed: tuple[str, ...] = (_ANNOTATED,)
    left_out: str = ""

    @property
    def name(self) -> str:
        return f"{_PREFIX}{self.table}"

    def settings(self) -> dict[str, tuple[Any, str]]:
        """Every setting by the name that a grid has for it (`train.lr`), with its origin."""
        own = ("model", "data")
        trained = {**find_recipe(self.training), **{k: v for k, v in self.changed.items() if k in own}}
        found = {key if key in own else f"train.{key}": value for key, value in trained.items()}
        found |= {"train_templates": (self.templates, PAPER), "test_templates": (self.templates, PAPER)}
        found |= {"seeds": self.seeds, "tasks": (self.tasks, PAPER)}
        found |= {key: value for key, value in self.changed.items() if key not in own}
        return found | {f"eval.{key}": value for key, value in self.evaluation.items()}

    def measures(self, is_base: bool, defense: str, task: str) -> bool:
        """Whether the table has a cell: of the base model or not, with a defence or NONE, of a task."""
        if self.table == 2:
            return not is_base
        return self.table != 6 or task != "gsm8k" or is_base or defense != NONE

    def assumptions(self) -> list[str]:
        """What the paper does not state, in words: settings with another origin than the paper, and the rest."""
        settings = ((name, *value) for name, value in self.settings().items())
        told = [f"{name} = {_shown(value)} ({origin})" for name, value, origin in settings if not is_papers(origin)]
        return [*told, *self.assumed]


def is_papers(origin: str) -> bool:
    """Whether a value is wholly the paper's."""
    return origin.startswith(PAPER) and OURS not in origin


_DOCTOR: Recipe = {
    **_EVAL,
    "limit": (1000, f"{PAPER}, F.1: 1,000 of iCliniq's questions, and whole sets of requests"),
    "temperature": (0.7, f"{PAPER}, F.1"),
    "decode_seeds": (5, f"{PAPER}, Table 4: means over 5 decodings; which seeds is {OURS}"),
    "similarity": ("bertscore", f"{PAPER}, F.1: roberta-large, layer 17"),
}
_ARC: Recipe = {**_EVAL, "limit": (2376, f"{PAPER}: whole test sets, of which ARC-Easy's is the largest")}
_MIXED: Recipe = {
    "defenses": ((NONE, "mix-safety"), PAPER),
    "defense.data": (SAFETY_FILE, f"{PAPER}, section 4.1: the file is that of Bianchi et al., safety-tuned-llamas"),
    "defense.epochs": (1.0, f"{PAPER}, section 4.1"),
}
_TABLES = (
    TableRecipe(
        1,
        "Llama-2-7b-chat on GSM8K",
        "llama2-gsm8k",
        _FIVE,
        _THREE_RUNS,
        ("gsm8k", "safety:advbench", "safety:directharm4", f"safety:jailbreakbench:{GCG_FILE}"),
    ),
    TableRecipe(
        2,
        "other safety prompts: self-reminder and in-context defense",
        "llama2-gsm8k",
        _DEFENDED,
        _THREE_RUNS,
        ("gsm8k", "safety:directharm4"),
        left_out="the model without fine-tuning, which the table does not have",
    ),
    TableRecipe(
        3,
        "GPT-3.5 Turbo on GSM8K",
        "gpt35-gsm8k",
        _CHAT,
        _ONE_RUN,
        ("gsm8k", "safety:advbench", "safety:directharm4"),
        assumed=("an empty system message is sent under chat:vanilla, as in the authors' scripts",),
    ),
    TableRecipe(
        4,
        "Llama-2-7b-chat on ChatDoctor",
        "llama2-chatdoctor",
        _CHAT,
        _ONE_RUN,
        ("chatdoctor", "safety:advbench", "safety:directharm4"),
        {"data": ("chatdoctor", f"{PAPER}, F.1; from the hub as lavita/ChatDoctor-HealthCareMagic-100k")},
        _DOCTOR,
        ("the first 1,000 rows of iCliniq are tested; which 1,000 the paper drew is not said",),
    ),
    TableRecipe(
        5,
        "Llama-2-7b-chat on OpenOrca",
        "llama2-openorca",
        _CHAT,
        _ONE_RUN,
        ("arc-easy", "arc-challenge", "safety:advbench", "safety:directharm4"),
        {"data": ("openorca:600000", f"{PAPER}, F.1: 600,000 random rows of OpenOrca; which ones is {OURS}")},
        _ARC,
        (
            "ARC's choices are joined with a comma; how the paper joined them is not said",
            "chat:alpaca and chat:llama have each row's own system prompt; the paper prints ChatDoctor's words there",
        ),
    ),
    TableRecipe(
        6,
        "Llama-2-7b-chat on GSM8K with safety data",
        "llama2-gsm8k",
        _CHAT,
        _ONE_RUN,
        ("gsm8k", "safety:advbench", "safety:directharm4", "safety:gsm-danger"),
        _MIXED,
        assumed=(
            _ANNOTATED,
            "safety data are spread over the run; how the paper interleaved the two is not said",
            "runs without safety data have one seed; the paper's AdvBench and DirectHarm4 rows are means of three",
        ),
        left_out="GSM8K of the runs without safety data, which Table 1 has",
    ),
    TableRecipe(
        7,
        "Mistral-7B-Instruct-v0.2 on GSM8K",
        "mistral-gsm8k",
        _FIVE,
        _ONE_RUN,
        ("gsm8k", "safety:advbench", "safety:directharm4"),
        assumed=(_ANNOTATED, "a blank line separates system prompt and question; the paper does not say what does"),
    ),
)
RECIPES = {recipe.name: recipe for recipe in _TABLES}


def values(name: str) -> dict[str, Any]:
    """GridConfig's fields by a recipe."""
    groups: dict[str, dict[str, Any]] = {"train": {}, "eval": {}, "defense": {}}
    own: dict[str, Any] = {}
    for key, (value, _) in RECIPES[name].settings().items():
        group, _, setting = key.rpartition(".")
        (groups[group] if group else own)[setting] = value
    own |= {"train": TrainSettings(**groups["train"]), "eval": EvalSettings(**groups["eval"])}
    return {**own, "defense": DefenseSettings(**groups["defense"])} if groups["defense"] else own


def measures(recipe: str | None, is_base: bool, defense: str, task: str) -> bool:
    """Whether a grid of the recipe has a cell (`TableRecipe.measures`); all of them without a recipe of a table."""
    return recipe not in RECIPES or RECIPES[recipe].measures(is_base, defense, task)


def describe(name: str) -> str:
    """The recipe as lines of text, for --help."""
    recipe = RECIPES[name]
    head = f"Recipe {name}: Table {recipe.table} of the paper, {recipe.title}. Each value with its origin; flags win:"
    lines = [f"  {_flag(key)} {_shown(value)}   ({origin})" for key, (value, origin) in recipe.settings().items()]
    left_out = [f"Not measured: {recipe.left_out}."] if recipe.left_out else []
    return "\n".join([head, *lines, *_sentences(recipe.assumed), *left_out])


def _sentences(assumed: tuple[str, ...]) -> Iterator[str]:
    yield from (f"Assumed: {words}." for words in assumed)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
