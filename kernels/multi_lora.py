r"""Multi-LoRA: y_t += (x_t A_n^T) B_n with the adapter n = which_t of each row, in two launches for all adapters.

As SGMV and BGMV do (Punica: Chen et al. 2023, arXiv 2310.18547; S-LoRA: Sheng et al. 2023, arXiv 2311.03285): the
matrices of all adapters lie in one tensor, padded to the largest rank. A program takes a block of rows and one adapter,
computes only those of its rows that have this adapter, and ends at once if there are none, so that shapes are the same
whatever the rows ask for and a step can be captured in a graph. Rows without an adapter are left as they are. `shrink`
splits the inputs between programs where rows are few; `expand` adds up their parts in a fixed order.

Shapes: T rows, N adapters, R the largest rank (of a group of projections: the sum of its ranks), I inputs, O outputs, S
parts of the inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptst.kernels.dispatch import (
    block,
    check_alike,
    check_frozen,
    check_integers,
    jit,
    processors,
    tl,
    triton,
    use_triton,
)
from ptst.kernels.transfer import to_device

# (columns, ranks, warps, stages) of a block by bytes per element; ranks at most. No register spills (python -m
# ptst.kernels.compile); not yet timed.
SHRINK = {2: (128, 64, 4, 3), 4: (32, 64, 4, 1)}
EXPAND = {2: (128, 64, 4, 1), 4: (32, 32, 4, 1)}
ROWS = (16, 64)  # of a block: while decoding, and of more than MANY
MANY = 256
LEAST = 512  # inputs of a part


class Stacked(NamedTuple):
    """A and B of N adapters, and the rank of each, 0 for one without matrices: int32."""

    a_NRI: Tensor
    b_NRO: Tensor
    ranks_N: Tensor


def stack(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> Stacked | None:
    """(A (R_n, I), B (R_n, O)) of each adapter or None, padded with zeros; None if none has any."""
    given = [pair for pair in pairs if pair is not None]
    if not given:
        return None
    most = max(len(a_RI) for a_RI, _ in given)
    a_NRI, b_NRO = (first.new_zeros(len(pairs), most, first.shape[1]) for first in given[0])
    for n, pair in enumerate(pairs):
        if pair is not None:
            a_NRI[n, : len(pair[0])], b_NRO[n, : len(pair[1])] = pair
    ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
    return Stacked(a_NRI, b_NRO, to_device(ranks, a_NRI.device, torch.int32))


@jit
def _shrink(x, a, which, ranks, z, x_row, T, N, R, I, share,
            IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """z (S, T, R) = x A_n^T over the part's inputs, in the rows of adapter n and up to its rank."""
    n, part = tl.program_id(0) % N, tl.program_id(1)
    t = (tl.program_id(0) // N) * BT + tl.arange(0, BT)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    mine = tl.load(which + t, mask=t < T, other=-1) == n
    rank = tl.load(ranks + n)
    if (tl.max(mine.to(tl.int32), axis=0) > 0) & (tl.program_id(2) * BR < rank):
        rows = x + t.to(tl.int64)[:, None] * x_row
        own = a + n.to(tl.int64) * R * I + r[None, :] * I
        total = tl.zeros([BT, BR], tl.float32)
        low = part * share
        high = tl.minimum(low + share, I)
        for at in range(low, high, BN):
            i = at + tl.arange(0, BN)
            xs = tl.load(rows + i[None, :], mask=mine[:, None] & (i < high)[None, :], other=0.0)
            parts = tl.load(own + i[:, None], mask=(r < rank)[None, :] & (i < high)[:, None], other=0.0)
            total += tl.dot(xs, parts, input_precision="ieee" if IEEE else "tf32")
        to = z + (part.to(tl.int64) * T + t)[:, None] * R + r[None, :]
        tl.store(to, total, mask=mine[:, None] & (r < rank)[None, :])


@jit
def _expand(y, z, b, which, ranks, y_row, T, N, R, O, S,
            IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """y (T, O) += (sum of z (S, T, R) over S) B_n in the rows of adapter n."""
    n = tl.program_id(0) % N
    t = (tl.program_id(0) // N) * BT + tl.arange(0, BT)
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    mine = tl.load(which + t, mask=t < T, other=-1) == n
    rank = tl.load(ranks + n)
    if (tl.max(mine.to(tl.int32), axis=0) > 0) & (rank > 0):
        own = b + n.to(tl.int64) * R * O + o[None, :]
        added = tl.zeros([BT, BN], tl.float32)
        for at in range(0, rank, BR):
            r = at + tl.arange(0, BR)
            zs = tl.zeros([BT, BR], tl.float32)
            for part in range(S):
                rows = z + (tl.cast(part, tl.int64) * T + t)[:, None] * R
                zs += tl.load(rows + r[None, :], mask=mine[:, None] & (r < rank)[None, :], other=0.0)
            bs = tl.load(own + r[:, None] * O, mask=(r < rank)[:, None] & (o < O)[None, :], other=0.0)
            added += tl.dot(zs.to(bs.dtype), bs, input_precision="ieee" if IEEE else "tf32")
        to, here = y + t.to(tl.int64)[:, None] * y_row + o[None, :], mine[:, None] & (o < O)[None, :]
        old = tl.load(to, mask=here, other=0.0).to(tl.float32)
        tl.store(to, (old + added).to(y.dtype.element_ty), mask=here)


def _width(R: int, most: int) -> int:
    return max(16, block(R, most))


def launch_shrink(x_TI: Tensor, which_T: Tensor, stacked: Stacked) -> Tensor:
    """z (S, T, R), float32; written only in rows and columns that an adapter has."""
    (T, I), (N, R, _) = x_TI.shape, stacked.a_NRI.shape
    columns, ranks, warps, stages = SHRINK[x_TI.element_size()]
    rows = ROWS[T > MANY]
    # Pairs of a block of rows and an adapter that can be at work at once.
    pairs = min(T, triton.cdiv(T, rows) * N) * triton.cdiv(R, ranks)
    parts = max(1, min(8, triton.cdiv(I, LEAST), 2 * processors(x_TI.device) // pairs))
    share = triton.cdiv(triton.cdiv(I, parts), columns) * columns
    z_STR = x_TI.new_empty((parts, T, R), dtype=torch.float32)
    _shrink[(triton.cdiv(T, rows) * N, parts, triton.cdiv(R, ranks))](
        *(x_TI, stacked.a_NRI, which_T, stacked.ranks_N, z_STR, x_TI.stride(0), T, N, R, I, share),
        IEEE=x_TI.dtype == torch.float32, BT=rows, BN=columns, BR=_width(R, ranks),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return z_STR


def launch_expand(y_TO: Tensor, z_STR: Tensor, which_T: Tensor, stacked: Stacked) -> None:
    """y += (sum of z over S) B, in place."""
    (T, O), (S, _, R), N = y_TO.shape, z_STR.shape, len(stacked.b_NRO)
    columns, ranks, warps, stages = EXPAND[y_TO.element_size()]
    rows = ROWS[T > MANY]
    _expand[(triton.cdiv(T, rows) * N, triton.cdiv(O, columns))](
        *(y_TO, z_STR, stacked.b_NRO, which_T, stacked.ranks_N, y_TO.stride(0), T, N, R, O, S),
        IEEE=y_TO.dtype == torch.float32, BT=rows, BN=columns, BR=_width(R, ranks),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _plain(y_TO: Tensor, x_TI: Tensor, which_T: Tensor, stacked: Stacked) -> None:
    """An adapter after the other."""
    for n, (a_RI, b_RO) in enumerate(zip(stacked.a_NRI, stacked.b_NRO, strict=True)):
        rows = (which_T == n).nonzero()[:, 0]
        if len(rows):
            y_TO.index_add_(0, rows, (x_TI[rows] @ a_RI.t()) @ b_RO)


def add_adapters(y_TO: Tensor, x_TI: Tensor, which_T: Tensor, stacked: Stacked) -> None:
    """y += x A^T B in place, each row with its own adapter: `which` is its number, int32, or -1 for none. The factor of
    an adapter is part of its B. Raises ValueError if shapes, devices or dtypes do not fit."""
    a_NRI, b_NRO, ranks_N = stacked
    (N, R), shapes = a_NRI.shape[:2], [tuple(t.shape) for t in (y_TO, x_TI, which_T, a_NRI, b_NRO)]
    T, O, I = len(y_TO), b_NRO.shape[-1], a_NRI.shape[-1]
    wanted = [(len(x_TI), O), (T, I), (T,), (N, R, I), (N, R, O)]
    if y_TO.dim() != 2 or shapes != wanted or ranks_N.shape != (N,):
        y, x, which, a, b = shapes
        raise ValueError(f"y {y}, x {x}, which {which}, A {a} and B {b} do not fit")
    check_alike(y=y_TO, x=x_TI, A=a_NRI, B=b_NRO)
    check_frozen(y=y_TO, x=x_TI, A=a_NRI, B=b_NRO)
    check_integers(y_TO.device, which=which_T, ranks=ranks_N)
    if T > 1 and y_TO.stride(0) < O:
        raise ValueError(f"rows of y {tuple(y_TO.shape)} overlap: their stride is {y_TO.stride(0)}")
    if not (a_NRI.is_contiguous() and b_NRO.is_contiguous()):
        raise ValueError(f"A {shapes[3]} and B {shapes[4]} must be contiguous")
    if not use_triton(y_TO):
        _plain(y_TO, x_TI, which_T, stacked)
    elif y_TO.numel() and N and R:
        launch_expand(y_TO, launch_shrink(x_TI, which_T, stacked), which_T, stacked)
