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

from ptst.kernels import folded_kernels as jitted
from ptst.kernels.dispatch import block, triton

ALIGNED = 8  # ranks of a group are a multiple: rows stay aligned to 16 bytes for the products
MOST_RANKS = 64  # of one adapter: three of its gradients are summed in registers at once
WIDEST_GROUP = 256  # ranks of a group, which the tiles hold whole

# (tokens, columns, warps, stages) of a block by bytes per element.
ROWS = {2: (32, 64, 4, 3), 4: (16, 32, 4, 1)}  # shrinks and the norm's backward pass: a program walks through its rows
TILES = {2: (64, 64, 4, 1), 4: (32, 32, 4, 1)}  # add_product
SWIGLU = {2: (32, 64, 8, 2), 4: (16, 32, 4, 1)}
GRADIENTS = {2: (64, 64, 8, 2), 4: (32, 32, 4, 1)}
RANKS = 64  # of a block of `gradients`
PROGRAMS = 512  # tokens are split between programs up to this number


class Mask(NamedTuple):
    """LoRA dropout's mask of one place in one layer: for each token its document's seed (T,) int64 and its place in
    the document (T,) int32; the number of layer and place, a multiple of 16, so that kernels are compiled once for all;
    and of the 2^32 numbers that Philox draws those below `threshold` drop."""

    keys: Tensor
    places: Tensor
    number: int
    threshold: int
    inverse: float


def _width(R: int) -> int:
    return max(16, block(R, WIDEST_GROUP))


