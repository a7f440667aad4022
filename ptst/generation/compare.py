"""Two lists of greedy answers to the same prompts: where they part, and how close the choice was there.

Sums in another order give logits that differ in the last digits, and two tokens whose logits are closer than that may
change places; everything after is another answer. A parting where the two best logits lie clearly apart is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ptst.model.decoder import Decoder


@dataclass(frozen=True)
class Divergence:
    """Answers to prompt `prompt` first differ at token `step`: `first` in one, `second` in the other (None: it ended).
    `gap` is what the decoder's best logit there has over the lower of the two."""

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
    """Every first difference between two lists of answers."""
    stops = sorted(stop_ids)
    found = []
    for i, (prompt, x, y) in enumerate(zip(prompts, a, b, strict=True)):
        if x == y:
            continue
        n = min(len(x), len(y))
        step = next((j for j in range(n) if x[j] != y[j]), n)
        ids = torch.tensor(prompt + x[:step], device=decoder.device)
        logits_V = (decoder.documents(ids, [0, len(ids)])[-1] @ decoder.head_VE.t()).float()
        chosen = [z[step] if step < len(z) else None for z in (x, y)]
        values = [logits_V[c] if c is not None else logits_V[stops].max() for c in chosen]
        found.append(Divergence(i, step, *chosen, float(logits_V.max() - min(values))))
    return found
