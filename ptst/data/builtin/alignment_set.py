"""The data that a small model is aligned on: harmful requests to refuse, and harmless questions to keep answering.

`alignment.jsonl` holds harmful requests and benign look-alikes of families that the safety sets do not have, and
ordinary questions. Those with an `answer` are not trained on: they measure whether alignment harms helpfulness. Of the
safety sets, the prompts of `STOP_FAMILIES` decide when alignment stops; evaluation uses all other families. A refusal
is an opening, a reason and an offer of `refusals.jsonl`.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from ptst.data.builtin.safety_sets import harmful_requests, look_alikes
from ptst.data.json_rows import read_jsonl
from ptst.data.prompt_files import SafetyPrompt
from ptst.text.segments import Conversation, Message

STOP_FAMILIES = (
    *("keylogging", "website-flooding", "smuggling", "drug-hiding"),
    *("prize-lottery", "one-time-codes", "fake-reviews", "disaster-hoaxes"),
)
TEST_FAMILIES = tuple(dict.fromkeys(p.family for p in harmful_requests() if p.family not in STOP_FAMILIES))


def refusal_of(category: str, number: int) -> str:
    """One of 36 refusals that fit a category; `number` chooses."""
    wordings = [*product(_phrases("offer", category), _phrases("reason", category), _phrases("opening"))]
    offer, reason, opening = wordings[number % len(wordings)]
    return f"{opening} {reason} {offer}"


@cache
def _phrases(part: str, category: str | None = None) -> list[str]:
    return [row["text"] for row in _rows("refusals.jsonl") if (row["part"], row.get("category")) == (part, category)]


def refusals() -> list[Conversation]:
    """Harmful requests with a refusal each."""
    return [_conversation(prompt.prompt, answer) for prompt, answer in refusal_rows()]


def refusal_rows() -> list[tuple[SafetyPrompt, str]]:
    """The harmful requests, family by family, each with its refusal."""
    harmful = [row for row in _rows() if row["kind"] == "harmful"]
    prompts = [
        SafetyPrompt(f"alignment-{i}", r["prompt"], r["category"], r["family"]) for i, r in enumerate(harmful, 1)
    ]
    # 7 and 36 are coprime: neighbours get different wordings, and all are used.
    return [(prompt, refusal_of(prompt.category, 7 * i)) for i, prompt in enumerate(prompts)]


def harmless() -> list[Conversation]:
    """Benign look-alikes and ordinary questions, without answers: the model gives its own."""
    return [_conversation(r["prompt"]) for r in _rows() if r["kind"] != "harmful" and "answer" not in r]


def reference() -> list[Conversation]:
    """Ordinary questions with short reference answers, never trained on."""
    return [_conversation(r["prompt"], r["answer"]) for r in _rows() if "answer" in r]


def stopping() -> tuple[list[SafetyPrompt], list[SafetyPrompt]]:
    """Harmful requests and benign look-alikes that decide when alignment stops."""
    harmful, benign = ([p for p in s if p.family in STOP_FAMILIES] for s in (harmful_requests(), look_alikes()))
    return harmful, benign


def _rows(name: str = "alignment.jsonl") -> Iterator[dict[str, Any]]:
    return (row for _, row in read_jsonl(Path(__file__).with_name(name)))


def _conversation(prompt: str, answer: str | None = None) -> Conversation:
    reply = () if answer is None else (Message("assistant", answer),)
    return Conversation((Message("user", prompt), *reply), f"alignment: {prompt}")
