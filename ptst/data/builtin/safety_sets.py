"""The built-in safety sets: harmful requests that an aligned model refuses (`harmful_requests.jsonl`), and benign
look-alikes (`look_alikes.jsonl`), which share their words and topics and should be answered: refusing those is
over-refusal. Both have the same families (one topic each), so that whole families can be held out. Neither has answers.
"""

from __future__ import annotations

from pathlib import Path

from ptst.data.files import check_limit, read_jsonl
from ptst.data.safety_prompt import SafetyPrompt, round_robin


def harmful_requests(limit: int | None = None) -> list[SafetyPrompt]:
    """The built-in harmful requests, interleaved: any first N are spread evenly over categories and their families.

    Raises UserError for a limit below 1.
    """
    return _interleaved("harmful_requests.jsonl", limit)


def look_alikes(limit: int | None = None) -> list[SafetyPrompt]:
    """The built-in benign look-alikes, interleaved like the harmful requests. Raises UserError for a limit below 1."""
    return _interleaved("look_alikes.jsonl", limit)


def _interleaved(name: str, limit: int | None) -> list[SafetyPrompt]:
    check_limit(limit, "prompt")
    categories: dict[str, dict[str, list[SafetyPrompt]]] = {}
    for _, row in read_jsonl(Path(__file__).with_name(name)):
        prompt = SafetyPrompt(**row)
        categories.setdefault(prompt.category, {}).setdefault(prompt.family, []).append(prompt)
    return round_robin(round_robin(families.values()) for families in categories.values())[:limit]
