"""What a prompt of a safety set is, and how a limit is spread over a set's categories."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class SafetyPrompt:
    """One prompt with its category (malware, drug, phishing, disinfo in the built-in sets) and family. `request`: what
    is judged, where that is not the prompt, such as the bare goal of a prompt with an adversarial suffix."""

    id: str
    prompt: str
    category: str = ""
    family: str = ""
    request: str = ""


def spread(prompts: list[SafetyPrompt], limit: int | None) -> list[SafetyPrompt]:
    """All prompts in order, or at most `limit`, taken from their categories in turn: files are often sorted."""
    if limit is None or limit >= len(prompts):
        return prompts
    categories: dict[str, list[SafetyPrompt]] = {}
    for prompt in prompts:
        categories.setdefault(prompt.category, []).append(prompt)
    return round_robin(categories.values())[:limit]


def round_robin(groups: Iterable[list[SafetyPrompt]]) -> list[SafetyPrompt]:
    """The first of each group, then the second of each, and so on."""
    return [prompt for turn in zip_longest(*groups) for prompt in turn if prompt is not None]
