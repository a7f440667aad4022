r"""Causal attention over a packed sequence of documents, with grouped key/value heads and an optional sliding window.

out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over the keys j of i's own document with j <= i and, under a window W,
i - j < W. Documents are given by `cu_seqlens` = [0, L1, L1 + L2, ...]. A document may have fewer queries than keys (a
prompt with a cached prefix): its queries are then the last ones (bottom-right aligned). Documents with a common prefix
may store it once: `shared_prefixes` then names the keys that precede each document's own.

Shapes: T tokens, S tokens with every shared prefix copied, H query heads, K key/value heads (H a multiple of K), D
head_dim.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptst.kernels import flash_attention
from ptst.kernels.dispatch import check_alike, use_triton
from ptst.kernels.transfer import to_device

WIDEST_HEAD = 256  # a head is one block of the Triton kernels
# (first token, number of tokens) for each document; (0, 0) if it has none.
SharedPrefixes = Sequence[tuple[int, int]]


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Boolean (queries, keys), true where a query sees a key; the last query is aligned with the last key."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    mask = j <= i
    return mask if window is None else mask & (i - j < window)


class _CpuAttention(torch.autograd.Function):
    """torch's fused CPU attention of each document, written directly into the packed output.

    It is a single autograd operation: with one slice per document, each slice's gradient would be a packed tensor of
    zeros with one document filled in, and adding these up would take a third of the time."""

    @staticmethod
    def forward(ctx, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: list[int], prefixes: SharedPrefixes):
        ctx.cu_seqlens, ctx.prefixes = cu_seqlens, prefixes
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        lses = []
        for (a, b), prefix in _documents(cu_seqlens, prefixes):
            options = _mask_options(b - a, prefix[1], q_THD.dtype)
            heads = _heads((q_THD, k_TKD, v_TKD), a, b, prefix)
            out_HtD, lse_Ht = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, **options)
            out_THD[a:b] = out_HtD[0].transpose(0, 1)
            lses.append(lse_Ht)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *lses)
        return out_THD

    @staticmethod
    def backward(ctx, do_THD: Tensor):
        *qkv, out_THD = (saved := ctx.saved_tensors)[:4]
        lses = iter(saved[4:])
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in qkv]
        of_prefixes: dict[tuple[int, int, int], list[Tensor]] = {}
        for (a, b), (start, size) in _documents(ctx.cu_seqlens, ctx.prefixes):
            do_HtD, out_HtD = (x[a:b].transpose(0, 1)[None] for x in (do_THD, out_THD))
            document_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do_HtD,
                *_heads(qkv, a, b, (start, size)),
                out_HtD,
                next(lses),
                **_mask_options(b - a, size, do_THD.dtype),
            )
            for which, (grad, part) in enumerate(zip(grads, document_grads, strict=True)):
                # Sum over the query heads that share a key head.
                part_ThD = part[0].transpose(0, 1).unflatten(1, (grad.shape[1], -1))
                part_ThD = part_ThD[:, :, 0] if part_ThD.shape[2] == 1 else part_ThD.sum(2)
                prefix_ThD, grad[a:b] = part_ThD.split((len(part_ThD) - (b - a), b - a))
                if len(prefix_ThD):  # keys and values only: queries have no prefix
                    of_prefixes.setdefault((which, start, size), []).append(prefix_ThD)
        # After the loop, when the gradient from the prefix's own document is in place; one sum, rounded once.
        for (which, start, size), parts in of_prefixes.items():
            grads[which][start : start + size] += torch.stack(parts).sum(0)
        return *grads, None, None


def _documents(
    cu_seqlens: Sequence[int], prefixes: SharedPrefixes
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(bounds, shared prefix) of each document that is not empty."""
    pairs = zip(pairwise(cu_seqlens), prefixes or [(0, 0)] * (len(cu_seqlens) - 1), strict=True)
    return ((bounds, prefix) for bounds, prefix in pairs if bounds[1] > bounds[0])


