r"""Causal attention over one flat row of documents, with grouped key/value heads and an optional sliding window.

out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over the keys j of i's own document with j <= i and, under a window W,
i - j < W. Documents are given by `cu_seqlens` = [0, L1, L1 + L2, ...]. Queries may be fewer than keys (a prompt whose
beginning is already cached): they are then the document's last ones (bottom-right aligned). Documents that begin alike
may hold that beginning once: `before` tells which rows of the keys stand before each document's own.

Shapes: T tokens, H query heads, K key/value heads (H a multiple of K), D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptst.kernels import flash_attention
from ptst.kernels.dispatch import check_alike, use_triton

# (first row, number of rows) for every document; (0, 0): nothing stands before it.
Before = Sequence[tuple[int, int]]


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
    def forward(ctx, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: list[int], before: Before) -> Tensor:
        ctx.cu_seqlens, ctx.before = cu_seqlens, before
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        sums = []
        for (a, b), first in _documents(cu_seqlens, before):
            how = _visible(b - a, first[1], q_THD.dtype)
            heads = _heads(q_THD, k_TKD, v_TKD, a, b, first)
            out_HtD, sum_Ht = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, **how)
            out_THD[a:b] = out_HtD[0].transpose(0, 1)
            sums.append(sum_Ht)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *sums)
        return out_THD

    @staticmethod
    def backward(ctx, do_THD: Tensor):
        *row, out_THD = (saved := ctx.saved_tensors)[:4]
        sums = iter(saved[4:])
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in row]
        shared: dict[tuple[int, int, int], list[Tensor]] = {}
        for (a, b), (start, size) in _documents(ctx.cu_seqlens, ctx.before):
            heads = _heads(*row, a, b, (start, size))
            do_HtD, out_HtD = (x[a:b].transpose(0, 1)[None] for x in (do_THD, out_THD))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do_HtD, *heads, out_HtD, next(sums), **_visible(b - a, size, do_THD.dtype)
            )
            for which, (grad, part) in enumerate(zip(grads, parts, strict=True)):
                # The heads that shared a key add up their gradients.
                part_ThD = part[0].transpose(0, 1).unflatten(1, (grad.shape[1], -1))
                part_ThD = part_ThD[:, :, 0] if part_ThD.shape[2] == 1 else part_ThD.sum(2)
                first_ThD, grad[a:b] = part_ThD.split((len(part_ThD) - (b - a), b - a))
                if len(first_ThD):  # keys and values alone have rows before
                    shared.setdefault((which, start, size), []).append(first_ThD)
        # Now that what these rows' own document gives them stands there; as one sum, which is rounded once.
        for (which, start, size), firsts in shared.items():
            grads[which][start : start + size] += torch.stack(firsts).sum(0)
        return *grads, None, None


def _documents(cu_seqlens: Sequence[int], before: Before) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Bounds and beginning of every document that has a row."""
    beginnings = before or [(0, 0)] * (len(cu_seqlens) - 1)
    pairs = zip(pairwise(cu_seqlens), beginnings, strict=True)
    return ((bounds, first) for bounds, first in pairs if bounds[1] > bounds[0])


