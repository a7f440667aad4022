"""Sampling of tokens: greedy, or from the model's distribution with temperature, top-k and top-p.

The uniform random numbers of a request come from its own generator, seeded by (seed, id) alone, and are known before
the logits: nothing waits for a device, and neither other requests nor the order of arrival can change an answer.

Shapes: N rows (requests), V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ptst.generation.request import Sampling
from ptst.kernels.sampling import sample_kept
from ptst.kernels.transfer import to_device


def sample(logits_NV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """One token id (N,) per row; -1 where the row's best logit is not a number. `uniforms` lie in [0, 1)."""
    if logits_NV.device.type != "cpu":
        best_N, tokens_N = logits_NV.max(-1)
    else:  # NumPy's takes an eighth of the time
        tokens_N = torch.from_numpy(logits_NV.numpy().argmax(-1))
        best_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
    rows = [i for i, s in enumerate(samplings) if s.temperature]
    if rows:
        rows_M = to_device(rows, logits_NV.device)
        tokens_N[rows_M] = _sample_rows(logits_NV[rows_M], [samplings[i] for i in rows], [uniforms[i] for i in rows])
    return tokens_N.masked_fill_(~best_N.isfinite(), -1)


def _sample_rows(logits_MV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    temperatures_M1 = to_device([s.temperature for s in samplings], logits_MV.device, torch.float32)[:, None]
    p_MV = (logits_MV.float() / temperatures_M1).softmax(-1)
    return sample_kept(p_MV, [s.top_k for s in samplings], [s.top_p for s in samplings], uniforms)


def log_probabilities(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log probability of each row's token under the model, float32 (N,)."""
    logits_NV = logits_NV.float()
    return logits_NV.gather(1, tokens_N.clamp(min=0)[:, None]).squeeze(1) - logits_NV.logsumexp(-1)


def top_log_probabilities(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log probabilities, float32, of each row's k most likely tokens (at most V), the likeliest first: two of
    (N, k)."""
    logits_NV = logits_NV.float()
    values_Nk, ids_Nk = logits_NV.topk(min(k, logits_NV.shape[1]), dim=-1)
    return ids_Nk, values_Nk - logits_NV.logsumexp(-1, keepdim=True)