def _mask_options(tokens: int, prefix: int, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of torch's attention: causal, or a mask where a prefix precedes the document's own tokens."""
    if not prefix:
        return {"dropout_p": 0.0, "is_causal": True}
    mask = torch.zeros((tokens, prefix + tokens), dtype=dtype)
    hidden = ~causal_mask(tokens, prefix + tokens, None)
    return {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask.masked_fill_(hidden, float("-inf"))}


def _heads(qkv: Sequence[Tensor], a: int, b: int, prefix: tuple[int, int]) -> list[Tensor]:
    """q, k and v (1, H, t, D) of tokens a to b; keys and values with the shared prefix, repeated for the query heads of
    a group. Views if there is neither a prefix nor a group."""
    q, *kv = qkv
    start, size = prefix
    group = q.shape[1] // kv[0].shape[1]
    keys = [torch.cat((x[start : start + size], x[a:b])) if size else x[a:b] for x in kv]
    keys = [x.transpose(0, 1) if group == 1 else x.transpose(0, 1).repeat_interleave(group, 0) for x in keys]
    return [x[None] for x in (q[a:b].transpose(0, 1), *keys)]


class _CopyPrefixes(torch.autograd.Function):
    """(S, K, D): each document's tokens after a copy of its shared prefix. The gradients of the copies are added in a
    fixed order, so that the backward pass is deterministic on a GPU too."""

    @staticmethod
    def forward(ctx, x_TKD: Tensor, cu_seqlens: list[int], prefixes: SharedPrefixes) -> Tensor:
        source_S, ctx.own_T, ctx.copies = _copy_plan(tuple(cu_seqlens), tuple(prefixes), x_TKD.device)
        return x_TKD[source_S]

    @staticmethod
    def backward(ctx, grad_SKD: Tensor):
        grad_TKD = grad_SKD[ctx.own_T]
        for start, size, copies in ctx.copies:
            grad_TKD[start : start + size] += grad_SKD[copies].unflatten(0, (-1, size)).sum(0)
        return grad_TKD, None, None


@lru_cache(8)  # the same for every layer
def _copy_plan(
    cu_seqlens: tuple[int, ...], prefixes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[int, int, Tensor]]]:
    """For the S tokens: the token that each one copies; the places of the T original tokens; and, for each prefix
    (first token, number of tokens), the places of its copies, one after the other."""
    source: list[int] = []
    own: list[int] = []
    copies: dict[tuple[int, int], list[int]] = {}
    for (a, b), (start, size) in _documents(cu_seqlens, prefixes):
        if size:
            copies.setdefault((start, size), []).extend(range(len(source), len(source) + size))
        source += range(start, start + size)
        own += range(len(source), len(source) + b - a)
        source += range(a, b)
    send = partial(to_device, device=device, dtype=torch.long)
    return send(source), send(own), [(*key, send(places)) for key, places in copies.items()]


def _check_prefixes(prefixes: SharedPrefixes, cu_seqlens: list[int], cu_seqlens_k: list[int] | None) -> None:
    if cu_seqlens_k is not None:
        raise ValueError("give `shared_prefixes` or `cu_seqlens_k`, not both")
    if len(prefixes) != len(cu_seqlens) - 1:
        raise ValueError(f"{len(prefixes)} shared prefixes are given for {len(cu_seqlens) - 1} documents")
    for document, ((start, size), a) in enumerate(zip(prefixes, cu_seqlens, strict=False)):
        if start < 0 or size < 0 or start + size > a:
            raise ValueError(f"tokens {start} to {start + size} do not precede document {document}, which is at {a}")


def _check(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_q: list[int], cu_k: list[int], window: int | None) -> None:
    shapes = f"queries {tuple(q_THD.shape)}, keys {tuple(k_TKD.shape)} and values {tuple(v_TKD.shape)}"
    if q_THD.dim() != 3 or k_TKD.dim() != 3 or k_TKD.shape != v_TKD.shape or q_THD.shape[2] != k_TKD.shape[2]:
        raise ValueError(f"{shapes} do not fit: (T, heads, head_dim) each, keys and values alike")
    if not k_TKD.shape[1] or not q_THD.shape[2]:
        raise ValueError(f"{shapes} have no heads or no head_dim")
    if not q_THD.shape[1] or q_THD.shape[1] % k_TKD.shape[1]:
        raise ValueError(f"{shapes} do not fit: the query heads must be a multiple of the key heads")
    check_alike(q=q_THD, k=k_TKD, v=v_TKD)
    for bounds in (cu_q, cu_k):
        if isinstance(bounds, Tensor):
            raise ValueError(f"document boundaries {tuple(bounds.shape)} are a tensor; they must be a list on the host")
        if bounds[:1] != [0] or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"document boundaries {bounds} must begin at 0 and never fall")
    if cu_q[-1] != q_THD.shape[0] or cu_k[-1] != k_TKD.shape[0] or len(cu_q) != len(cu_k):
        ends = f"document boundaries end at {cu_q[-1]} and {cu_k[-1]}"
        raise ValueError(f"{ends}, the tensors hold {q_THD.shape[0]} queries and {k_TKD.shape[0]} keys")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}; a query sees at least itself, so it must be 1 or more")
    if any(q1 - q0 > k1 - k0 for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
        raise ValueError(f"a document has more queries than keys: boundaries {cu_q} and {cu_k}")


def packed_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: list[int],
    *,
    cu_seqlens_k: list[int] | None = None,
    shared_prefixes: SharedPrefixes = (),
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document of a packed sequence; returns (T, H, D).

    `cu_seqlens`: boundaries of the documents in q; `cu_seqlens_k`: in k and v (default: the same). `shared_prefixes`
    (without `cu_seqlens_k`): for each document (start, n), the n tokens of an earlier document, from `start` on, whose
    keys and values precede its own. Raises ValueError if these do not fit the tensors, if a document has more queries
    than keys, if shapes, devices or dtypes do not fit, or if the Triton kernels cannot take the head_dim."""
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    _check(q_THD, k_TKD, v_TKD, cu_seqlens, cu_k, window)
    if shared_prefixes:
        _check_prefixes(shared_prefixes, cu_seqlens, cu_seqlens_k)
    on_gpu = use_triton(q_THD, k_TKD, v_TKD)
    if on_gpu and q_THD.shape[2] > WIDEST_HEAD:
        shapes = f"queries {tuple(q_THD.shape)}, keys {tuple(k_TKD.shape)} and values {tuple(v_TKD.shape)}"
        raise ValueError(f"{shapes}: the kernels take a head_dim of at most {WIDEST_HEAD}")
    longest = max([0, *(b - a + size for (a, b), (_, size) in _documents(cu_k, shared_prefixes))])
    if q_THD.device.type == "cpu" and not on_gpu and cu_seqlens == cu_k and (window is None or window >= longest):
        return _CpuAttention.apply(q_THD, k_TKD, v_TKD, cu_seqlens, shared_prefixes)
    if shared_prefixes:
        k_TKD, v_TKD = (_CopyPrefixes.apply(x, cu_seqlens, shared_prefixes) for x in (k_TKD, v_TKD))
        lengths = zip(pairwise(cu_k), shared_prefixes, strict=True)
        cu_k = [0, *accumulate((b - a + n) * (b > a) for (a, b), (_, n) in lengths)]
    if on_gpu:
        return flash_attention.op(q_THD, k_TKD, v_TKD, cu_seqlens, cu_k, window or 0)[0]
    return _masked_attention(q_THD, k_TKD, v_TKD, cu_seqlens, cu_k, window)


def _masked_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_q: list[int], cu_k: list[int], window: int | None
) -> Tensor:
    """One call of torch's attention per document, with a mask where a window or a prefix requires one."""
    outs = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        if q1 == q0:
            continue
        q_HtD, k_KtD, v_KtD = (x.transpose(0, 1) for x in (q_THD[q0:q1], k_TKD[k0:k1], v_TKD[k0:k1]))
        causal = q1 - q0 == k1 - k0 and (window is None or window >= k1 - k0)
        out_HtD = scaled_dot_product_attention(
            q_HtD[None],
            k_KtD[None],
            v_KtD[None],
            attn_mask=None if causal else causal_mask(q1 - q0, k1 - k0, window, q_THD.device),
            is_causal=causal,
            enable_gqa=q_THD.shape[1] != k_TKD.shape[1],
        )[0]
        outs.append(out_HtD.transpose(0, 1))
    return torch.cat(outs) if outs else torch.empty_like(q_THD)
