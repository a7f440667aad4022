r"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a group of linear layers of one input: y_g = x W_g^T + s (x A_g^T) B_g^T.

The W_g are frozen. A group (q, k and v; gate and up) stacks its A_g to A (R, I), so that x is read once for all of
z = x A^T, which is all that the forward pass keeps besides x. With e_g = s dy_g B_g, stacked to e (T, R):

    dx = sum_g dy_g W_g + e A        dA = e^T x        dB_g = s dy_g^T z_g

No gradient is ever formed for W, and dx only where something below is trained. The large products are cuBLAS's. The
thin ones are memory traffic, and have a kernel each: `narrow` (z, e), `widen` (adds s z B^T to y, e A to dx, in place)
and `outer` (dA, dB, summed in float32 and without atomics). They take the float32 adapter as it is.

Shapes: T tokens, I inputs, O outputs, r rank, R the group's ranks together; x (T, I), W (O, I), A (r, I), B (O, r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, check_alike, jit, tl, triton, use_triton

Adapters = Sequence[Tensor | None]

# (rows, columns, ranks, warps, stages) by bytes per element, ranks at most. No register spills (python -m
# kernels.compile); not yet timed.
NARROW = {2: (32, 128, 128, 4, 3), 4: (32, 32, 64, 4, 1)}
WIDEN = {2: (64, 64, 64, 4, 1), 4: (32, 32, 32, 4, 1)}
OUTER = {2: (64, 64, 128, 4, 3), 4: (32, 32, 64, 4, 1)}
PROGRAMS = 256  # as many as keep a large GPU busy: rows are split between programs up to that


