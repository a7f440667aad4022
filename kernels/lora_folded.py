r"""LoRA without passes of its own: adapters folded beside their frozen weights, and the kernels around the products.

A group of layers with one input (q, k and v; gate and up; o; down) keeps one matrix (O, I + R): [W_g | s B_g], where
B_g fills the columns of its own ranks and zeros the others'. Then

    y = [x | z] [W | s B]^T,  z = x A^T        [dx' | e] = dy [W | s B],  dx = dx' + e A

are one product each, that of the layer without an adapter with R more columns. z is computed by the kernel that makes
x (`norm_shrink`, `swiglu_shrink`), e A is added by the kernel that reads dx' (`norm_backward`, `swiglu_backward`).
`add_product` is for what has no such neighbour: o, whose input attention makes. `gradients` sums dA and dB of a group
in one launch, in float32, without atomics, and normalizes x as it reads it where A's input is a norm's output.

Shapes: T tokens, I inputs, O outputs, N either; R the group's ranks, filled up with zeros to a multiple of 8; F
intermediate_size. Parts of sums over tokens are (P, L) float32: a row for each share of the tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, jit, tl, triton

ALIGNED = 8  # ranks of a group are a multiple: rows stay aligned to 16 bytes for the products
MOST_RANKS = 64  # of one adapter: three of its gradients are summed in registers at once
WIDEST_GROUP = 256  # ranks of a group, which the tiles hold whole

# (tokens, columns, warps, stages) of a block by bytes per element.
ROWS = {2: (32, 64, 4, 3), 4: (16, 32, 4, 1)}  # shrinks and the norm's backward pass: a program walks through its rows
TILES = {2: (64, 64, 4, 1), 4: (32, 32, 4, 1)}  # add_product
SWIGLU = {2: (32, 64, 8, 2), 4: (16, 32, 4, 1)}
GRADIENTS = {2: (64, 64, 4, 3), 4: (32, 32, 4, 1)}
RANKS = 64  # of a block of `gradients`
PROGRAMS = 512  # tokens are split between programs up to this number


@jit
def _norm_shrink(x, w, a, out, z, r, x_row, out_row, T, N, R, eps,
                 IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """out (T, N + R) = [n | n a^T] with n = x r w; z its last R columns again; r the norm's statistic."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    here, ranks = (t < T)[:, None], k < R
    rows, to = x + t.to(tl.int64)[:, None] * x_row, out + t.to(tl.int64)[:, None] * out_row
    squares = tl.zeros([BT], tl.float32)
    for at in range(0, N, BN):
        xs = tl.load(rows + (at + n)[None, :], mask=here & (at + n < N)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(xs * xs, axis=1)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    tl.store(r + t, rstd, mask=t < T)
    total = tl.zeros([BT, BR], tl.float32)
    for at in range(0, N, BN):
        inside = at + n < N
        xs = tl.load(rows + (at + n)[None, :], mask=here & inside[None, :], other=0.0).to(tl.float32)
        scaled = xs * rstd[:, None] * tl.load(w + at + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        ns = scaled.to(out.dtype.element_ty)
        tl.store(to + (at + n)[None, :], ns, mask=here & inside[None, :])
        part = tl.load(a + k[None, :] * N + (at + n)[:, None], mask=ranks[None, :] & inside[:, None], other=0.0)
        total += tl.dot(ns, part, input_precision="ieee" if IEEE else "tf32")
    zs = total.to(out.dtype.element_ty)
    tl.store(to + N + k[None, :], zs, mask=here & ranks[None, :])
    tl.store(z + t.to(tl.int64)[:, None] * R + k[None, :], zs, mask=here & ranks[None, :])


@jit
def _swiglu_shrink(gate_up, a, out, z, in_row, out_row, T, F, R,
                   IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """out (T, F + R) = [h | h a^T] with h = silu(gate) up; z its last R columns again."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    here, ranks = (t < T)[:, None], k < R
    rows, to = gate_up + t.to(tl.int64)[:, None] * in_row, out + t.to(tl.int64)[:, None] * out_row
    total = tl.zeros([BT, BR], tl.float32)
    for at in range(0, F, BN):
        inside = at + n < F
        g = tl.load(rows + (at + n)[None, :], mask=here & inside[None, :], other=0.0).to(tl.float32)
        u = tl.load(rows + F + (at + n)[None, :], mask=here & inside[None, :], other=0.0).to(tl.float32)
        hs = (g * tl.sigmoid(g) * u).to(out.dtype.element_ty)
        tl.store(to + (at + n)[None, :], hs, mask=here & inside[None, :])
        part = tl.load(a + k[None, :] * F + (at + n)[:, None], mask=ranks[None, :] & inside[:, None], other=0.0)
        total += tl.dot(hs, part, input_precision="ieee" if IEEE else "tf32")
    zs = total.to(out.dtype.element_ty)
    tl.store(to + F + k[None, :], zs, mask=here & ranks[None, :])
    tl.store(z + t.to(tl.int64)[:, None] * R + k[None, :], zs, mask=here & ranks[None, :])


@jit
def _add_product(y, base, z, b, out, y_row, base_row, z_row, b_row, b_col, T, N, R, BASE: tl.constexpr,
                 IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """out (T, N) = y + z b^T, and with BASE + base."""
    t, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN)
    k, row, here = tl.arange(0, BR), t.to(tl.int64)[:, None], (t < T)[:, None] & (n < N)[None, :]
    total = tl.load(y + row * y_row + n[None, :], mask=here, other=0.0).to(tl.float32)
    if BASE:
        total += tl.load(base + row * base_row + n[None, :], mask=here, other=0.0).to(tl.float32)
    zs = tl.load(z + row * z_row + k[None, :], mask=(t < T)[:, None] & (k < R)[None, :], other=0.0)
    bs = tl.load(b + k[:, None] * b_col + n[None, :] * b_row, mask=(k < R)[:, None] & (n < N)[None, :], other=0.0)
    total += tl.dot(zs, bs, input_precision="ieee" if IEEE else "tf32")
    tl.store(out + row * N + n[None, :], total.to(out.dtype.element_ty), mask=here)


@jit
def _norm_backward(d, x, w, r, a, dtotal, dx, d_row, x_row, T, N, R, ADD: tl.constexpr,
                   IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """dx (T, N) of n = x r w from d (T, N + R) = [dn' | e] with dn = dn' + e a, and with ADD + dtotal."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    row, there, ranks = t.to(tl.int64)[:, None], (t < T)[:, None], k < R
    rstd = tl.load(r + t, mask=t < T, other=0.0)[:, None]
    es = tl.load(d + row * d_row + N + k[None, :], mask=there & ranks[None, :], other=0.0)
    along = tl.zeros([BT], tl.float32)
    for at in range(0, N, BN):
        inside = at + n < N
        part = tl.load(a + k[:, None] * N + (at + n)[None, :], mask=ranks[:, None] & inside[None, :], other=0.0)
        ds = tl.load(d + row * d_row + (at + n)[None, :], mask=there & inside[None, :], other=0.0).to(tl.float32)
        ds += tl.dot(es, part, input_precision="ieee" if IEEE else "tf32")
        ns = tl.load(x + row * x_row + (at + n)[None, :], mask=there & inside[None, :], other=0.0).to(tl.float32) * rstd
        along += tl.sum(ds * tl.load(w + at + n, mask=inside, other=0.0).to(tl.float32)[None, :] * ns, axis=1)
    mean = (along / N)[:, None]
    for at in range(0, N, BN):
        inside = at + n < N
        here = there & inside[None, :]
        part = tl.load(a + k[:, None] * N + (at + n)[None, :], mask=ranks[:, None] & inside[None, :], other=0.0)
        ds = tl.load(d + row * d_row + (at + n)[None, :], mask=here, other=0.0).to(tl.float32)
        ds += tl.dot(es, part, input_precision="ieee" if IEEE else "tf32")
        ns = tl.load(x + row * x_row + (at + n)[None, :], mask=here, other=0.0).to(tl.float32) * rstd
        out = rstd * (ds * tl.load(w + at + n, mask=inside, other=0.0).to(tl.float32)[None, :] - ns * mean)
        if ADD:
            out += tl.load(dtotal + row * N + (at + n)[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * N + (at + n)[None, :], out.to(dx.dtype.element_ty), mask=here)


@jit
def _swiglu_backward(d, gate_up, a, z, out, parts, d_row, in_row, part, T, F, R, Z, GATE, UP, share, scale,
                     IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
                     BZ: tl.constexpr):  # fmt: skip
    """out (T, 2F) = the gradients of gate and up from d (T, F + R) = [dh' | e] with dh = dh' + e a; and over the p-th
    share of tokens parts[p] = e^T h (R, F), then scale dgate^T z (F, GATE), then scale dup^T z (F, UP)."""
    n, t, k, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BZ)
    inside, ranks = n < F, k < R
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, T)
    weight = tl.load(a + k[:, None] * F + n[None, :], mask=ranks[:, None] & inside[None, :], other=0.0)
    of_a = tl.zeros([BR, BN], tl.float32)
    of_gate, of_up = tl.zeros([BZ, BN], tl.float32), tl.zeros([BZ, BN], tl.float32)
    for at in range(low, high, BT):
        row, there = (at + t).to(tl.int64)[:, None], (at + t < high)[:, None]
        here = there & inside[None, :]
        es = tl.load(d + row * d_row + F + k[None, :], mask=there & ranks[None, :], other=0.0)
        dh = tl.load(d + row * d_row + n[None, :], mask=here, other=0.0).to(tl.float32)
        dh += tl.dot(es, weight, input_precision="ieee" if IEEE else "tf32")
        g = tl.load(gate_up + row * in_row + n[None, :], mask=here, other=0.0).to(tl.float32)
        u = tl.load(gate_up + row * in_row + F + n[None, :], mask=here, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        dup, dgate = (dh * g * s).to(es.dtype), (dh * u * s * (1.0 + g * (1.0 - s))).to(es.dtype)
        tl.store(out + row * (2 * F) + n[None, :], dgate, mask=here)
        tl.store(out + row * (2 * F) + F + n[None, :], dup, mask=here)
        h = (g * s * u).to(es.dtype)
        of_a += tl.dot(tl.trans(es), h, input_precision="ieee" if IEEE else "tf32")
        zg = tl.load(z + row * Z + j[None, :], mask=there & (j < GATE)[None, :], other=0.0)
        zu = tl.load(z + row * Z + GATE + j[None, :], mask=there & (j < UP)[None, :], other=0.0)
        of_gate += tl.dot(tl.trans(zg), dgate, input_precision="ieee" if IEEE else "tf32")
        of_up += tl.dot(tl.trans(zu), dup, input_precision="ieee" if IEEE else "tf32")
    to = parts + tl.program_id(1).to(tl.int64) * part
    tl.store(to + k[:, None] * F + n[None, :], of_a, mask=ranks[:, None] & inside[None, :])
    to += R * F
    tl.store(to + n[None, :] * GATE + j[:, None], of_gate * scale, mask=(j < GATE)[:, None] & inside[None, :])
    to += F * GATE
    tl.store(to + n[None, :] * UP + j[:, None], of_up * scale, mask=(j < UP)[:, None] & inside[None, :])


@jit
def _reduce(left, right, r, w, to, left_row, right_row, out_r, out_n, number, low, high, N, R, scale,
            NORM: tl.constexpr, IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """The `number`-th block of scale left^T right (R, N) over tokens low to high, into `to`; with NORM of right r w."""
    blocks = (N + BN - 1) // BN
    n, k, t = number % blocks * BN + tl.arange(0, BN), number // blocks * BR + tl.arange(0, BR), tl.arange(0, BT)
    total = tl.zeros([BR, BN], tl.float32)
    for at in range(low, high, BT):
        row, there = (at + t).to(tl.int64)[:, None], (at + t < high)[:, None]
        ls = tl.load(left + row * left_row + k[None, :], mask=there & (k < R)[None, :], other=0.0)
        rs = tl.load(right + row * right_row + n[None, :], mask=there & (n < N)[None, :], other=0.0)
        if NORM:
            rstd = tl.load(r + at + t, mask=at + t < high, other=0.0)[:, None]
            weight = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            rs = (rs.to(tl.float32) * rstd * weight).to(right.dtype.element_ty)
        total += tl.dot(tl.trans(ls), rs, input_precision="ieee" if IEEE else "tf32")
    at = to + k[:, None] * out_r + n[None, :] * out_n
    tl.store(at, total * scale, mask=(k < R)[:, None] & (n < N)[None, :])


@jit
def _gradients(e, x, r, w, parts, e_row, x_row, part, T, N, R, share, scale, z, z_row, d1, d2, d3,
               d1_row, d2_row, d3_row, N1, N2, N3, R1, R2, R3, NORM: tl.constexpr,
               IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """Over the p-th share of tokens parts[p] = e^T x (R, N), then scale d^T z (N1, R1), (N2, R2), (N3, R3), with z's
    columns in that order."""
    number = tl.program_id(0)
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, T)
    to = parts + tl.program_id(1).to(tl.int64) * part
    blocks = (N + BN - 1) // BN * ((R + BR - 1) // BR)
    blocks1 = blocks + (N1 + BN - 1) // BN * ((R1 + BR - 1) // BR)
    blocks2 = blocks1 + (N2 + BN - 1) // BN * ((R2 + BR - 1) // BR)
    if number < blocks:
        _reduce(e, x, r, w, to, e_row, x_row, N, 1, number, low, high, N, R, 1.0, NORM, IEEE, BT, BN, BR)
    elif number < blocks1:
        to += R * N
        _reduce(z, d1, r, w, to, z_row, d1_row, 1, R1, number - blocks, low, high, N1, R1, scale,
                False, IEEE, BT, BN, BR)  # fmt: skip
    elif number < blocks2:
        to += R * N + N1 * R1
        _reduce(z + R1, d2, r, w, to, z_row, d2_row, 1, R2, number - blocks1, low, high, N2, R2, scale,
                False, IEEE, BT, BN, BR)  # fmt: skip
    else:
        to += R * N + N1 * R1 + N2 * R2
        _reduce(z + R1 + R2, d3, r, w, to, z_row, d3_row, 1, R3, number - blocks2, low, high, N3, R3, scale,
                False, IEEE, BT, BN, BR)  # fmt: skip


def _width(R: int) -> int:
    return max(16, block(R, WIDEST_GROUP))


def _options(x: Tensor, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    tokens, columns, warps, stages = sizes
    named: dict[str, Any] = {"IEEE": x.dtype == torch.float32, "BT": tokens, "BN": columns}
    return named | {"num_warps": warps, "num_stages": stages}


def norm_shrink(x_TN: Tensor, weight_N: Tensor, a_RN: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """([n | z] (T, N + R), z (T, R) apart, r (T,) float32) with n = norm(x) and z = n a^T."""
    (T, N), R = x_TN.shape, len(a_RN)
    out, z_TR = x_TN.new_empty((T, N + R)), x_TN.new_empty((T, R))
    r_T = x_TN.new_empty(T, dtype=torch.float32)
    if T:
        sizes = ROWS[x_TN.element_size()]
        _norm_shrink[(triton.cdiv(T, sizes[0]),)](
            *(x_TN, weight_N, a_RN, out, z_TR, r_T, x_TN.stride(0), N + R, T, N, R, eps),
            BR=_width(R), **_options(x_TN, sizes),
        )  # fmt: skip
    return out, z_TR, r_T


def swiglu_shrink(gate_up: Tensor, a_RF: Tensor) -> tuple[Tensor, Tensor]:
    """([h | z] (T, F + R), z (T, R) apart) with h = silu(gate) up and z = h a^T; `gate_up` (T, 2F) side by side."""
    (R, F), T = a_RF.shape, len(gate_up)
    out, z_TR = gate_up.new_empty((T, F + R)), gate_up.new_empty((T, R))
    if T:
        sizes = ROWS[gate_up.element_size()]
        _swiglu_shrink[(triton.cdiv(T, sizes[0]),)](
            *(gate_up, a_RF, out, z_TR, gate_up.stride(0), F + R, T, F, R),
            BR=_width(R), **_options(gate_up, sizes),
        )  # fmt: skip
    return out, z_TR


def add_product(y_TN: Tensor, base_TN: Tensor | None, z_TR: Tensor, b_NR: Tensor) -> Tensor:
    """y + z b^T (+ base), (T, N), rounded once; y, base and z may be columns of wider tensors, b of any strides."""
    (T, N), R = y_TN.shape, z_TR.shape[1]
    out = y_TN.new_empty((T, N))
    if T:
        sizes = TILES[y_TN.element_size()]
        base = y_TN if base_TN is None else base_TN
        _add_product[(triton.cdiv(T, sizes[0]), triton.cdiv(N, sizes[1]))](
            *(y_TN, base, z_TR, b_NR, out, y_TN.stride(0), base.stride(0), z_TR.stride(0), *b_NR.stride(), T, N, R),
            BASE=base_TN is not None, BR=_width(R), **_options(y_TN, sizes),
        )  # fmt: skip
    return out


def norm_backward(
    d: Tensor, x_TN: Tensor, weight_N: Tensor, r_T: Tensor, a_RN: Tensor, dtotal: Tensor | None
) -> Tensor:
    """dx (T, N), plus `dtotal`, of n = norm(x) from d = [dn' | e] (T, N + R) where dn = dn' + e a."""
    (T, N), R = x_TN.shape, len(a_RN)
    dx_TN = x_TN.new_empty((T, N))
    if T:
        sizes = ROWS[x_TN.element_size()]
        _norm_backward[(triton.cdiv(T, sizes[0]),)](
            *(d, x_TN, weight_N, r_T, a_RN, d if dtotal is None else dtotal, dx_TN, d.stride(0), x_TN.stride(0)),
            *(T, N, R), ADD=dtotal is not None, BR=_width(R), **_options(x_TN, sizes),
        )  # fmt: skip
    return dx_TN


class Sums(NamedTuple):
    """Sums over tokens, by shares of `share` tokens: `parts` (P, L) float32."""

    parts: Tensor
    share: int

    @classmethod
    def empty(cls, like: Tensor, T: int, length: int, blocks: int) -> "Sums":
        """For kernels of `blocks` programs to a share."""
        unit = 64
        shares = max(1, min(-(-PROGRAMS // blocks), -(-T // (8 * unit))))
        share = max(unit, -(-T // (shares * unit)) * unit)
        parts = like.new_empty((shares, length), dtype=torch.float32)
        return cls(parts if T else parts.zero_(), share)

    def total(self) -> Tensor:
        """(L,): one share's sum, or all added in their order."""
        return self.parts[0] if len(self.parts) == 1 else self.parts.sum(0)


def swiglu_blocks(x: Tensor, *ranks: int) -> tuple[int, int, int, int]:
    """Block shapes of `swiglu_backward`: of many ranks its sums need the registers of half of the columns."""
    tokens, columns, warps, stages = SWIGLU[x.element_size()]
    return tokens, columns if max(ranks) <= MOST_RANKS // 2 else columns // 2, warps, stages


def swiglu_backward(
    d: Tensor, gate_up: Tensor, a_RF: Tensor, z: Tensor, ranks: tuple[int, int], scale: float, sums: Sums
) -> Tensor:
    """The gradients of gate and up, (T, 2F) side by side, from d = [dh' | e] (T, F + R) where dh = dh' + e a; the first
    R F + F (ranks of gate + ranks of up) columns of `sums` get dA of down, dB of gate and dB of up."""
    (R, F), T = a_RF.shape, len(gate_up)
    out = gate_up.new_empty((T, 2 * F))
    if T:
        sizes = swiglu_blocks(gate_up, R, max(ranks))
        _swiglu_backward[(triton.cdiv(F, sizes[1]), len(sums.parts))](
            *(d, gate_up, a_RF, z, out, sums.parts, d.stride(0), gate_up.stride(0), sums.parts.stride(0)),
            *(T, F, R, z.stride(0), *ranks, sums.share, scale),
            BR=_width(R), BZ=max(16, block(max(ranks), MOST_RANKS)), **_options(gate_up, sizes),
        )  # fmt: skip
    return out


def gradients(
    e_TR: Tensor, x_TN: Tensor, norm: tuple[Tensor, Tensor] | None, z: Tensor, dys: Sequence[Tensor],
    ranks: Sequence[int], scale: float, sums: Sums, first: int = 0,
) -> None:  # fmt: skip
    """Into `sums` from column `first`: e^T x (R, N), or e^T (x r w) for norm = (w, r); then scale dy_g^T z_g (O_g, r_g)
    for up to three layers, whose z_g are side by side in z."""
    (T, R), N = e_TR.shape, x_TN.shape[1]
    if not T:
        return
    sizes = GRADIENTS[x_TN.element_size()]
    ds = [*dys, *[dys[0]] * (3 - len(dys))]
    outs, rs = [[*(d.shape[1] for d in dys), 0, 0][:3], [*ranks, 0, 0][:3]]
    blocks = sum(triton.cdiv(n, sizes[1]) * triton.cdiv(r, RANKS) for n, r in zip((N, *outs), (R, *rs), strict=True))
    weight, r_T = norm or (x_TN, x_TN)
    parts = sums.parts[:, first:]
    _gradients[(blocks, len(parts))](
        *(e_TR, x_TN, r_T, weight, parts, e_TR.stride(0), x_TN.stride(0), parts.stride(0)),
        *(T, N, R, sums.share, scale, z, z.stride(0), *ds, *(d.stride(0) for d in ds), *outs, *rs),
        NORM=norm is not None, BR=max(16, block(max(R, *rs), RANKS)), **_options(x_TN, sizes),
    )  # fmt: skip
