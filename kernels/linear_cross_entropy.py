r"""Cross-entropy of a linear head without the (T, V) logits: chunk by chunk, over the trained tokens only.

For a hidden state h with weight a and target t, and logits l = h E^T (E the head, (V, H)):

    loss = a (logsumexp(l) - l_t)        dl = a (softmax(l) - onehot(t))        dh = dl E        dE += dl^T h

dh is formed in the forward pass, while the chunk's logits exist; the backward pass only scales it. A frozen head gets
no dE. Tokens without a target are dropped before the first product, so they cost nothing. The products are left to
cuBLAS; between them one kernel reads a chunk's logits twice (once for the sum, once to overwrite them with dl), with
float32 statistics. The caller gives the divisor: the number of trained tokens of the whole optimizer step, of which
this call may see a part. The kernel multiplies dl by it while that is float32, but for a power of two, by which the
result is multiplied without rounding: 1 / divisor as a whole would push small dl below what float16 can hold.

Shapes: T tokens, N trained tokens, n trained tokens of a chunk, H hidden_size, V vocabulary.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ptst.kernels.dispatch import check_alike, check_frozen, check_integers, jit, tl, use_triton
from ptst.kernels.operators import operator

CHUNK_ELEMENTS = 1 << 24  # logits in memory at once on a CPU (64 MB in float32)
CHUNK_BYTES = 256 << 20  # and on a GPU
CHUNK_ROWS = 1024  # on a GPU a chunk is a multiple of this: whole waves of the products' tiles on 132 processors
BLOCK = 4096


@jit
def _softmax_gradient(
    logits, targets, weights, losses, V, scale, WEIGHTED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """losses, and with GRAD the logits overwritten by `scale` times their gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * V
    v = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    valid = (target >= 0) & (target < V)
    # A target outside the vocabulary reads nothing and makes the loss NaN, which stops training.
    chosen = tl.load(start + target, mask=valid, other=0.0).to(tl.float32)
    # Online softmax: a block's maximum and sum of exponentials are merged with those of the blocks before it.
    running_max = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for at in range(0, V, BLOCK):
        l = tl.load(start + at + v, mask=at + v < V, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(running_max, tl.max(l, axis=0))
        total = total * tl.exp(running_max - new_max) + tl.sum(tl.exp(l - new_max), axis=0)
        running_max = new_max
    lse = running_max + tl.log(total)
    weight = tl.load(weights + row).to(tl.float32) if WEIGHTED else 1.0
    loss = tl.where(valid, weight * (lse - chosen), float("nan"))
    if GRAD:
        tl.debug_barrier()  # no warp may overwrite a logit that another has yet to read
        for at in range(0, V, BLOCK):
            inside = at + v < V
            l = tl.load(start + at + v, mask=inside, other=float("-inf")).to(tl.float32)
            d = weight * scale * (tl.exp(l - lse) - tl.where(at + v == target, 1.0, 0.0))
            tl.store(start + at + v, d.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + row, loss)


def _losses(
    logits_nV: Tensor, targets_n: Tensor, weights_n: Tensor | None, grad: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(losses (n,), `scale` dl (n, V) in the logits' dtype); the logits are overwritten, and dl is meaningless without
    `grad`."""
    if not use_triton(logits_nV):
        V, targets_n = logits_nV.shape[1], targets_n.long()
        if targets_n.device.type == "cpu" and bool(((targets_n < 0) | (targets_n >= V)).any()):
            given = f"{int(targets_n.min())} to {int(targets_n.max())}"
            raise ValueError(f"targets of trained tokens are {given}; the head has {V} rows")
        wide_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        # In place throughout, and one exponential for both the sum and the gradient.
        wide_nV.sub_(wide_nV.amax(dim=1, keepdim=True))
        chosen_n = wide_nV.gather(1, targets_n[:, None]).squeeze(1)
        total_n = wide_nV.exp_().sum(dim=1)
        losses_n = total_n.log() - chosen_n
        if grad:
            wide_nV.div_(total_n[:, None])
            wide_nV[torch.arange(len(targets_n), device=wide_nV.device), targets_n] -= 1
        if weights_n is not None:
            losses_n = losses_n * weights_n
            wide_nV.mul_(weights_n[:, None])
        if scale != 1:
            wide_nV.mul_(scale)
        return losses_n, wide_nV.to(logits_nV.dtype)
    losses_n = torch.empty(len(targets_n), dtype=torch.float32, device=logits_nV.device)
    _softmax_gradient[(len(targets_n),)](
        *(logits_nV, targets_n, targets_n if weights_n is None else weights_n, losses_n, logits_nV.shape[1], scale),
        WEIGHTED=weights_n is not None, GRAD=grad, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return losses_n, logits_nV


def _chunk(hidden_TH: Tensor, head_VH: Tensor) -> int:
    """Trained tokens whose logits are in memory at once; on a GPU at least CHUNK_ROWS."""
    V = head_VH.shape[0]
    if not hidden_TH.is_cuda:
        return max(1, CHUNK_ELEMENTS // V)
    return max(1, CHUNK_BYTES // (V * hidden_TH.element_size() * CHUNK_ROWS)) * CHUNK_ROWS


@lru_cache(16)
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of `dtype` to a float32 matrix, unrounded (torch after pytorch#167931; it once
    took the sum in half precision only, and left an `out` unread). Tried once on small matrices."""
    a, b, total = torch.full((16, 16), 1 / 3), torch.full((16, 16), 3.0), torch.full((16, 16), 1 / 7)
    a, b, total = a.to(device, dtype), b.to(device, dtype), total.to(device)
    exact = total.double() + a.double() @ b.double()
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total.double() - exact).abs().max() < 1e-4)  # rounded to half precision it would be 0.008 or more


def _add_product(total_VH: Tensor, a_Vn: Tensor, b_nH: Tensor) -> None:
    """total += a b; total is float32 or wider. A product of its own is rounded to a's dtype, written and read again."""
    if a_Vn.is_cuda and total_VH.dtype != a_Vn.dtype and _adds_in_float32(a_Vn.device, a_Vn.dtype):
        torch.addmm(total_VH, a_Vn, b_nH, out_dtype=torch.float32, out=total_VH)
    else:
        total_VH += a_Vn @ b_nH


@operator("linear_cross_entropy")
def _op(
    hidden_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None,
    trained_N: Tensor,
    need_hidden: bool,
    need_head: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` times (summed loss, dH (T, H), dE (V, H)), the gradients empty unless needed."""
    chunk = _chunk(hidden_TH, head_VH)
    total, dh_TH, de_VH = _zeros(hidden_TH, head_VH, targets_T, weights_T, trained_N, need_hidden, need_head, scale)
    for trained_n in trained_N.split(chunk) if len(trained_N) else ():
        h_nH, targets_n = hidden_TH[trained_n], targets_T[trained_n]
        weights_n = None if weights_T is None else weights_T[trained_n]
        losses_n, dl_nV = _losses(h_nH @ head_VH.t(), targets_n, weights_n, need_hidden or need_head, scale)
        total += losses_n.sum(dtype=torch.float64)
        if need_hidden:
            dh_TH[trained_n] = dl_nV @ head_VH
        if need_head:
            _add_product(de_VH, dl_nV.t(), h_nH)
    return total.mul_(scale), dh_TH, de_VH


@_op.register_fake
def _zeros(hidden_TH, head_VH, targets_T, weights_T, trained_N, need_hidden, need_head, scale):
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    dh_TH = torch.zeros_like(hidden_TH) if need_hidden else hidden_TH.new_empty(0)
    de_VH = torch.zeros_like(head_VH, dtype=wide) if need_head else head_VH.new_empty(0, dtype=wide)
    # Summed in float64: the chunk size must not change the reported loss.
    return hidden_TH.new_zeros((), dtype=torch.float64), dh_TH, de_VH


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.head_dtype = inputs[1].dtype
    ctx.needed = inputs[5:7]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dtotal, _dh, _de):
    dh_TH, de_VH = ctx.saved_tensors
    need_hidden, need_head = ctx.needed
    dh = dh_TH * dtotal.to(dh_TH.dtype) if need_hidden else None
    de = (de_VH * dtotal.to(de_VH.dtype)).to(ctx.head_dtype) if need_head else None
    return dh, de, *[None] * 6


_op.register_autograd(_differentiate, setup_context=_setup)


def linear_cross_entropy(
    hidden_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    divisor: float,
    weights_T: Tensor | None = None,
    trained_N: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of the tokens with a target, divided by `divisor`: a float32 scalar (float64 for float64).

    hidden_TH (T, H), head_VH (V, H), targets_T (T,) with -1 for a token that is not trained; `weights_T` (T,)
    multiplies the tokens' losses. `trained_N`: indices of the trained tokens; without them the host waits for the
    device to count them. Gradients go to whichever of hidden and head requires one. Raises ValueError if the divisor is
    not positive or shapes, devices or dtypes do not fit. On a GPU a target outside the vocabulary makes the loss NaN.
    """
    if not 0 < divisor < math.inf:
        raise ValueError(f"the divisor is {divisor}; it is the number of trained tokens and must be positive")
    if trained_N is None:
        trained_N = (targets_T >= 0).nonzero().squeeze(1)
    _check(hidden_TH, head_VH, targets_T, trained_N)
    check_frozen(weights=weights_T)
    if weights_T is not None and (weights_T.shape, weights_T.device) != (targets_T.shape, targets_T.device):
        weights = f"weights {tuple(weights_T.shape)} on {weights_T.device}"
        raise ValueError(f"{weights} must be one per token, {tuple(targets_T.shape)} on {targets_T.device}")
    need = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_TH, head_VH)]
    inputs = hidden_TH, head_VH, targets_T, weights_T, trained_N, *need
    dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
    if use_triton(hidden_TH, head_VH):
        mantissa, exponent = math.frexp(1 / divisor)
        return (_op(*inputs, mantissa)[0] * 2.0**exponent).to(dtype)
    return (_op(*inputs, 1.0)[0] / divisor).to(dtype)


def _check(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, trained_N: Tensor) -> None:
    fits = len(head_VH) > 0 and hidden_TH.dim() == head_VH.dim() == 2 and hidden_TH.shape[1] == head_VH.shape[1]
    if not fits or targets_T.shape != hidden_TH.shape[:1] or trained_N.dim() != 1:
        hidden = f"hidden {tuple(hidden_TH.shape)}, head {tuple(head_VH.shape)}"
        targets = f"targets {tuple(targets_T.shape)}, indices of the trained tokens {tuple(trained_N.shape)}"
        raise ValueError(f"shapes do not fit: {hidden}, {targets}")
    check_alike(hidden=hidden_TH, head=head_VH)
    check_integers(hidden_TH.device, targets=targets_T, trained=trained_N)


@torch.no_grad()
def linear_log_probabilities(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, trained_N: Tensor) -> Tensor:
    """The log-probability (nats) of each trained token's target, (N,) in float32 (float64 for float64), without a
    gradient. Arguments and errors as those of `linear_cross_entropy`; a chunk's logits are in memory at a time."""
    _check(hidden_TH, head_VH, targets_T, trained_N)
    parts = [hidden_TH.new_empty(0, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))]
    for trained_n in trained_N.split(_chunk(hidden_TH, head_VH)) if len(trained_N) else ():
        logits_nV = hidden_TH[trained_n] @ head_VH.t()
        parts.append(-_losses(logits_nV, targets_T[trained_n], None, grad=False)[0])
    return torch.cat(parts)
