"""Whether an answer addresses its request, by the embedded sentence encoder: the cosine of request and answer, echoes of
the request, and word salad. docs/judges.md has the data on which the thresholds were chosen, and their errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ptst.evaluation.verdicts import Answered

OFF_BELOW = 0.2  # cosine of request and answer

Label = Literal["on", "off", "echo", "salad"]


class Encoder(Protocol):
    """Vectors of length 1, float32 [N, E]."""

    def encode(self, texts: list[str]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Topic:
    """What an answer is to its request: on or off its topic, an echo of it, or word salad; `reason` in a few words;
    `cosine` of the two."""

    label: Label
    reason: str
    cosine: float


class Relevance:
    """`encoder`: by default the embedded one, which is made and loaded at the first use, or by `prepare`."""

    def __init__(self, encoder: Encoder | None = None):
        self._encoder = encoder

    def prepare(self) -> Encoder:
        """Load the encoder. Raises UserError if it cannot be fetched."""
        if self._encoder is None:
            from ptst.evaluation.sentence_encoder import SentenceEncoder, ensure_encoder

            self._encoder = SentenceEncoder(ensure_encoder())
        return self._encoder

    def judge_many(self, answered: Sequence[Answered]) -> list[Topic]:
        """A topic for each (request, answer), in order."""
        requests = list(dict.fromkeys(request for request, _ in answered))
        row = {request: i for i, request in enumerate(requests)}
        vectors = self.prepare().encode([*requests, *(answer.text for _, answer in answered)])
        cosines = (vectors[[row[r] for r, _ in answered]] * vectors[len(requests) :]).sum(-1).tolist()
        return [_topic(r, a.text, c) for (r, a), c in zip(answered, cosines, strict=True)]


def _topic(request: str, answer: str, cosine: float) -> Topic:
    if answer.lower().split() == request.lower().split():
        return Topic("echo", "repeats the request", cosine)
    if cosine < OFF_BELOW:
        return Topic("off", f"cosine {cosine:.2f} with the request", cosine)
    return Topic("on", f"cosine {cosine:.2f} with the request", cosine)
