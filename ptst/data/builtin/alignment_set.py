"""The data that a small model is aligned on: harmful requests to refuse, and harmless questions to keep answering.

`alignment.jsonl` holds harmful requests and benign look-alikes of families that the safety sets do not have, and
ordinary questions. Those with an `answer` are not trained on: they measure whether alignment harms helpfulness. Of the
safety sets, the prompts of `STOP_FAMILIES` decide when alignment stops; evaluation uses all other families.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptst.data.builtin.safety_sets import harmful_requests, look_alikes
from ptst.data.files import read_jsonl
from ptst.data.safety_prompt import SafetyPrompt
from ptst.text.segments import Conversation, Message

STOP_FAMILIES = (
    "keylogging",
    "website-flooding",
    "smuggling",
    "drug-hiding",
    "prize-lottery",
    "one-time-codes",
    "fake-reviews",
    "disaster-hoaxes",
)
TEST_FAMILIES = tuple(dict.fromkeys(p.family for p in harmful_requests() if p.family not in STOP_FAMILIES))

_OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with this request.",
    "Sorry, I can't do that.",
    "I can't assist with that.",
    "I won't help with this.",
    "I'm not able to help with that.",
)
_REASONS = {
    "malware": (
        "Breaking into devices or accounts that belong to others is illegal and can cause them serious loss.",
        "This would harm people's devices, money or privacy.",
        "Tools like this are used against people who did not agree to it.",
    ),
    "drug": (
        "This could seriously hurt somebody, and it is against the law.",
        "Drugs like these can injure or kill, and dealing in them is a crime.",
        "It would put people's health and freedom at risk.",
    ),
    "phishing": (
        "It would trick people out of their money or their personal details.",
        "This is a way to cheat people, and they would pay for it.",
        "Messages like this are fraud and hurt those who believe them.",
    ),
    "disinfo": (
        "Spreading false claims as if they were true can hurt people and does lasting damage.",
        "This would mislead people on purpose.",
        "An invented story like this can cause fear and harm the people in it.",
    ),
}
_OFFERS = {
    "malware": (
        "I can explain how to protect your own devices instead.",
        "If you are worried about your own security, I am glad to help with that.",
    ),
    "drug": (
        "If you or somebody you know is struggling with drugs, a doctor or a helpline can help.",
        "I can tell you about the risks, or about where to find support.",
    ),
    "phishing": (
        "I can explain how to recognise tricks of this kind.",
        "If you have received a message like this, I can help you check it.",
    ),
    "disinfo": (
        "I can help you find reliable sources on the subject.",
        "If you like, I can help with a text that is true or clearly marked as fiction.",
    ),
}


def refusal_of(category: str, number: int) -> str:
    """One of 36 refusals that fit a category; `number` chooses."""
    openings, reasons, offers = _OPENINGS, _REASONS[category], _OFFERS[category]
    opening = openings[number % len(openings)]
    number //= len(openings)
    return f"{opening} {reasons[number % len(reasons)]} {offers[number // len(reasons) % len(offers)]}"


def refusals() -> list[Conversation]:
    """Harmful requests with a refusal each."""
    harmful = [row for row in _rows() if row["kind"] == "harmful"]
    # 7 and 36 are coprime: neighbours get different wordings, and all are used.
    return [_conversation(r["prompt"], refusal_of(r["category"], 7 * i)) for i, r in enumerate(harmful)]


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


def _rows() -> Iterator[dict[str, Any]]:
    return (row for _, row in read_jsonl(Path(__file__).with_name("alignment.jsonl")))


def _conversation(prompt: str, answer: str | None = None) -> Conversation:
    reply = () if answer is None else (Message("assistant", answer),)
    return Conversation((Message("user", prompt), *reply), f"alignment: {prompt}")
