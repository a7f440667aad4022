"""What goes into the engine and what comes out: requests, events, answers, counts; importable without torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ptst.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an answer is made. Temperature 0 is greedy.

    `top_k` keeps the k likeliest tokens (0: all), then `top_p` the smallest set of those that holds that share of
    their probability. The answer ends before the first of `stop_strings`. `logprobs` asks for each token's logarithm
    of probability under the model itself (temperature 1, nothing left out). Raises UserError for a value that cannot
    be meant.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature and not 1e-5 <= self.temperature < float("inf"):
            raise UserError(
                f"--temperature is {self.temperature}; it must be at least 0.00001, or 0 for greedy answers"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top-k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if isinstance(self.stop_strings, str) or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise UserError(f"stop strings are {self.stop_strings!r}; a tuple of texts is needed, none of them empty")

    def generator(self, request_id: str | int) -> random.Random:
        """The request's own source of uniform numbers: of (seed, id) and nothing else."""
        # Python's generator takes the whole text as its seed; torch's on the CPU would look at 32 bits of a number.
        return random.Random(f"{self.seed}:{request_id}")


@dataclass(frozen=True)
class Request:
    """A prompt to be answered. Its sampled answer depends on `prompt`, `sampling`, `adapter` and `id`, on nothing else.

    `adapter` names one of the engine's; None is the decoder as it stands. `keep`: the keys and values of prompt and
    answer stay after the end, while memory allows, so that a prompt that goes on from there (the next turn of a
    conversation) computes only what is new.
    """

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    id: str | int = 0
    adapter: str | None = None
    keep: bool = False


def outside(ids: list[int], vocab_size: int) -> list[int]:
    """Those of `ids` that are no tokens of the model."""
    return [t for t in ids if not (hasattr(t, "__index__") and 0 <= t < vocab_size)]


@dataclass(frozen=True)
class Answer:
    """What the model answered to one prompt; the only type of answers, from the engine to the results.

    `token_ids` are without the stop token. `text` ends before the stop string, which `token_ids` may reach into; it is
    empty where the engine has no `decode`. `finish_reason`: "stop" (a stop token), "length" (the token limit),
    "stop_string", "cancelled" or "error". `logprobs` has one value per token id where `Sampling.logprobs` asks for
    them. `error` says what went wrong where `finish_reason` is "error".
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] | None = None
    error: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether the token limit ended the answer."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Event:
    """News of one request: its new token ids, the text that they make certain, and the answer if it has ended."""

    id: str | int
    token_ids: list[int]
    text: str
    answer: Answer | None = None


@dataclass
class Statistics:
    """Counts since the engine was made."""

    answers: int = 0  # handed out, errors and cancelled ones included
    tokens: int = 0  # made
    prompt_tokens: int = 0  # computed
    saved_tokens: int = 0  # of prompts, not computed because a shared prefix was stored
    steps: int = 0
    seconds: float = 0.0  # inside steps
    blocks: int = 0  # of the whole allocation
    blocks_used: int = 0
    blocks_peak: int = 0

    def progress(self, total: int | None = None) -> str:
        """`120 tokens/s, ETA 1:05` (answers to come are taken to be as long as those so far)."""
        rate = f"{self.tokens / self.seconds if self.seconds else 0:.0f} tokens/s"
        if total is None or not self.answers:
            return rate
        left = round(self.seconds / self.answers * max(0, total - self.answers))
        return f"{rate}, ETA {left // 60}:{left % 60:02d}"
