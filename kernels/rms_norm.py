r"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), statistics in float32, optionally after a residual addition.

With r = 1 / sqrt(mean(x^2) + eps) and n = x r:

    y = w n        g = w dy        dx = r (g - n mean(g n))        dw = sum over rows of dy n

The forward pass keeps r, one float32 per token; n is recomputed. For a frozen weight dw is never formed. dw is summed
in a fixed order: each program adds up its own tokens, and the programs' sums are added at the end. The residual form
returns (norm(x + residual), x + residual), so that the sum is written once and read once.

Shapes: T tokens, H hidden_size (the width that is normalized).
"""

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, check_alike, jit, processors, tl, use_triton, whole_block
from ptst.kernels.operators import operator

WIDEST = 16384  # a token is one block
WIDEST_DW = 8192  # tokens whose weight, partial dw and gradients one program has registers for
COLUMNS = 2048  # of dw per program, for wider ones
# Warps of the backward pass with dw on each processor, whose programs each have one partial sum of dw; without dw there
# is a program per token.
WARPS = 16
PIPELINED = 64 * 1024  # bytes of later tokens that a program with dw copies meanwhile, at most
PROGRAMS: int | None = None  # set by tests


def _plain(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, r) in plain torch."""
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    r_T1 = torch.linalg.vector_norm(wide_TH, dim=1, keepdim=True).square_().div_(x_TH.shape[1]).add_(eps).rsqrt_()
    return (wide_TH * r_T1).mul_(weight_H).to(x_TH.dtype), r_T1.squeeze(1)


def _plain_backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, r_T: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    r_T1, x_TH = r_T[:, None], x_TH.to(r_T.dtype)
    g_TH = dy_TH * weight_H.to(r_T.dtype)
    coefficient_T1 = torch.linalg.vecdot(g_TH, x_TH)[:, None] * r_T1.pow(3).div_(-x_TH.shape[1])
    dw_H = (dy_TH * x_TH).mul_(r_T1).sum(0).to(weight_H.dtype) if need_dw else weight_H.new_empty(0)
    return g_TH.mul_(r_T1).addcmul_(x_TH, coefficient_T1).to(dy_TH.dtype), dw_H


