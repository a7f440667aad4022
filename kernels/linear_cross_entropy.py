r"""Cross-entropy of a linear head without the (T, V) logits: chunk by chunk, over the trained tokens only.

For a hidden state h with weight a and target t, and logits l = h E^T (E the head, (V, H)):

    loss = a (logsumexp(l) - l_t)        dl = a (softmax(l) - onehot(t))        dh = dl E        dE += dl^T h

dh is formed in the forward pass, while the chunk's logits exist; the backward pass only scales it. A frozen head gets
no dE. Tokens without a target are dropped before the first product, so they cost nothing. The products are left to
cuBLAS; between them one kernel reads a chunk's logits twice (once for the sum, once to overwrite them with dl), with
float32 statistics. The caller gives the divisor: the number of trained tokens of the whole optimizer step, of which
this call may see a part.

Shapes: T tokens, N trained tokens, n trained tokens of a chunk, H hidden_size, V vocabulary.
"""

import torch
from torch import Tensor

from ptst.kernels.dispatch import check_alike, jit, tl, use_triton

CHUNK_ELEMENTS = 1 << 24  # logits in memory at once on a CPU (64 MB in float32)
CHUNK_BYTES = 256 << 20  # and on a GPU
BLOCK = 4096


@jit
def _softmax_gradient(
    logits, targets, weights, losses, V, WEIGHTED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
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
            d = weight * (tl.exp(l - lse) - tl.where(at + v == target, 1.0, 0.0))
            tl.store(start + at + v, d.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + row, loss)


def _losses(logits_nV: Tensor, targets_n: Tensor, weights_n: Tensor | None, grad: bool) -> tuple[Tensor, Tensor]:
    """(losses (n,), dl (n, V) in the logits' dtype); the logits are overwritten, and dl is meaningless without
    `grad`."""
    if not use_triton(logits_nV):
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
        return losses_n, wide_nV.to(logits_nV.dtype)
    losses_n = torch.empty(len(targets_n), dtype=torch.float32, device=logits_nV.device)
    _softmax_gradient[(len(targets_n),)](
        *(logits_nV, targets_n, targets_n if weights_n is None else weights_n, losses_n, logits_nV.shape[1]),
        WEIGHTED=weights_n is not None, GRAD=grad, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return losses_n, logits_nV


def _chunk(hidden_TH: Tensor, head_VH: Tensor) -> int:
    """Trained tokens whose logits are in memory at once."""
    V = head_VH.shape[0]
    return max(1, CHUNK_BYTES // (V * hidden_TH.element_size()) if hidden_TH.is_cuda else CHUNK_ELEMENTS // V)


@torch.library.custom_op("ptst::linear_cross_entropy", mutates_args=())
def _op(
    hidden_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None,
    trained_N: Tensor,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, dH (T, H), dE (V, H)), the gradients empty unless needed."""
    chunk = _chunk(hidden_TH, head_VH)
    total, dh_TH, de_VH = _zeros(hidden_TH, head_VH, targets_T, weights_T, trained_N, need_hidden, need_head)
    for trained_n in trained_N.split(chunk) if len(trained_N) else ():
        h_nH, targets_n = hidden_TH[trained_n], targets_T[trained_n]
        weights_n = None if weights_T is None else weights_T[trained_n]
        losses_n, dl_nV = _losses(h_nH @ head_VH.t(), targets_n, weights_n, need_hidden or need_head)
        total += losses_n.sum(dtype=torch.float64)
        if need_hidden:
            dh_TH[trained_n] = dl_nV @ head_VH
        if need_head:
            de_VH += dl_nV.t() @ h_nH
    return total, dh_TH, de_VH


@_op.register_fake
def _zeros(hidden_TH, head_VH, targets_T, weights_T, trained_N, need_hidden, need_head):
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    dh_TH = torch.zeros_like(hidden_TH) if need_hidden else hidden_TH.new_empty(0)
    de_VH = torch.zeros_like(head_VH, dtype=wide) if need_head else head_VH.new_empty(0, dtype=wide)
    # Summed in float64: the chunk size must not change the reported loss.
    return hidden_TH.new_zeros((), dtype=torch.float64), dh_TH, de_VH


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.head_dtype = inputs[1].dtype
    ctx.needed = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dtotal, _dh, _de):
    dh_TH, de_VH = ctx.saved_tensors
    need_hidden, need_head = ctx.needed
    dh = dh_TH * dtotal.to(dh_TH.dtype) if need_hidden else None
    de = (de_VH * dtotal.to(de_VH.dtype)).to(ctx.head_dtype) if need_head else None
    return dh, de, None, None, None, None, None


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
    if not divisor > 0:
        raise ValueError(f"the divisor is {divisor}; it is the number of trained tokens and must be positive")
    fits = hidden_TH.dim() == head_VH.dim() == 2 and hidden_TH.shape[1] == head_VH.shape[1]
    if not fits or targets_T.shape != hidden_TH.shape[:1] or targets_T.device != hidden_TH.device:
        hidden = f"hidden {tuple(hidden_TH.shape)} on {hidden_TH.device}, head {tuple(head_VH.shape)}"
        targets = f"targets {tuple(targets_T.shape)} on {targets_T.device}"
        raise ValueError(f"shapes or devices do not fit: {hidden}, {targets}")
    check_alike(hidden=hidden_TH, head=head_VH)
    if weights_T is not None and weights_T.shape != targets_T.shape:
        raise ValueError(f"weights {tuple(weights_T.shape)} must be one per token, {tuple(targets_T.shape)}")
    if trained_N is None:
        trained_N = (targets_T >= 0).nonzero().squeeze(1)
    need = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_TH, head_VH)]
    total, _, _ = _op(hidden_TH, head_VH, targets_T, weights_T, trained_N, *need)
    return (total / divisor).to(torch.promote_types(hidden_TH.dtype, torch.float32))


@torch.no_grad()
def linear_log_probabilities(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, trained_N: Tensor) -> Tensor:
    """The log-probability (nats) of each trained token's target, (N,) in float32 (float64 for float64), without a
    gradient. Arguments as those of `linear_cross_entropy`; a chunk's logits are in memory at a time."""
    check_alike(hidden=hidden_TH, head=head_VH)
    parts = [hidden_TH.new_empty(0, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))]
    for trained_n in trained_N.split(_chunk(hidden_TH, head_VH)) if len(trained_N) else ():
        logits_nV = hidden_TH[trained_n] @ head_VH.t()
        parts.append(-_losses(logits_nV, targets_T[trained_n], None, grad=False)[0])
    return torch.cat(parts)
