"""What goes into the engine and what comes out: requests, events, completions, counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptst.generation.sampling import Sampling


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


@dataclass
class Completion:
    """An answer.

    `ids` are without the stop token; `cut` says that the token limit ended it. `reason`: stop, length, stop_string,
    cancelled or error. `text` is there when the engine can decode, and ends exactly before the stop string, which `ids`
    may reach into. `logprobs` has one figure for each of `ids` where asked for. `error` says what was wrong.
    """

    ids: list[int]
    cut: bool
    reason: str = "stop"
    text: str | None = None
    logprobs: list[float] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Event:
    """News of one request: its new token ids, the text that they make certain, and the completion if it has ended."""

    id: str | int
    tokens: list[int]
    text: str
    completion: Completion | None = None


@dataclass
class Statistics:
    """Counts since the engine was made."""

    answers: int = 0  # completions handed out, errors and cancelled ones included
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
