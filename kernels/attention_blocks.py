r"""Attention of one new token per request over a cache in blocks, on a CPU, without collecting the blocks.

Decoding reads the cache and does little else. Collecting each request's blocks into one row would read it, write it and
read it again. Here the allocation itself is the batch: every block at its front is multiplied with the queries of the
request that owns it, in one batched product; what is moved is only scores, 1/D of the keys. A softmax over each
request's scores, in their order, and a second product, summed over each request's blocks, complete it:

    s_b = q_owner(b) K_b^T      p_r = softmax over the request's own s_b      o_r = sum_b p_b V_b.

Blocks that several requests begin with have no single owner. Their keys are read once for all of these requests: with
one matrix product for each group.

Shapes: R requests, H query heads, K key/value heads, G = H / K, D head_dim, B blocks of P tokens, N blocks per request
at most, M members of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import check_alike


@dataclass(frozen=True)
class BlockPlan:
    """Where the blocks of each request lie. The same for every layer of a step.

    `table_RN`: a request's own blocks at their places in its list, 0 where it has none or where the block is shared.
    `owner_B`: whose block it is (any request for a block that is nobody's). `groups`: (rows (M,), shared blocks (n,))
    for the requests whose lists begin with these blocks. `bias_RL`: -inf at the places of its N P that a request does
    not see, else 0. `scores_at` (R H N,): which rows of the blocks' scores (B H,) make up the requests'; `weights_at`
    (B H,): the way back.
    """

    table_RN: Tensor
    owner_B: Tensor
    scores_at: Tensor
    weights_at: Tensor
    bias_RL: Tensor
    groups: tuple[tuple[Tensor | slice, Tensor], ...]


def plan_blocks(
    blocks: Sequence[Sequence[int]],
    shared: Sequence[int],
    lengths: Sequence[int],
    num_heads: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> BlockPlan:
    """`blocks[r]` are the blocks of request r, of which the first `shared[r]` belong to others too; `lengths[r]` (>= 1)
    counts the tokens it looks at, the newest included. Block 0 is nobody's."""
    R, N, H = len(blocks), max(map(len, blocks)), num_heads
    own = [[0] * n + list(b[n:]) + [0] * (N - len(b)) for b, n in zip(blocks, shared, strict=True)]
    table_RN = torch.tensor(own)
    B = int(table_RN.max()) + 1
    owner_B, place_B = torch.zeros(B, dtype=torch.long), torch.zeros(B, dtype=torch.long)
    row_RN = torch.arange(R)[:, None].expand(R, N)
    owner_B[table_RN] = row_RN
    place_B[table_RN] = torch.arange(N).expand(R, N)
    h_H = torch.arange(H)
    members: dict[tuple[int, ...], list[int]] = {}
    for r, (b, n) in enumerate(zip(blocks, shared, strict=True)):
        if n:
            members.setdefault(tuple(b[:n]), []).append(r)
    age_RL = torch.tensor(lengths)[:, None] - 1 - torch.arange(N * block_size)
    hidden_RL = age_RL < 0
    if window is not None:
        hidden_RL |= age_RL >= window
    return BlockPlan(
        table_RN,
        owner_B,
        (table_RN[:, None] * H + h_H[None, :, None]).flatten(),
        ((owner_B[:, None] * H + h_H) * N + place_B[:, None]).flatten(),
        torch.zeros(hidden_RL.shape, dtype=dtype).masked_fill_(hidden_RL, -math.inf),
        # Where all share, a slice: no copies.
        tuple((torch.tensor(m) if len(m) < R else slice(None), torch.tensor(b)) for b, m in members.items()),
    )


def blocks_attention(q_RHD: Tensor, k_BKPD: Tensor, v_BKPD: Tensor, plan: BlockPlan) -> Tensor:
    """Attention (R, H, D) of each request's newest token with the cached ones, itself included. Without a gradient.

    Raises ValueError for shapes or dtypes that do not fit; the plan must have been made for these requests.
    """
    (R, H, D), (_, K, P, _) = q_RHD.shape, k_BKPD.shape
    if k_BKPD.shape != v_BKPD.shape or k_BKPD.shape[3] != D or H % K or len(plan.table_RN) != R:
        raise ValueError(
            f"queries {tuple(q_RHD.shape)} do not fit keys {tuple(k_BKPD.shape)}, values {tuple(v_BKPD.shape)} and a "
            f"plan for {len(plan.table_RN)} requests"
        )
    check_alike(q=q_RHD, k=k_BKPD, v=v_BKPD)
    B, N = len(plan.owner_B), plan.table_RN.shape[1]
    # The query heads of a group stand side by side: a matrix of G queries over one set of keys.
    q_RKGD = q_RHD.unflatten(1, (K, H // K)) * (1 / math.sqrt(D))
    scores_BKGP = q_RKGD.index_select(0, plan.owner_B) @ k_BKPD[:B].transpose(2, 3)
    scores_BKGP[0] = 0  # the owner of nobody's block may be a row that is not a number
    scores_RHNP = scores_BKGP.view(B * H, P).index_select(0, plan.scores_at).view(R, H, N, P)
    for rows_M, blocks_n in plan.groups:
        n = len(blocks_n)
        k_KLD = k_BKPD.index_select(0, blocks_n).transpose(0, 1).reshape(K, n * P, D)
        q_KmD = q_RKGD[rows_M].transpose(0, 1).reshape(K, -1, D)
        shared_KMGnP = (q_KmD @ k_KLD.transpose(1, 2)).view(K, -1, H // K, n, P)
        scores_RHNP[rows_M, :, :n] = shared_KMGnP.transpose(0, 1).flatten(1, 2)
    weights_RHL = scores_RHNP.view(R, H, N * P).add_(plan.bias_RL[:, None]).softmax(-1)
    weights_RHNP = weights_RHL.view(R, H, N, P)
    weights_BKGP = weights_RHL.view(R * H * N, P).index_select(0, plan.weights_at).view(B, K, H // K, P)
    out_BE = (weights_BKGP @ v_BKPD[:B]).view(B, H * D)
    out_BE[0] = 0
    out_RHD = out_BE.index_select(0, plan.table_RN.view(-1)).view(R, N, H, D).sum(1)
    for rows_M, blocks_n in plan.groups:
        n = len(blocks_n)
        v_KLD = v_BKPD.index_select(0, blocks_n).transpose(0, 1).reshape(K, n * P, D)
        p_KmL = weights_RHNP[rows_M, :, :n].unflatten(1, (K, H // K)).transpose(0, 1).reshape(K, -1, n * P)
        out_RHD[rows_M] += (p_KmL @ v_KLD).view(K, -1, H // K, D).transpose(0, 1).flatten(1, 2)
    return out_RHD
