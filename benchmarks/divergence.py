"""Where two lists of greedy answers to the same prompts diverge, and how close the two choices were.

Sums in another order give logits that differ in the last digits, so two tokens whose logits are closer than that may
change places, and all that follows differs. A divergence where the two best logits are clearly apart is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ptst.model.decoder import Decoder


@dataclass(frozen=True)
class Divergence:
    """The answers to prompt number `prompt` first differ at token `step`: `first` in one, `second` in the other (None:
    the answer ends there). `gap`: the decoder's best logit minus the lower one of the two."""

    prompt: int
    step: int
    first: int | None
    second: int | None
    gap: float


@torch.inference_mode()
def divergences(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    a: Sequence[list[int]],
    b: Sequence[list[int]],
    stop_ids: Iterable[int],
) -> list[Divergence]:
    """The first difference of each pair of answers that differ."""
    stops = sorted(stop_ids)
    found = []
    for i, (prompt, x, y) in enumerate(zip(prompts, a, b, strict=True)):
        if x == y:
            continue
        n = min(len(x), len(y))
        step = next((j for j in range(n) if x[j] != y[j]), n)
        ids = torch.tensor(prompt + x[:step], device=decoder.device)
        logits_V = (decoder.documents(ids, [0, len(ids)])[-1] @ decoder.head_VE.t()).float()
        first, second = (z[step] if step < len(z) else None for z in (x, y))
        values = [logits_V[c] if c is not None else logits_V[stops].max() for c in (first, second)]
        found.append(Divergence(i, step, first, second, float(logits_V.max() - min(values))))
    return found