def _visible(rows: int, before: int, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of torch's attention: the triangle, or its rows below a beginning."""
    if not before:
        return {"dropout_p": 0.0, "is_causal": True}
    mask = torch.zeros((rows, before + rows), dtype=dtype)
    hidden = ~causal_mask(rows, before + rows, None)
    return {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask.masked_fill_(hidden, float("-inf"))}


def _heads(q: Tensor, k: Tensor, v: Tensor, a: int, b: int, first: tuple[int, int]) -> list[Tensor]:
    """(1, H, t, D) of one document of q, k and v, keys and values repeated for the heads that share them: views where
    nothing is repeated nor stands before."""
    start, size = first
    group = q.shape[1] // k.shape[1]
    keys = [torch.cat((x[start : start + size], x[a:b])) if size else x[a:b] for x in (k, v)]
    keys = [x.transpose(0, 1) if group == 1 else x.transpose(0, 1).repeat_interleave(group, 0) for x in keys]
    return [x[None] for x in (q[a:b].transpose(0, 1), *keys)]


class _Gather(torch.autograd.Function):
    """Rows of every document with those before it, (S, K, D): as many copies of a beginning as have it. Their gradients
    are added up in one order, so that the backward pass is deterministic on a GPU too."""

    @staticmethod
    def forward(ctx, x_TKD: Tensor, cu_seqlens: list[int], before: Before) -> Tensor:
        rows_S, ctx.own_T, ctx.copies = _places(tuple(cu_seqlens), tuple(before), x_TKD.device)
        return x_TKD[rows_S]

    @staticmethod
    def backward(ctx, grad_SKD: Tensor):
        grad_TKD = grad_SKD[ctx.own_T]
        for start, size, copies in ctx.copies:
            grad_TKD[start : start + size] += grad_SKD[copies].unflatten(0, (-1, size)).sum(0)
        return grad_TKD, None, None


@lru_cache(8)  # for every layer the same
def _places(
    cu_seqlens: tuple[int, ...], before: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[int, int, Tensor]]]:
    """Which row each gathered one is; which gathered ones are the rows themselves; and, for every beginning (first row,
    number of rows), which are copies of it, one after the other."""
    rows: list[int] = []
    own: list[int] = []
    copies: dict[tuple[int, int], list[int]] = {}
    for (a, b), (start, size) in _documents(cu_seqlens, before):
        if size:
            copies.setdefault((start, size), []).extend(range(len(rows), len(rows) + size))
        rows += range(start, start + size)
        own += range(len(rows), len(rows) + b - a)
        rows += range(a, b)
    send = partial(torch.tensor, device=device)
    return send(rows), send(own), [(*key, send(places)) for key, places in copies.items()]


def _check_before(before: Before, cu_seqlens: list[int], cu_seqlens_k: list[int] | None) -> None:
    if cu_seqlens_k is not None:
        raise ValueError("what stands before documents is told by `before` or by boundaries of the keys, not by both")
    if len(before) != len(cu_seqlens) - 1:
        raise ValueError(f"{len(before)} beginnings are given for {len(cu_seqlens) - 1} documents")
    for document, ((start, size), a) in enumerate(zip(before, cu_seqlens, strict=False)):
        if start < 0 or size < 0 or start + size > a:
            raise ValueError(
                f"document {document} begins at row {a}, so rows {start} to {start + size} are not before it"
            )


def packed_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: list[int],
    *,
    cu_seqlens_k: list[int] | None = None,
    before: Before = (),
    window: int | None = None,
) -> Tensor:
    """Attention of every document with itself and with what stands before it; returns (T, H, D).

    `cu_seqlens` bounds the documents in q, `cu_seqlens_k` in k and v (the same when left out). `before`, without
    `cu_seqlens_k`: for every document (start, n), rows start to start + n of k and v are the keys before its own; they
    are rows of an earlier document. Raises ValueError when these do not fit the tensors, a document has more queries
    than keys, or shapes, devices or dtypes do not fit.
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
    if before:
        _check_before(before, cu_seqlens, cu_seqlens_k)
    on_gpu = use_triton(q_THD, k_TKD, v_TKD)
    longest = max([0, *(b - a + size for (a, b), (_, size) in _documents(cu_k, before))])
    if q_THD.device.type == "cpu" and not on_gpu and cu_seqlens == cu_k and (window is None or window >= longest):
        return _WholeDocuments.apply(q_THD, k_TKD, v_TKD, cu_seqlens, before)
    if before:
        k_TKD, v_TKD = (_Gather.apply(x, cu_seqlens, before) for x in (k_TKD, v_TKD))
        cu_k = [0, *accumulate((b - a + n) * (b > a) for (a, b), (_, n) in zip(pairwise(cu_k), before, strict=True))]
    if on_gpu:
        return flash_attention.op(q_THD, k_TKD, v_TKD, cu_seqlens, cu_k, window or 0)[0]
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
