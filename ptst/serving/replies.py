"""Answers as OpenAI's API spells them: choices, log probabilities, usage, chunks of a stream."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptst.generation.request import TopLogprobs
from ptst.serving.models import ServedModel
from ptst.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # OpenAI's, for what JSON has no number for
FINISH_REASONS = {"stop": "stop", "stop_string": "stop", "length": "length"}
SSE_DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """ASCII alone, so that any text of a model can be sent."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def sse(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


@dataclass(frozen=True)
class Head:
    """What an answer, and each chunk of a stream, begins with. `seed`: of the random numbers; drawn where none came."""

    kind: str  # "chat.completion" or "text_completion"
    model: ServedModel
    seed: int
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self, chunk: bool = False) -> dict[str, Any]:
        is_chat = self.kind == "chat.completion"
        return {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + self.id,
            "object": "chat.completion.chunk" if chunk and is_chat else self.kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "seed": self.seed,
        }


@dataclass
class Usage:
    """Tokens of a request: each prompt once, however many choices it has; tokens that end an answer are not counted."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens with their log probabilities (None: not known, as of a prompt's first token), and the most likely ones at
    their places ([] where none are asked for)."""

    token_ids: Sequence[int]
    logprobs: Sequence[float | None]
    top_logprobs: Sequence[TopLogprobs | None] = ()


def token_text(tokenizer: Tokenizer, number: int) -> str:
    """A token as text; one that is a part of a character as OpenAI spells it, `bytes:\\xe2\\x80`."""
    found = tokenizer.token_bytes(number)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def text_length(tokenizer: Tokenizer, number: int) -> int:
    """Characters of a token's text; parts of one character count as one each."""
    return len(tokenizer.token_bytes(number).decode("utf-8", "replace"))


def chat_logprobs(tokenizer: Tokenizer, scored: ScoredTokens) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def entry(number: int, logprob: float | None) -> dict[str, Any]:
        text, found = token_text(tokenizer, number), tokenizer.token_bytes(number)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(found)}

    content = []
    for i, (number, logprob) in enumerate(zip(scored.token_ids, scored.logprobs, strict=True)):
        top = scored.top_logprobs[i] if scored.top_logprobs else None
        content.append({**entry(number, logprob), "top_logprobs": [entry(*pair) for pair in top or ()]})
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, scored: ScoredTokens, silent: int = 0) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. `silent`: the first so many tokens are not in its text."""
    tokens = [token_text(tokenizer, number) for number in scored.token_ids]
    offsets, offset = [], 0
    for i, number in enumerate(scored.token_ids):
        offsets.append(offset)
        offset += text_length(tokenizer, number) if i >= silent else 0
    top: list[dict[str, float] | None] | None = None
    if scored.top_logprobs:
        top = []
        for i, pairs in enumerate(scored.top_logprobs):
            own = scored.logprobs[i]
            # The token itself is always among them, as in OpenAI's.
            more = [] if own is None else [(scored.token_ids[i], own)]
            top.append(None if pairs is None else _likeliest(tokenizer, (*pairs, *more)))
    logprobs = [None if value is None else _finite(value) for value in scored.logprobs]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def _likeliest(tokenizer: Tokenizer, pairs: Iterable[tuple[int, float]]) -> dict[str, float]:
    """Log probabilities by the token's text; of two tokens with one text, the likelier."""
    found: dict[str, float] = {}
    for number, logprob in pairs:
        text = token_text(tokenizer, number)
        found[text] = max(_finite(logprob), found.get(text, LEAST_LOGPROB))
    return found


def _finite(value: float | None) -> float:
    return max(value, LEAST_LOGPROB) if value is not None else LEAST_LOGPROB
