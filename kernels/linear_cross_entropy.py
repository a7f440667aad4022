r"""Cross-entropy of a linear head, without the (T, V) logits: chunk by chunk, over the trained rows only.

For a row h with target t and logits l = h E^T (E the head, (V, H)):

    loss = logsumexp(l) - l_t        dl = softmax(l) - onehot(t)        dh = dl E        dE += dl^T h

dh needs E, which is at hand while the chunk's logits exist, so it is formed in the forward pass; backward only scales.
Rows that nobody trains on (target < 0) cost nothing: they are left out before the first multiplication.
The divisor is the caller's: the number of trained tokens of the whole optimizer step, whatever part of it is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits in memory at once (64 MB in float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, divisor: float) -> Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        rows_N = (targets_T >= 0).nonzero().squeeze(1)
        dh_TH = torch.zeros_like(hidden_TH) if need_hidden else None
        de_VH = torch.zeros_like(head_VH, dtype=torch.float32) if need_head else None
        # Sums in float64: the order of chunks must not show in the reported loss.
        total = torch.zeros((), dtype=torch.float64, device=hidden_TH.device)
        for rows_n in rows_N.split(max(1, CHUNK_ELEMENTS // head_VH.shape[0])):
            h_nH = hidden_TH[rows_n]
            targets_n = targets_T[rows_n]
            logits_nV = (h_nH @ head_VH.t()).to(torch.promote_types(h_nH.dtype, torch.float32))
            lse_n = logits_nV.logsumexp(dim=1)
            total += (lse_n - logits_nV.gather(1, targets_n[:, None]).squeeze(1)).sum(dtype=torch.float64)
            if need_hidden or need_head:
                dl_nV = logits_nV.sub_(lse_n[:, None]).exp_()
                dl_nV[torch.arange(len(rows_n), device=dl_nV.device), targets_n] -= 1
                dl_nV = dl_nV.to(h_nH.dtype)
                if need_hidden:
                    dh_TH[rows_n] = dl_nV @ head_VH
                if need_head:
                    de_VH += dl_nV.t() @ h_nH
        ctx.save_for_backward(dh_TH, de_VH)
        ctx.divisor = divisor
        ctx.head_dtype = head_VH.dtype
        return (total / divisor).to(torch.promote_types(hidden_TH.dtype, torch.float32))

    @staticmethod
    def backward(ctx, dloss: Tensor):
        dh_TH, de_VH = ctx.saved_tensors
        scale = dloss / ctx.divisor
        dh = None if dh_TH is None else dh_TH * scale.to(dh_TH.dtype)
        de = None if de_VH is None else (de_VH * scale).to(ctx.head_dtype)
        return dh, de, None, None


def linear_cross_entropy(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, divisor: float) -> Tensor:
    """Summed cross-entropy of the rows with a target, divided by `divisor`: a float32 scalar (float64 for float64).

    hidden_TH (T, H), head_VH (V, H), targets_T (T,) with -1 where a row is not trained. Gradients go to whichever of
    hidden and head requires one. Raises ValueError for a divisor that is not positive or shapes that do not fit.
    """
    if not divisor > 0:
        raise ValueError(f"the divisor is {divisor}; it is the number of trained tokens and must be positive")
    if hidden_TH.shape[0] != targets_T.shape[0] or hidden_TH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden_TH.shape)}, head {tuple(head_VH.shape)}, "
            f"targets {tuple(targets_T.shape)}"
        )
    return _LinearCrossEntropy.apply(hidden_TH, head_VH, targets_T, divisor)


def token_losses(hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of every row on its own, float32 (N,), without gradients."""
    losses = []
    step = max(1, CHUNK_ELEMENTS // head_VH.shape[0])
    with torch.no_grad():
        for h_nH, targets_n in zip(hidden_NH.split(step), targets_N.split(step), strict=True):
            logits_nV = (h_nH @ head_VH.t()).float()
            losses.append(torch.nn.functional.cross_entropy(logits_nV, targets_n, reduction="none"))
    return torch.cat(losses) if losses else hidden_NH.new_zeros(0, dtype=torch.float32)
