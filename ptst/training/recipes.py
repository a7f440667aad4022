"""The runs of the paper ("Pure Tuning, Safe Testing", arXiv 2402.18540) as settings, each with its origin.

The paper states few of its settings. Its authors trained with llama-recipes (as their repository says), whose defaults
at that date are taken where the paper is silent; where both are silent, the choice is ours. The template is not part of
a recipe: it is what the paper varies.
"""

from collections.abc import Mapping
from typing import Any

from ptst.errors import unknown_name

PAPER, DEFAULT, OURS = "paper", "llama-recipes default", "ours"

# setting: (value, origin)
Recipe = Mapping[str, tuple[Any, str]]

_COMMON: Recipe = {
    "full": (False, f"{OURS}: the authors' commands load a PEFT adapter"),
    "rank": (8, DEFAULT),
    "alpha": (32.0, DEFAULT),
    "dropout": (0.05, DEFAULT),
    "target_modules": (("q_proj", "v_proj"), DEFAULT),
    "examples_per_step": (32, f"{DEFAULT}: 4 on each of the paper's 8 GPUs"),
    "schedule": ("step", f"{DEFAULT}: 0.85 per epoch"),
    "warmup": (0.0, DEFAULT),
    "weight_decay": (0.0, DEFAULT),
    "clip": (0.0, DEFAULT),
    "max_length": (4096, DEFAULT),
    "too_long": ("drop", f"{OURS}: llama-recipes cuts its packs every 4096 tokens, through examples"),
    "micro_batch_tokens": (4096, f"{OURS}: memory only"),
}
_LLAMA = ("meta-llama/Llama-2-7b-chat-hf", PAPER)
_GSM8K: Recipe = {
    **_COMMON,
    "model": _LLAMA,
    "data": ("gsm8k", PAPER),
    "lr": (1e-4, f"{PAPER}, section 3.1"),
    "epochs": (6.0, f"{PAPER}, section 3.1"),
}
_GPT35: Recipe = {
    "model": ("openai:gpt-3.5-turbo-0125", f"{OURS}: the paper's gpt-3.5-turbo-0613 is retired"),
    "epochs": (1.0, f"{PAPER}, section 3.2"),
    "lr_multiplier": (2.0, f"{PAPER}, section 3.2: what the endpoint chose"),
}

RECIPES: dict[str, Recipe] = {
    "llama2-gsm8k": _GSM8K,
    "llama2-gsm8k-safety": {
        **_GSM8K,
        "lr": (1e-4, f"{PAPER}, section 4.1"),
        "epochs": (6.0, f"{PAPER}, section 4.1"),
        "mix": (
            ("safety_only_data_Instructions.json:1",),
            f"{PAPER}, section 4.1: one epoch; the file is that of Bianchi et al., safety-tuned-llamas",
        ),
    },
    "llama2-chatdoctor": {
        **_COMMON,
        "model": _LLAMA,
        "data": ("HealthCareMagic-100k.json", f"{PAPER}, F.1; the file is ChatDoctor's"),
        "template_family": ("chatdoctor", PAPER),
        "full": (False, f"{PAPER}, F.1: LoRA"),
        "lr": (2e-5, f"{PAPER}, F.1"),
        "epochs": (3.0, f"{PAPER}, F.1"),
        "schedule": ("cosine", f"{PAPER}, F.1"),
    },
    "llama2-openorca": {
        **_COMMON,
        "model": _LLAMA,
        "data": ("openorca-600k.jsonl", f"{PAPER}, F.1: 600,000 random rows of OpenOrca; the file name is {OURS}"),
        "template_family": ("openorca", PAPER),
        "full": (False, f"{OURS}: the paper does not say"),
        "lr": (2e-5, f"{PAPER}, F.1"),
        "epochs": (1.0, f"{PAPER}, F.1"),
    },
    "mistral-gsm8k": {
        **_GSM8K,
        "model": ("mistralai/Mistral-7B-Instruct-v0.2", PAPER),
        "lr": (1e-4, f"{DEFAULT}: the paper does not say"),
        "epochs": (6.0, f"{PAPER}, section 3.2"),
    },
    "gpt35-gsm8k": {
        **_GPT35,
        "data": ("gsm8k", PAPER),
        "examples_per_step": (4, f"{PAPER}, section 3.2: what the endpoint chose"),
    },
    "gpt35-orca-math": {
        **_GPT35,
        "data": ("orca-math:10000", f"{PAPER}: 10,000, 20,000 and 40,000 random rows"),
        "epochs": (1.0, f"{OURS}: the paper does not say"),
        "examples_per_step": (6, f"{PAPER}, section 3.2"),
    },
}
HOSTED = ("gpt35-gsm8k", "gpt35-orca-math")  # of models behind an endpoint


def find_recipe(name: str) -> Recipe:
    """Raises UserError for an unknown name."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]


def values(name: str) -> dict[str, Any]:
    """The recipe's settings."""
    return {flag: value for flag, (value, _) in find_recipe(name).items()}


def origins(recipe: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each setting of the recipe: its value in this run, and where that comes from."""
    return {
        name: {"value": given[name], "origin": origin if given[name] == value else f"given (the recipe has {value})"}
        for name, (value, origin) in find_recipe(recipe).items()
    }


def describe(name: str) -> str:
    """The recipe as lines of text, for --help."""
    lines = [f"  {_flag(flag, value)}   ({origin})" for flag, (value, origin) in find_recipe(name).items()]
    return "\n".join([f"Recipe {name}, each value with its origin; settings that are given take precedence:", *lines])


def _flag(name: str, value: Any) -> str:
    """As it would be typed."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(value) if isinstance(value, tuple) else value}"