@jit
def _forward(x, residual, w, y, total, r, stride, H, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < H
    a = tl.load(x + row * stride + h, mask=inside, other=0.0)
    if ADD:
        # Rounded to the stored dtype first, so that the sum read later is the one normalized here.
        a = (a.to(tl.float32) + tl.load(residual + row * H + h, mask=inside, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty
        )
        tl.store(total + row * H + h, a, mask=inside)
    a = a.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(a * a, axis=0) / H + eps)
    tl.store(r + row, rstd)
    scaled = a * rstd * tl.load(w + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * H + h, scaled.to(y.dtype.element_ty), mask=inside)


@jit
def _row_gradient(dy, x, weight, r, dtotal, dx, stride, row, h, inside, H, ADD: tl.constexpr):
    """Writes dx of one token; returns its share of dw."""
    d = tl.load(dy + row * H + h, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(x + row * stride + h, mask=inside, other=0.0).to(tl.float32)
    if ADD:  # before the reduction, so that it arrives meanwhile
        added = tl.load(dtotal + row * H + h, mask=inside, other=0.0)
    rstd = tl.load(r + row)
    n = n * rstd
    g = d * weight
    out = rstd * (g - n * (tl.sum(g * n, axis=0) / H))
    if ADD:
        out += added.to(tl.float32)
    tl.store(dx + row * H + h, out.to(dx.dtype.element_ty), mask=inside)
    return d * n


@jit
def _backward(dy, x, w, r, dtotal, dx, dw, stride, T, H,
              ADD: tl.constexpr, DW: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One token per program; with dw each program adds up its tokens, and copies the next ones meanwhile."""
    program = tl.program_id(0)
    h = tl.arange(0, BLOCK)
    inside = h < H
    weight = tl.load(w + h, mask=inside, other=0.0).to(tl.float32)
    if DW:
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for number in tl.range(program, T, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(number, tl.int64)
            sums += _row_gradient(dy, x, weight, r, dtotal, dx, stride, row, h, inside, H, ADD)
        tl.store(dw + program * H + h, sums, mask=inside)
    else:
        _row_gradient(dy, x, weight, r, dtotal, dx, stride, program.to(tl.int64), h, inside, H, ADD)


@jit
def _column_sums(dy, x, r, dw, stride, T, H, BLOCK: tl.constexpr):
    """dw over a program's tokens, of some columns, for tokens too wide for `_backward` to sum."""
    program = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(program, T, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        d = tl.load(dy + row * H + h, mask=h < H, other=0.0).to(tl.float32)
        n = tl.load(x + row * stride + h, mask=h < H, other=0.0).to(tl.float32) * tl.load(r + row)
        sums += d * n
    tl.store(dw + program * H + h, sums, mask=h < H)


def _warps(H: int) -> int:
    return min(16, max(1, block(H, WIDEST) // 512))


def _programs(H: int, device: torch.device) -> int:
    """Of the backward pass with dw, for tokens of this width: what the device's processors run at once."""
    return processors(device) * (WARPS // _warps(H))


def _stages(H: int, element_bytes: int) -> int:
    """Tokens under way in such a program, `element_bytes` being read for each of its elements: three, if they fit."""
    return 1 + min(2, PIPELINED // (block(H, WIDEST) * element_bytes))


@operator("rms_norm")
def _op(x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual (empty without one), r)."""
    if not use_triton(x_TH):
        total_TH = x_TH.new_empty(0) if residual_TH is None else x_TH + residual_TH
        y_TH, r_T = _plain(x_TH if residual_TH is None else total_TH, weight_H, eps)
        return y_TH, total_TH, r_T
    T, H = x_TH.shape
    y_TH, total_TH, r_T = _outputs(x_TH, residual_TH, weight_H, eps)
    if T:
        _forward[(T,)](
            *(x_TH, x_TH if residual_TH is None else residual_TH, weight_H, y_TH),
            *(y_TH if residual_TH is None else total_TH, r_T, x_TH.stride(0), H, eps),
            ADD=residual_TH is not None, BLOCK=whole_block("the width", H, WIDEST), num_warps=_warps(H),
        )  # fmt: skip
    return y_TH, total_TH, r_T


@_op.register_fake
def _outputs(x_TH, residual_TH, weight_H, eps):
    total_TH = x_TH.new_empty(0 if residual_TH is None else x_TH.shape)
    r_T = x_TH.new_empty(x_TH.shape[0], dtype=torch.promote_types(x_TH.dtype, torch.float32))
    return x_TH.new_empty(x_TH.shape), total_TH, r_T


@operator("rms_norm_backward")
def _backward_op(
    dy_TH: Tensor, dtotal_TH: Tensor | None, x_TH: Tensor, weight_H: Tensor, r_T: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """(dx plus `dtotal`, dw (empty unless needed)); `x` is the tensor that was normalized."""
    if not use_triton(x_TH):
        dx_TH, dw_H = _plain_backward(dy_TH, x_TH, weight_H, r_T, need_dw)
        return dx_TH if dtotal_TH is None else dx_TH.add_(dtotal_TH), dw_H
    T, H = x_TH.shape
    dx_TH = x_TH.new_empty((T, H))
    programs, together = min(T, PROGRAMS or _programs(H, x_TH.device)), need_dw and H <= WIDEST_DW
    parts_PH = x_TH.new_empty((programs if need_dw else 0, H), dtype=torch.float32)
    if T:
        _backward[(programs if together else T,)](
            *(dy_TH, x_TH, weight_H, r_T, dy_TH if dtotal_TH is None else dtotal_TH, dx_TH),
            *(parts_PH if together else r_T, x_TH.stride(0), T, H),
            ADD=dtotal_TH is not None, DW=together, BLOCK=whole_block("the width", H, WIDEST), num_warps=_warps(H),
            STAGES=_stages(H, (2 + (dtotal_TH is not None)) * x_TH.element_size()),
        )  # fmt: skip
        if need_dw and not together:
            grid = programs, -(-H // COLUMNS)
            _column_sums[grid](dy_TH, x_TH, r_T, parts_PH, x_TH.stride(0), T, H, BLOCK=COLUMNS, num_warps=4)
    return dx_TH, parts_PH.sum(0).to(weight_H.dtype) if need_dw else weight_H.new_empty(0)


@_backward_op.register_fake
def _(dy_TH, dtotal_TH, x_TH, weight_H, r_T, need_dw):
    return x_TH.new_empty(x_TH.shape), torch.empty_like(weight_H) if need_dw else weight_H.new_empty(0)


def _setup(ctx, inputs, output):
    x_TH, residual_TH, weight_H, _ = inputs
    _, total_TH, r_T = output
    ctx.added = residual_TH is not None
    ctx.save_for_backward(total_TH if ctx.added else x_TH, weight_H, r_T)
    ctx.mark_non_differentiable(r_T)


def _differentiate(ctx, dy_TH, dtotal_TH, _dr):
    x_TH, weight_H, r_T = ctx.saved_tensors
    dtotal = dtotal_TH.contiguous() if ctx.added and dtotal_TH is not None else None
    need_dw = ctx.needs_input_grad[2]
    dx_TH, dw_H = torch.ops.ptst.rms_norm_backward(dy_TH.contiguous(), dtotal, x_TH, weight_H, r_T, need_dw)
    return dx_TH, dx_TH if ctx.added else None, dw_H if need_dw else None, None


_op.register_autograd(_differentiate, setup_context=_setup)


def rms_norm_recompute(x_TH: Tensor, weight_H: Tensor, eps: float, r_T: Tensor) -> Tensor:
    """y again, from the r that `ptst::rms_norm` returned, without autograd."""
    if use_triton(x_TH):
        return _op(x_TH, None, weight_H, eps)[0]
    return (x_TH * r_T[:, None]).mul_(weight_H).to(x_TH.dtype)


def check_norm(x_TH: Tensor, weight_H: Tensor) -> None:
    """Raise ValueError unless `rms_norm` takes these."""
    if x_TH.dim() != 2 or weight_H.shape != x_TH.shape[-1:]:
        raise ValueError(f"x {tuple(x_TH.shape)} must be (T, H) and weight {tuple(weight_H.shape)} (H,)")
    if x_TH.shape[1] > WIDEST:
        raise ValueError(f"x {tuple(x_TH.shape)} is wider than {WIDEST}")
    check_alike(x=x_TH, weight=weight_H)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalize each token of `x_TH` to unit root mean square and scale it by `weight_H`; returned in x's dtype. Raises
    ValueError if shapes, devices or dtypes do not fit."""
    check_norm(x_TH, weight_H)
    return _op(x_TH, None, weight_H, eps)[0]


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both (T, H) in x's dtype. Raises ValueError like `rms_norm`."""
    if x_TH.shape != residual_TH.shape:
        raise ValueError(f"x {tuple(x_TH.shape)} and residual {tuple(residual_TH.shape)} must have one shape")
    check_norm(x_TH, weight_H)
    check_alike(x=x_TH, residual=residual_TH)
    y_TH, total_TH, _ = _op(x_TH, residual_TH.contiguous(), weight_H, eps)
    return y_TH, total_TH