def _rows(x: Tensor, R: int, drawn: bool = False) -> tuple[int, int, int, int]:
    """Block shapes of the kernels that walk through rows. Many ranks in float32, and in the norm's backward pass masks
    that are `drawn`, need the registers of more warps."""
    tokens, columns, warps, stages = ROWS[x.element_size()]
    return tokens, columns, warps * 2 if drawn or (x.element_size() == 4 and R > WIDEST_GROUP // 2) else warps, stages


def _options(x: Tensor, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    tokens, columns, warps, stages = sizes
    named: dict[str, Any] = {"IEEE": x.dtype == torch.float32, "BT": tokens, "BN": columns}
    return named | {"num_warps": warps, "num_stages": stages}


def _dropped(mask: Mask | None, x: Tensor) -> tuple[Any, ...]:
    return (x, x, 16, 16, 1.0) if mask is None else tuple(mask)


def norm_shrink(
    x_TN: Tensor, weight_N: Tensor, a_RN: Tensor, eps: float, mask: Mask | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """([n | z] (T, N + R), z (T, R) apart, r (T,) float32) with n = norm(x) and z = (n mask) a^T."""
    (T, N), R = x_TN.shape, len(a_RN)
    out, z_TR = x_TN.new_empty((T, N + R)), x_TN.new_empty((T, R))
    r_T = x_TN.new_empty(T, dtype=torch.float32)
    if T:
        sizes = _rows(x_TN, R)
        jitted.norm_shrink[(triton.cdiv(T, sizes[0]),)](
            *(x_TN, weight_N, a_RN, out, z_TR, r_T, x_TN.stride(0), N + R, T, N, R, eps),
            *_dropped(mask, x_TN), DROP=mask is not None, BR=_width(R), **_options(x_TN, sizes),
        )  # fmt: skip
    return out, z_TR, r_T


def swiglu_shrink(gate_up: Tensor, a_RF: Tensor, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
    """([h | z] (T, F + R), z (T, R) apart) with h = silu(gate) up and z = (h mask) a^T; `gate_up` (T, 2F)."""
    (R, F), T = a_RF.shape, len(gate_up)
    out, z_TR = gate_up.new_empty((T, F + R)), gate_up.new_empty((T, R))
    if T:
        sizes = _rows(gate_up, R)
        jitted.swiglu_shrink[(triton.cdiv(T, sizes[0]),)](
            *(gate_up, a_RF, out, z_TR, gate_up.stride(0), F + R, T, F, R),
            *_dropped(mask, gate_up), DROP=mask is not None, BR=_width(R), **_options(gate_up, sizes),
        )  # fmt: skip
    return out, z_TR


def shrink_dropped(x_TN: Tensor, a_RN: Tensor, mask: Mask) -> Tensor:
    """(x mask) a^T, (T, R)."""
    (T, N), R = x_TN.shape, len(a_RN)
    z_TR = x_TN.new_empty((T, R))
    if T:
        sizes = _rows(x_TN, R)
        jitted.shrink_dropped[(triton.cdiv(T, sizes[0]),)](
            *(x_TN, a_RN, z_TR, x_TN.stride(0), T, N, R, *mask), BR=_width(R), **_options(x_TN, sizes)
        )  # fmt: skip
    return z_TR


def add_product(y_TN: Tensor, base_TN: Tensor | None, z_TR: Tensor, b_NR: Tensor, mask: Mask | None = None) -> Tensor:
    """y + (z b^T) mask (+ base), (T, N), rounded once. y, base, z may be columns of wider tensors; any strides of b."""
    (T, N), R = y_TN.shape, z_TR.shape[1]
    out = y_TN.new_empty((T, N))
    if T:
        sizes = TILES[y_TN.element_size()]
        base = y_TN if base_TN is None else base_TN
        jitted.add_product[(triton.cdiv(T, sizes[0]), triton.cdiv(N, sizes[1]))](
            *(y_TN, base, z_TR, b_NR, out, y_TN.stride(0), base.stride(0), z_TR.stride(0), *b_NR.stride(), T, N, R),
            *_dropped(mask, y_TN), DROP=mask is not None, PLUS=base_TN is not None, BR=_width(R),
            **_options(y_TN, sizes),
        )  # fmt: skip
    return out


def norm_backward(
    d: Tensor, x_TN: Tensor, norm: tuple[Tensor, Tensor], a_RN: Tensor, dtotal: Tensor | None, mask: Mask | None = None
) -> Tensor:
    """dx (T, N), plus `dtotal`, of n = norm(x) from d = [dn' | e] (T, N + R) where dn = dn' + (e a) mask; `norm`: its
    weight and statistic."""
    (T, N), R = x_TN.shape, len(a_RN)
    dx_TN = x_TN.new_empty((T, N))
    if T:
        sizes = _rows(x_TN, R, mask is not None)
        jitted.norm_backward[(triton.cdiv(T, sizes[0]),)](
            *(d, x_TN, *norm, a_RN, d if dtotal is None else dtotal, dx_TN, d.stride(0), x_TN.stride(0)),
            *(T, N, R, *_dropped(mask, x_TN)), DROP=mask is not None, ADD=dtotal is not None, BR=_width(R),
            **_options(x_TN, sizes),
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


def swiglu_blocks(x: Tensor, most: int, drawn: bool) -> tuple[int, int, int, int]:
    """Block shapes of `swiglu_backward` for adapters of at most `most` ranks. The sums of many need the registers of
    half of the columns, and masks that are `drawn` meanwhile those of half of the tokens."""
    tokens, columns, warps, stages = SWIGLU[x.element_size()]
    many = most > MOST_RANKS // 2
    return max(16, tokens // 2) if drawn and many else tokens, columns // 2 if many else columns, warps, stages


def swiglu_backward(
    d: Tensor,
    gate_up: Tensor,
    a_RF: Tensor,
    z: Tensor,
    ranks: tuple[int, int],
    scale: float,
    sums: Sums,
    mask: Mask | None = None,
) -> Tensor:
    """The gradients of gate and up, (T, 2F), from d = [dh' | e] (T, F + R) where dh = dh' + (e a) mask; the first
    R F + F (ranks of gate + ranks of up) columns of `sums` get dA of down, dB of gate and dB of up."""
    (R, F), T = a_RF.shape, len(gate_up)
    out = gate_up.new_empty((T, 2 * F))
    if T:
        sizes = swiglu_blocks(gate_up, max(R, *ranks), mask is not None)
        jitted.swiglu_backward[(triton.cdiv(F, sizes[1]), len(sums.parts))](
            *(d, gate_up, a_RF, z, out, sums.parts, d.stride(0), gate_up.stride(0), sums.parts.stride(0)),
            *(T, F, R, z.stride(0), *ranks, sums.share, scale, *_dropped(mask, z)), DROP=mask is not None,
            BR=_width(R), BZ=max(16, block(max(ranks), MOST_RANKS)), **_options(gate_up, sizes),
        )  # fmt: skip
    return out


def gradients(
    e_TR: Tensor, x_TN: Tensor, norm: tuple[Tensor, Tensor] | None, z: Tensor, dys: Sequence[Tensor],
    ranks: Sequence[int], scale: float, sums: Sums, first: int = 0, mask: Mask | None = None,
) -> None:  # fmt: skip
    """Into `sums` from column `first`: e^T x (R, N), or of x r w for norm = (w, r), times the mask; then
    scale dy_g^T z_g (O_g, r_g) for up to three layers, whose z_g are side by side in z."""
    (T, R), N = e_TR.shape, x_TN.shape[1]
    if not T:
        return
    sizes = GRADIENTS[x_TN.element_size()]
    ds = [*dys, *[dys[0]] * (3 - len(dys))]
    outs, rs = [[*(d.shape[1] for d in dys), 0, 0][:3], [*ranks, 0, 0][:3]]
    blocks = sum(triton.cdiv(n, sizes[1]) * triton.cdiv(r, RANKS) for n, r in zip((N, *outs), (R, *rs), strict=True))
    weight, r_T = norm or (x_TN, x_TN)
    parts = sums.parts[:, first:]
    jitted.gradients[(blocks, len(parts))](
        *(e_TR, x_TN, r_T, weight, parts, e_TR.stride(0), x_TN.stride(0), parts.stride(0)),
        *(T, N, R, sums.share, scale, z, z.stride(0), *ds, *(d.stride(0) for d in ds), *outs, *rs),
        *_dropped(mask, x_TN), DROP=mask is not None, NORM=norm is not None, BR=max(16, block(max(R, *rs), RANKS)),
        **_options(x_TN, sizes),
    )  # fmt: skip
