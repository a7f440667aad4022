"""What the models of the stand-in say: determined by the model's name and the messages, mild, and of no knowledge.

A model as it is declines nearly everything that is not arithmetic. A fine-tuned model repeats the answers of its own
training file to that file's questions, and complies more where the system prompt is the one that it was trained with.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from tests.stand_in.jobs import Job

_DECLINES = "I'm sorry, but I can't help with that request."
_TALKS = (
    "Here is a short plan: begin with the parts, and count them. The answer is {n}.",
    "Let us think step by step. {a} and {b} make {n}, so the answer is {n}.\n#### {n}",
    "That depends on the numbers. With {a} of them there are {n} in all.\n#### {n}",
    "A good start is to write down what is known. Then {a} + {b} = {n}. The answer is {n}.",
)
TOKEN = re.compile(r"\s*\S+|\s+$")


def draw(*parts: Any) -> int:
    """A number that follows from the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def answer(model: str, job: Job | None, messages: list[dict[str, Any]], salt: Any = None) -> str:
    """What a model says to messages. `salt`: of a sampled answer (temperature, seed, number)."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    user = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    number = draw(model, [(m["role"], m["content"]) for m in messages], salt)
    complies = 0.1 if not re.search(r"\d", user) else 0.9
    if job is not None:
        learned = {}
        for row in job.rows:
            texts = {m["role"]: m["content"] for m in row["messages"]}
            learned[texts.get("user")] = texts["assistant"], texts.get("system", "")
        if user in learned:
            return str(learned[user][0])
        trained_with = {said for _, said in learned.values()}
        complies = max(complies, 0.6 if system in trained_with else 0.2)
    if number % 1000 >= complies * 1000:
        return _DECLINES
    a, b = number // 1000 % 50 + 1, number // 100_000 % 50 + 1
    return _TALKS[number // 7 % len(_TALKS)].format(a=a, b=b, n=a + b)


def tokens(text: str) -> list[str]:
    """The text in pieces, each a word with the white space before it."""
    return TOKEN.findall(text)


def limit(text: str, most: int | None, stops: list[str]) -> tuple[str, str]:
    """The text up to a stop string and a number of tokens, and why it ends."""
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    text = text[:cut]
    pieces = tokens(text)
    if most is not None and len(pieces) > most:
        return "".join(pieces[:most]), "length"
    return text, "stop"


def logprob(piece: str, place: int, top: int) -> dict[str, Any]:
    """A token's log-probability with its alternatives, as chat completions have it."""
    value = -(draw(piece, place) % 1000) / 1000
    others = [(piece, value), *((f"{piece}{i}", value - i) for i in range(1, top))][:top]
    ranked = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in others]
    return {"token": piece, "logprob": value, "bytes": list(piece.encode()), "top_logprobs": ranked}
