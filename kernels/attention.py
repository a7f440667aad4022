r"""Causal attention over one flat row of documents, with grouped key/value heads and an optional sliding window.

out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over the keys j of i's own document with j <= i and, under a window W,
i - j < W. Documents are given by `cu_seqlens` = [0, L1, L1 + L2, ...]. Queries may be fewer than keys (a prompt whose
beginning is already cached): they are then the document's last ones (bottom-right aligned).

Shapes: T tokens, H query heads, K key/value heads (H a multiple of K), D head_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import flash_attention
from kernels.dispatch import check_alike, use_triton


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Boolean (queries, keys), true where the query may look; the last query stands on the last key."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    mask = j <= i
    return mask if window is None else mask & (i - j < window)


class _WholeDocuments(torch.autograd.Function):
    """torch's fused CPU attention of each document, written straight into the row.

    As one operation for autograd: cut document by document, every cut's gradient would be a whole row of zeros with one
    document filled in, and a third of the time would go into adding these up.
    """

    @staticmethod
    def forward(ctx, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: list[int]) -> Tensor:
        ctx.group, ctx.cu_seqlens = q_THD.shape[1] // k_TKD.shape[1], cu_seqlens
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        sums = []
        for a, b in pairwise(cu_seqlens):
            if a == b:
                continue
            heads = _heads((q_THD, k_TKD, v_TKD), a, b, ctx.group)
            out_HtD, sum_Ht = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True)
            out_THD[a:b] = out_HtD[0].transpose(0, 1)
            sums.append(sum_Ht)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *sums)
        return out_THD

    @staticmethod
    def backward(ctx, do_THD: Tensor):
        *row, out_THD = (saved := ctx.saved_tensors)[:4]
        sums = iter(saved[4:])
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in row]
        for a, b in pairwise(ctx.cu_seqlens):
            if a == b:
                continue
            heads = _heads(row, a, b, ctx.group)
            do_HtD, out_HtD = (x[a:b].transpose(0, 1)[None] for x in (do_THD, out_THD))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do_HtD, *heads, out_HtD, next(sums), 0.0, True
            )
            for grad, part in zip(grads, parts, strict=True):
                # The heads that shared a key add up their gradients.
                part_ThD = part[0].transpose(0, 1).unflatten(1, (grad.shape[1], -1))
                grad[a:b] = part_ThD[:, :, 0] if part_ThD.shape[2] == 1 else part_ThD.sum(2)
        return *grads, None


def _heads(row: tuple[Tensor, Tensor, Tensor] | list[Tensor], a: int, b: int, group: int) -> list[Tensor]:
    """Views (1, H, t, D) of one document of q, k and v, keys and values repeated for the heads that share them."""
    q, k, v = (x[a:b].transpose(0, 1) for x in row)
    return [x[None] for x in (q, *((k, v) if group == 1 else (x.repeat_interleave(group, 0) for x in (k, v))))]


def packed_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: list[int],
    *,
    cu_seqlens_k: list[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of every document with itself; returns (T, H, D).

    `cu_seqlens` bounds the documents in q, `cu_seqlens_k` in k and v (the same when left out). Raises ValueError when
    they do not fit the tensors, a document has more queries than keys, or shapes, devices or dtypes do not fit.
    """
    shapes = f"queries {tuple(q_THD.shape)}, keys {tuple(k_TKD.shape)} and values {tuple(v_TKD.shape)}"
    if q_THD.dim() != 3 or k_TKD.dim() != 3 or k_TKD.shape != v_TKD.shape or q_THD.shape[2] != k_TKD.shape[2]:
        raise ValueError(f"{shapes} do not fit: (T, heads, head_dim) each, keys and values alike")
    if k_TKD.shape[1] == 0 or q_THD.shape[1] % k_TKD.shape[1]:
        raise ValueError(f"{shapes} do not fit: the query heads must be a multiple of the key heads")
    check_alike(q=q_THD, k=k_TKD, v=v_TKD)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for bounds in (cu_seqlens, cu_k):
        if bounds[:1] != [0] or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"document boundaries {bounds} must begin at 0 and never fall")
    if cu_seqlens[-1] != q_THD.shape[0] or cu_k[-1] != k_TKD.shape[0] or len(cu_seqlens) != len(cu_k):
        raise ValueError(
            f"document boundaries end at {cu_seqlens[-1]} and {cu_k[-1]}, the tensors hold {q_THD.shape[0]} queries "
            f"and {k_TKD.shape[0]} keys"
        )
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}; a query sees at least itself, so it must be 1 or more")
    if any(q1 - q0 > k1 - k0 for q0, q1, k0, k1 in zip(cu_seqlens, cu_seqlens[1:], cu_k, cu_k[1:], strict=False)):
        raise ValueError(f"a document has more queries than keys: boundaries {cu_seqlens} and {cu_k}")
    if use_triton(q_THD, k_TKD, v_TKD):
        return flash_attention.op(q_THD, k_TKD, v_TKD, cu_seqlens, cu_k, window or 0)[0]
    longest = max([0, *(b - a for a, b in pairwise(cu_k))])
    if q_THD.device.type == "cpu" and cu_seqlens == cu_k and (window is None or window >= longest):
        return _WholeDocuments.apply(q_THD, k_TKD, v_TKD, cu_seqlens)
    # One call per document, with a mask where a window or a cached beginning asks for one.
    outs = []
    for q0, q1, k0, k1 in zip(cu_seqlens, cu_seqlens[1:], cu_k, cu_k[1:], strict=False):
        if q1 == q0:
            continue
        q_HtD, k_KtD, v_KtD = (x.transpose(0, 1) for x in (q_THD[q0:q1], k_TKD[k0:k1], v_TKD[k0:k1]))
        whole = q1 - q0 == k1 - k0 and (window is None or window >= k1 - k0)
        out_HtD = scaled_dot_product_attention(
            q_HtD[None],
            k_KtD[None],
            v_KtD[None],
            attn_mask=None if whole else causal_mask(q1 - q0, k1 - k0, window, q_THD.device),
            is_causal=whole,
            enable_gqa=q_THD.shape[1] != k_TKD.shape[1],
        )[0]
        outs.append(out_HtD.transpose(0, 1))
    return torch.cat(outs) if outs else torch.empty_like(q_THD)
