r"""Sampling from the kept tokens of a distribution, by top-k and top-p, without sorting it on a GPU.

Of the k likeliest tokens, sorted, the j-th is kept if those before it hold less than `top_p` of what the k hold
together (Holtzman et al. 2020, arXiv 1904.09751); tokens as likely as the last one kept are kept as well. With S(t) and
G(t) the sum and the number of probabilities above t:

    least kept = max(v, smallest t with S(t) < top_p total)        v = smallest t with G(t) < k
    total = S(v) + (k - G(v)) v        token = first i with sum of kept p_0 .. p_i > uniform * sum of kept p

In the kernel a program takes a row and finds both by bisection over the bits of the probabilities, which are in the
order of their values; after each pass the interval ends at values that occur, so that it is empty after 31 passes at
most. Sums are whole numbers of 2^-61: exact for probabilities above 2^-38, and the same in any order.

Shapes: M rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, check_alike, jit, tl, use_triton
from ptst.kernels.transfer import to_device

BLOCK = 8192  # probabilities that a program reads at once
SHORT = 512  # probabilities sorted first on a CPU; all are sorted where these do not reach top_p


@jit
def _parts(p, at, V, BLOCK: tl.constexpr):
    """Bits and shares, in units of 2^-61, of the probabilities from `at` on; -1 and 0 beyond the last one, and for what
    is not a number."""
    i = at + tl.arange(0, BLOCK)
    x = tl.load(p + i, mask=i < V, other=-1.0)
    inside = x >= 0
    x = tl.where(inside, x, 0.0)
    bits = tl.where(inside, x.to(tl.int32, bitcast=True), -1)
    return bits, (x * 2305843009213693952.0).to(tl.int64)


@jit
def _above(p, V, bound, BLOCK: tl.constexpr):
    """Of the probabilities whose bits are above `bound` their number and sum; the largest bits that are not, and the
    smallest that are."""
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int64)
    below = tl.full([BLOCK], -1, tl.int32)
    over = tl.full([BLOCK], 2147483647, tl.int32)
    for at in range(0, V, BLOCK):
        bits, share = _parts(p, at, V, BLOCK)
        is_above = bits > bound
        count += is_above.to(tl.int32)
        total += tl.where(is_above, share, 0)
        below = tl.maximum(below, tl.where(is_above, -1, bits))
        over = tl.minimum(over, tl.where(is_above, bits, 2147483647))
    return tl.sum(count, axis=0), tl.sum(total, axis=0), tl.max(below, axis=0), tl.min(over, axis=0)


@jit
def _smallest(p, V, low, high, most, target, BLOCK: tl.constexpr):
    """The smallest bits t of `low` to `high` with fewer than `most` probabilities above, and `target` of their sum."""
    while low < high:
        bound = low + (high - low) // 2
        count, total, below, over = _above(p, V, bound, BLOCK)
        if (count < most) & (total.to(tl.float64) < target):
            high = tl.maximum(low, below)
        else:
            low = tl.minimum(high, over)
    return low


@jit
def _sample(p, top_k, top_p, uniforms, tokens, least, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p += row * stride
    most = tl.load(top_k + row)
    part = tl.load(top_p + row)
    kept = tl.full([], 0, tl.int32)
    highest = tl.full([], 1073741823, tl.int32)  # above those of 1
    if most < V:
        kept = _smallest(p, V, kept, highest, most, tl.full([], 1e300, tl.float64), BLOCK)
    if part < 1:
        count, total, _, _ = _above(p, V, tl.where(most < V, kept, -1), BLOCK)
        if most < V:
            last = (kept.to(tl.float32, bitcast=True) * 2305843009213693952.0).to(tl.int64)
            total += (most - count).to(tl.int64) * last
        kept = _smallest(p, V, kept, highest, V + 1, part * total.to(tl.float64), BLOCK)
    tl.store(least + row, kept.to(tl.float32, bitcast=True))
    _, total, _, _ = _above(p, V, kept - 1, BLOCK)
    wanted = tl.load(uniforms + row) * total.to(tl.float64)
    before = tl.full([], 0, tl.int64)
    token = tl.full([], 0, tl.int32) + V
    at = tl.full([], 0, tl.int32)
    while (at < V) & (token >= V):
        bits, share = _parts(p, at, V, BLOCK)
        share = tl.where(bits >= kept, share, 0)
        reached = (before + tl.cumsum(share, axis=0)).to(tl.float64) > wanted
        token = tl.min(tl.where(reached, at + tl.arange(0, BLOCK), V), axis=0)
        before += tl.sum(share, axis=0)
        at += BLOCK
    tl.store(tokens + row, tl.minimum(token, V - 1).to(tl.int64))


def launch(p_MV: Tensor, top_k_M: Tensor, limits_2M: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens (M,), least kept (M,), 0 for a row without a limit) of int32 `top_k` and float64 (top_p, uniforms)."""
    M, V = p_MV.shape
    tokens_M, least_M = p_MV.new_empty(M, dtype=torch.long), p_MV.new_empty(M)
    size = max(128, block(V, BLOCK))
    if M:
        _sample[(M,)](
            *(p_MV, top_k_M, *limits_2M, tokens_M, least_M, p_MV.stride(0), V),
            BLOCK=size, num_warps=min(16, max(1, size // 512)),
        )  # fmt: skip
    return tokens_M, least_M


def _at_most(V: int, top_k: Sequence[int]) -> list[int]:
    return [min(k or V, V) for k in top_k]


def _plain(p_MV: Tensor, top_k: Sequence[int], top_p: Sequence[float], uniforms: Sequence[float]) -> Tensor:
    """`sample_kept` in plain torch."""
    V, device = p_MV.shape[1], p_MV.device
    if any(top_k) or any(p < 1 for p in top_p):
        top_k_M1, top_p_M1 = to_device(_at_most(V, top_k), device, torch.long), to_device(top_p, device, torch.float64)
        p_MV = p_MV.masked_fill(p_MV < _least_kept(p_MV, top_k_M1[:, None], top_p_M1[:, None]), 0)
    # Inverse transform sampling over the cumulative probabilities in the order of ids: probabilities that differ in the
    # last digit (another batch size) then almost always give the same token.
    cumulated_MV = p_MV.double().cumsum(-1)
    wanted_M1 = to_device(uniforms, device, torch.float64)[:, None] * cumulated_MV[:, -1:]
    return torch.searchsorted(cumulated_MV, wanted_M1, right=True).squeeze(1).clamp_(max=V - 1)


def _least_kept(p_MV: Tensor, top_k_M1: Tensor, top_p_M1: Tensor) -> Tensor:
    """The smallest probability (M, 1) that is kept; others equal to it are kept as well.

    Of the k largest, sorted, the j-th is kept if those before it hold less than `top_p` of what the k hold together
    (Holtzman et al. 2020)."""
    V = p_MV.shape[1]
    short = V
    if p_MV.device.type == "cpu":  # sorting everything takes longer than a small model's whole step
        short = min(V, SHORT)
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


def sample_kept(p_MV: Tensor, top_k: Sequence[int], top_p: Sequence[float], uniforms: Sequence[float]) -> Tensor:
    """One token id (M,) for each row of probabilities, float32, which add up to 1, drawn from the tokens that `top_k`
    (0: all) and `top_p` (above 0 and at most 1) keep, by inverse transform in the order of ids. `uniforms` lie in
    [0, 1). Raises ValueError if shapes, dtypes or numbers do not fit."""
    if p_MV.dim() != 2 or p_MV.dtype != torch.float32 or not p_MV.shape[1]:
        raise ValueError(f"p {tuple(p_MV.shape)} {p_MV.dtype} must be (M, V), float32, with a token at least")
    check_alike(p=p_MV)
    for name, values, fits in (
        ("top_k", top_k, all(k >= 0 for k in top_k)),
        ("top_p", top_p, all(0 < x <= 1 for x in top_p)),
        ("uniforms", uniforms, all(0 <= u < 1 for u in uniforms)),
    ):
        if len(values) != len(p_MV) or not fits:
            shape = tuple(p_MV.shape)
            raise ValueError(f"{name} {list(values)} must have a number in its range for each row of p {shape}")
    if not use_triton(p_MV):
        return _plain(p_MV, top_k, top_p, uniforms)
    limits_2M = to_device([list(top_p), list(uniforms)], p_MV.device, torch.float64)
    top_k_M = to_device(_at_most(p_MV.shape[1], top_k), p_MV.device, torch.int32)
    return launch(p_MV, top_k_M, limits_2M)[0]
