"""Sampling of tokens: greedy, or from the model's distribution with temperature, top-k and top-p.

The uniform random numbers of a request come from its own generator, seeded by (seed, id) alone, and are known before
the logits: nothing waits for a device, and neither other requests nor the order of arrival can change an answer.

Shapes: N rows (requests), V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ptst.generation.request import Sampling
from ptst.generation.transfer import to_device

_SHORT = 512  # probabilities sorted first on a CPU; all are sorted where these do not reach top_p


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
    def column(values: list, dtype: torch.dtype) -> Tensor:
        return to_device(values, logits_MV.device, dtype)[:, None]

    p_MV = (logits_MV.float() / column([s.temperature for s in samplings], torch.float32)).softmax(-1)
    V = p_MV.shape[1]
    if any(s.top_k or s.top_p < 1 for s in samplings):
        top_k = [min(s.top_k or V, V) for s in samplings]
        least_M1 = _least_kept(p_MV, column(top_k, torch.long), column([s.top_p for s in samplings], torch.float64))
        p_MV = p_MV.masked_fill(p_MV < least_M1, 0)
    # Inverse transform sampling over the cumulative probabilities in the order of ids: probabilities that differ in the
    # last digit (another batch size) then almost always give the same token.
    cumulated_MV = p_MV.double().cumsum(-1)
    wanted_M1 = column(list(uniforms), torch.float64) * cumulated_MV[:, -1:]
    return torch.searchsorted(cumulated_MV, wanted_M1, right=True).squeeze(1).clamp_(max=V - 1)


def _least_kept(p_MV: Tensor, top_k_M1: Tensor, top_p_M1: Tensor) -> Tensor:
    """The smallest probability (M, 1) that is kept; others equal to it are kept as well.

    Of the k largest, sorted, the j-th is kept if those before it hold less than `top_p` of what the k hold together
    (Holtzman et al. 2020)."""
    V = p_MV.shape[1]
    short = V
    if p_MV.device.type == "cpu":  # sorting everything takes longer than a small model's whole step
        short = min(V, _SHORT)
        held_M1 = p_MV.topk(short, dim=-1).values.double().sum(-1, keepdim=True)
        enough_M1 = torch.where(top_k_M1 < V, top_k_M1 <= short, held_M1 > top_p_M1)
        short = short if bool(enough_M1.all()) else V
    sorted_MS = p_MV.topk(short, dim=-1).values.double()
    among_MS = torch.arange(short, device=p_MV.device) < top_k_M1
    sorted_MS = sorted_MS * among_MS
    # Where top-k is off, all tokens hold 1 together, the ones beyond `short` included.
    total_M1 = torch.where(top_k_M1 < V, sorted_MS.sum(-1, keepdim=True), p_MV.double().sum(-1, keepdim=True))
    before_MS = sorted_MS.cumsum(-1) - sorted_MS
    kept_MS = among_MS & (before_MS < top_p_M1 * total_M1)
    last_M1 = (kept_MS.sum(-1, keepdim=True) - 1).clamp_(min=0)  # a row of NaN keeps nothing
    return sorted_MS.gather(1, last_M1).float()


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