@jit
def _narrow(x, a, z, x_row, a_row, a_col, z_row, T, N, R, scale,
            IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """z (T, R) = scale x (T, N) a (R, N)^T."""
    t, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    rows = x + t.to(tl.int64)[:, None] * x_row
    total = tl.zeros([BT, BR], tl.float32)
    for at in range(0, N, BN):
        inside = at + n < N
        xs = tl.load(rows + (at + n)[None, :], mask=(t < T)[:, None] & inside[None, :], other=0.0)
        where = a + r[None, :] * a_row + (at + n)[:, None] * a_col
        part = tl.load(where, mask=(r < R)[None, :] & inside[:, None], other=0.0)
        total += tl.dot(xs, part.to(xs.dtype), input_precision="ieee" if IEEE else "tf32")
    to = z + t.to(tl.int64)[:, None] * z_row + r[None, :]
    tl.store(to, (total * scale).to(z.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])


@jit
def _widen(y, z, b, y_row, z_row, b_row, b_col, T, N, R, scale,
           IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """y (T, N) += scale z (T, R) b (N, R)^T."""
    t, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN)
    rows = z + t.to(tl.int64)[:, None] * z_row
    added = tl.zeros([BT, BN], tl.float32)
    for at in range(0, R, BR):
        r = at + tl.arange(0, BR)
        zs = tl.load(rows + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
        bs = tl.load(b + r[:, None] * b_col + n[None, :] * b_row, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
        added += tl.dot(zs, bs.to(zs.dtype), input_precision="ieee" if IEEE else "tf32")
    to, here = y + t.to(tl.int64)[:, None] * y_row + n[None, :], (t < T)[:, None] & (n < N)[None, :]
    old = tl.load(to, mask=here, other=0.0).to(tl.float32)
    tl.store(to, (old + scale * added).to(y.dtype.element_ty), mask=here)


@jit
def _outer(e, x, out, e_row, x_row, out_part, out_r, out_n, T, N, R, share, scale,
           IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """out[p] (R, N) = scale e (T, R)^T x (T, N) over the p-th `share` of rows."""
    n, t = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BT)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, T)
    total = tl.zeros([BR, BN], tl.float32)
    for at in range(low, high, BT):
        row = (at + t).to(tl.int64)[:, None]
        inside = (at + t < high)[:, None]
        es = tl.load(e + row * e_row + r[None, :], mask=inside & (r < R)[None, :], other=0.0)
        xs = tl.load(x + row * x_row + n[None, :], mask=inside & (n < N)[None, :], other=0.0)
        total += tl.dot(tl.trans(es), xs, input_precision="ieee" if IEEE else "tf32")
    to = out + tl.program_id(1) * out_part + r[:, None] * out_r + n[None, :] * out_n
    tl.store(to, total * scale, mask=(r < R)[:, None] & (n < N)[None, :])


def _width(R: int, most: int) -> int:
    return max(16, block(R, most))


@torch.library.custom_op("ptst::lora_narrow", mutates_args=())
def narrow(x_TN: Tensor, a_RN: Tensor, scale: float) -> Tensor:
    """scale x a^T, (T, R) in x's dtype."""
    (T, N), R = x_TN.shape, a_RN.shape[0]
    z_TR = torch.empty((T, R), dtype=x_TN.dtype, device=x_TN.device)
    rows, columns, ranks, warps, stages = NARROW[x_TN.element_size()]
    if z_TR.numel():
        _narrow[(triton.cdiv(T, rows), triton.cdiv(R, ranks))](
            *(x_TN, a_RN, z_TR, x_TN.stride(0), *a_RN.stride(), R, T, N, R, scale),
            IEEE=x_TN.dtype == torch.float32, BT=rows, BN=columns, BR=_width(R, ranks),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return z_TR


@narrow.register_fake
def _(x_TN, a_RN, scale):
    return x_TN.new_empty((x_TN.shape[0], a_RN.shape[0]))


@torch.library.custom_op("ptst::lora_widen", mutates_args=("y_TN",))
def widen(y_TN: Tensor, z_TR: Tensor, b_NR: Tensor, scale: float) -> None:
    """y += scale z b^T, in place."""
    (T, N), R = y_TN.shape, b_NR.shape[1]
    rows, columns, ranks, warps, stages = WIDEN[y_TN.element_size()]
    if y_TN.numel():
        _widen[(triton.cdiv(T, rows), triton.cdiv(N, columns))](
            *(y_TN, z_TR, b_NR, y_TN.stride(0), z_TR.stride(0), *b_NR.stride(), T, N, R, scale),
            IEEE=y_TN.dtype == torch.float32, BT=rows, BN=columns, BR=_width(R, ranks),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


@widen.register_fake
def _(y_TN, z_TR, b_NR, scale):
    return None


@torch.library.custom_op("ptst::lora_outer", mutates_args=())
def outer(e_TR: Tensor, x_TN: Tensor, scale: float, transposed: bool) -> Tensor:
    """scale e^T x, float32 (R, N), or (N, R) if `transposed`."""
    (T, R), N = e_TR.shape, x_TN.shape[1]
    rows, columns, ranks, warps, stages = OUTER[x_TN.element_size()]
    blocks = triton.cdiv(N, columns)
    # Where the columns give too few programs, rows are split; their partial sums are added in a fixed order.
    parts = max(1, min(PROGRAMS // blocks, triton.cdiv(T, 8 * rows)))
    share = triton.cdiv(triton.cdiv(T, parts), rows) * rows
    shape, (r_stride, n_stride) = ((N, R), (1, R)) if transposed else ((R, N), (N, 1))
    out = torch.zeros((parts, *shape), dtype=torch.float32, device=x_TN.device)
    if T:
        _outer[(blocks, parts, triton.cdiv(R, ranks))](
            *(e_TR, x_TN, out, e_TR.stride(0), x_TN.stride(0), R * N, r_stride, n_stride, T, N, R, share, scale),
            IEEE=x_TN.dtype == torch.float32, BT=rows, BN=columns, BR=_width(R, ranks),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


@outer.register_fake
def _(e_TR, x_TN, scale, transposed):
    R, N = e_TR.shape[1], x_TN.shape[1]
    return x_TN.new_empty((N, R) if transposed else (R, N), dtype=torch.float32)


def _plain_narrow(x_TN: Tensor, a_RN: Tensor, scale: float) -> Tensor:
    return (x_TN @ a_RN.t().to(x_TN.dtype)).mul_(scale)


def _plain_widen(y_TN: Tensor, z_TR: Tensor, b_NR: Tensor, scale: float) -> None:
    y_TN.addmm_(z_TR, b_NR.t().to(y_TN.dtype), alpha=scale)


def _plain_outer(e_TR: Tensor, x_TN: Tensor, scale: float, transposed: bool) -> Tensor:
    out = x_TN.t() @ e_TR if transposed else e_TR.t() @ x_TN
    return out.to(torch.promote_types(out.dtype, torch.float32)).mul_(scale)


class Thin(NamedTuple):
    """The thin products of one way, and the group's forward and backward passes made of them, without autograd."""

    narrow: Callable
    widen: Callable
    outer: Callable
    join: bool = False

    def joins(self, w_OI: Tensor, a_rI: Tensor | None, mask_TI: Tensor | None) -> bool:
        """Whether W + s B A is formed for a product: no pass over the product's rows is then needed, which costs more
        where there are many. Only where W is as wide as the adapter, or B A would be rounded away."""
        return self.join and a_rI is not None and mask_TI is None and w_OI.dtype == a_rI.dtype

    def forward(
        self, x_TI: Tensor, weights: Sequence[Tensor], lows: Adapters, highs: Adapters, scale: float,
        base_TO: Tensor | None = None, mask_TI: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """([y_g (T, O_g)], z (T, R)); y_g begins at `base` where one is given. `mask` multiplies what A reads."""
        ranks = [0 if a is None else a.shape[0] for a in lows]
        z_TR = x_TI.new_empty(x_TI.shape[0], 0)
        if any(ranks):
            read_TI = x_TI if mask_TI is None else x_TI * mask_TI
            z_TR = self.narrow(read_TI, torch.cat([a for a in lows if a is not None]), 1.0)
        ys = []
        for w_OI, a_rI, b_Or, z_Tr in zip(weights, lows, highs, z_TR.split(ranks, dim=1), strict=True):
            joined = self.joins(w_OI, a_rI, mask_TI)
            w_OI = torch.addmm(w_OI, b_Or, a_rI, alpha=scale) if joined else w_OI
            y_TO = x_TI @ w_OI.t() if base_TO is None else torch.addmm(base_TO, x_TI, w_OI.t())
            if b_Or is not None and not joined:
                self.widen(y_TO, z_Tr, b_Or, scale)
            ys.append(y_TO)
        return ys, z_TR

    def backward(
        self, dys: Sequence[Tensor], x_TI: Tensor | None, z_TR: Tensor, weights: Sequence[Tensor], lows: Adapters,
        highs: Adapters, scale: float, need_dx: bool, mask_TI: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
        """(dx or None, [dA_1, dB_1, dA_2, ...]); `x` is read for dA alone."""
        ranks = [0 if a is None else a.shape[0] for a in lows]
        es, grads, dx_TI = [], [], None
        for dy_TO, w_OI, a_rI, b_Or, z_Tr in zip(dys, weights, lows, highs, z_TR.split(ranks, dim=1), strict=True):
            if need_dx:
                if self.joins(w_OI, a_rI, mask_TI):
                    w_OI = torch.addmm(w_OI, b_Or, a_rI, alpha=scale)
                dx_TI = dy_TO @ w_OI if dx_TI is None else dx_TI.addmm_(dy_TO, w_OI)
            db = None
            if b_Or is not None:
                dy_TO = dy_TO.contiguous()
                es.append(self.narrow(dy_TO, b_Or.t(), scale))
                db = self.outer(z_Tr, dy_TO, scale, True).to(b_Or.dtype)
            grads.append([None, db])
        if es:
            e_TR = torch.cat(es, dim=1)
            read_TI = x_TI if mask_TI is None else x_TI * mask_TI
            for pair, a_rI, da in zip(grads, lows, self.outer(e_TR, read_TI, 1.0, False).split(ranks), strict=True):
                pair[0] = None if a_rI is None else da.to(a_rI.dtype)
            # What was joined is in dx already.
            if dx_TI is not None and not any(self.joins(w, a, mask_TI) for w, a in zip(weights, lows, strict=True)):
                a_IR = torch.cat([a for a in lows if a is not None]).t()
                if mask_TI is None:
                    self.widen(dx_TI, e_TR, a_IR, 1.0)
                else:
                    dx_TI.addcmul_(mask_TI, e_TR @ a_IR.t().to(e_TR.dtype))
        return dx_TI, [g for pair in grads for g in pair]


def thin(x_TI: Tensor, join: bool = False) -> Thin:
    """The way that `x` goes. `join`: in plain torch, adapters may be joined to their weights (`Thin.joins`); worth it
    for the many rows of training, and for all of its splits alike, so that they agree to the last digits."""
    if use_triton(x_TI):
        return Thin(narrow, widen, outer)
    return Thin(_plain_narrow, _plain_widen, _plain_outer, join)


class _Group(torch.autograd.Function):
    """The adapters come flattened: A_1, B_1, A_2, B_2, ..., None where a layer has none."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, scale: float, weights: tuple[Tensor, ...], *adapters: Tensor | None):
        ctx.thin, ctx.scale, ctx.count = thin(x_TI), scale, len(weights)
        ys, z_TR = ctx.thin.forward(x_TI, weights, adapters[::2], adapters[1::2], scale)
        ctx.save_for_backward(x_TI, z_TR, *weights, *adapters)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        n = ctx.count
        x_TI, z_TR, *rest = ctx.saved_tensors
        dx_TI, grads = ctx.thin.backward(
            dys, x_TI, z_TR, rest[:n], rest[n::2], rest[n + 1 :: 2], ctx.scale, ctx.needs_input_grad[0]
        )
        return dx_TI, None, None, *grads


def lora_group(
    x_TI: Tensor, weights: Sequence[Tensor], adapters: Sequence[tuple[Tensor, Tensor] | None], scale: float
) -> tuple[Tensor, ...]:
    """y_g (T, O_g) = x W_g^T + scale (x A_g^T) B_g^T for every layer; differentiable in x, A_g and B_g.

    `adapters[g]` is (A_g, B_g), or None for a layer without one; they may be float32 over a bfloat16 base. Raises
    ValueError for shapes, devices or dtypes that do not fit, and where no layer has an adapter.
    """
    if len(weights) != len(adapters) or all(pair is None for pair in adapters):
        raise ValueError(
            f"{len(weights)} weights have {len(adapters)} places for adapters; at least one must be filled"
        )
    for w_OI, pair in zip(weights, adapters, strict=True):
        assert not w_OI.requires_grad, "the base weight under an adapter is frozen"
        check_alike(x=x_TI, weight=w_OI)
        a_rI, b_Or = pair or (w_OI[:0], w_OI[:, :0])
        fits = a_rI.shape[1] == w_OI.shape[1] == x_TI.shape[1] and b_Or.shape == (w_OI.shape[0], a_rI.shape[0])
        if x_TI.dim() != 2 or not fits:
            raise ValueError(
                f"x {tuple(x_TI.shape)}, weight {tuple(w_OI.shape)}, A {tuple(a_rI.shape)} and B {tuple(b_Or.shape)} "
                "do not fit"
            )
    return _Group.apply(x_TI, scale, tuple(weights), *(t for pair in adapters for t in pair or (None, None)))


def lora_linear(x_TI: Tensor, w_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """One layer: y (T, O) = x W^T + scale (x A^T) B^T, as `lora_group`."""
    return lora_group(x_TI, [w_OI], [(a_rI, b_Or)], scale)[0]
