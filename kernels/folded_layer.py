r"""lora_layer.py's three functions over folded weights (lora_folded.py), on a GPU: the same values and gradients in
fewer launches and passes over activations.

`FoldedGroup` holds [W | s B] and A of one group. The base's weights become views of it (`weights`), so that nothing is
kept twice; s B and A are written anew whenever an adapter has changed (`refresh`). Kept for the backward pass is what
lora_layer.py keeps. A norm stands before each half: other layers take lora_layer.py. LoRA dropout's masks are drawn
inside the kernels, from (document's seed, layer, place, token of the document, column), so no split of a batch changes
them; they are others than those that lora_layer.py draws.

Shapes: as in lora_layer.py and lora_folded.py.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ptst.kernels import lora_folded as kernels
from ptst.kernels import rope
from ptst.kernels.dispatch import check_alike, check_frozen, use_triton
from ptst.kernels.joined import own_gradients
from ptst.kernels.lora import Adapter, shrink
from ptst.kernels.lora_folded import ALIGNED, Mask, Sums
from ptst.kernels.lora_layer import Dropout
from ptst.kernels.rms_norm import check_norm

PLACES = ("qkv", "o", "gate_up", "down")
_steps = [0]  # of any optimizer of this process; a fused one does not count up its parameters' versions


@cache
def _watch_optimizers() -> None:
    def stepped(*_: Any) -> None:
        _steps[0] += 1

    register_optimizer_step_post_hook(stepped)


class FoldedGroup:
    """Weights (O_g, I) of one input with their adapters, of which one at least is not None, and biases. Copies the
    weights, of one dtype and device; the caller lets go of the originals. Raises ValueError for shapes that do not
    fit and ranks beyond what the kernels take."""

    def __init__(
        self, weights: Sequence[Tensor], adapters: Sequence[Adapter], scale: float, biases: Sequence[Tensor | None] = ()
    ):
        check_alike(**{f"weight {number}": w for number, w in enumerate(weights, 1)})
        self.scale, self.adapters = scale, list(adapters)
        self.outs = [len(w) for w in weights]
        self.ranks = [0 if pair is None else len(pair[0]) for pair in adapters]
        R = -(-sum(self.ranks) // ALIGNED) * ALIGNED
        for number, w_OI in enumerate(weights, 1):
            if w_OI.dim() != 2 or w_OI.shape[1] != weights[0].shape[1]:
                raise ValueError(f"weight {number} {tuple(w_OI.shape)} does not fit weight 1 {tuple(weights[0].shape)}")
        for number, (w_OI, b_O) in enumerate(zip(weights, biases, strict=bool(biases)), 1):
            if b_O is not None and b_O.shape != w_OI.shape[:1]:
                raise ValueError(f"bias {number} {tuple(b_O.shape)} does not fit weight {number} {tuple(w_OI.shape)}")
        for w_OI, pair in zip(weights, adapters, strict=True):
            I = weights[0].shape[1]
            if pair and (pair[0].shape[1:] != (I,) or pair[1].shape != (len(w_OI), len(pair[0]))):
                a, b = (tuple(t.shape) for t in pair)
                raise ValueError(f"weight {tuple(w_OI.shape)}, A {a} and B {b} do not fit")
        if not 0 < R <= kernels.WIDEST_GROUP or max(self.ranks) > kernels.MOST_RANKS:
            most = f"at least one adapter, of at most {kernels.MOST_RANKS} ranks each and {kernels.WIDEST_GROUP} in all"
            raise ValueError(f"adapters of ranks {self.ranks} cannot be folded; the kernels take {most}")
        self.whole = weights[0].new_zeros((sum(self.outs), I + R))  # [W | s B]
        self.a_RI = weights[0].new_zeros((R, I))
        self.inputs = I
        for view, w_OI in zip(self.weights, weights, strict=True):
            view.copy_(w_OI)
        self.bias = None
        if any(b is not None for b in biases):
            filled = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in filled])
        self._state: tuple[int, ...] = ()
        _watch_optimizers()
        self.refresh()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """W_g (O_g, I), views."""
        return self.whole[:, : self.inputs].split(self.outs)

    @property
    def sB(self) -> Tensor:
        """(O, R), a view."""
        return self.whole[:, self.inputs :]

    def holds(self, weights: Sequence[Tensor], adapters: Sequence[Adapter]) -> bool:
        """Whether these are still its views and its adapters: a decoder that was moved or converted has others."""
        views = zip(weights, self.weights, strict=True)
        same = all(w.data_ptr() == v.data_ptr() and (w.dtype, w.device) == (v.dtype, v.device) for w, v in views)
        return same and all(
            (a is b is None) or (a is not None and b is not None and a[0] is b[0] and a[1] is b[1])
            for a, b in zip(adapters, self.adapters, strict=True)
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Write s B and A anew if an optimizer or anyone else has written to them since."""
        state = (*_steps, *(t._version for pair in self.adapters if pair for t in pair))
        if state == self._state:
            return
        row = column = 0
        for pair, out, rank in zip(self.adapters, self.outs, self.ranks, strict=True):
            if pair is not None:
                a_rI, b_Or = pair
                torch.mul(b_Or, self.scale, out=self.sB[row : row + out, column : column + rank])
                self.a_RI[column : column + rank].copy_(a_rI)
            row, column = row + out, column + rank
        self._state = state

    def product(self, x_ext: Tensor, rows: slice = slice(None)) -> Tensor:
        """[x | z] [W | s B]^T plus the biases, of some layers' rows."""
        w = self.whole[rows].t()
        return x_ext @ w if self.bias is None else torch.addmm(self.bias[rows], x_ext, w)

    @property
    def flat(self) -> list[Tensor | None]:
        """A_1, B_1, A_2, B_2, ..., None where a layer has no adapter."""
        return [t for pair in self.adapters for t in pair or (None, None)]

    def length(self) -> int:
        """Numbers in the gradients of its A, with the ranks that fill up, and of its B."""
        return self.a_RI.numel() + sum(o * r for o, r in zip(self.outs, self.ranks, strict=True))

    def of_a(self, total_L: Tensor) -> list[Tensor]:
        """dA_g from the numbers at the front of a total."""
        da_RI = total_L[: self.a_RI.numel()].view(self.a_RI.shape)
        return list(da_RI[: sum(self.ranks)].split(self.ranks))

    def of_b(self, total_L: Tensor) -> list[Tensor]:
        """dB_g from the numbers at the front of a total."""
        sizes = [o * r for o, r in zip(self.outs, self.ranks, strict=True)]
        parts = total_L[: sum(sizes)].split(sizes)
        return [p.view(o, r) for p, o, r in zip(parts, self.outs, self.ranks, strict=True)]

    def grads(self, das: Sequence[Tensor], dbs: Sequence[Tensor]) -> list[Tensor | None]:
        """As `flat` lists them, in the adapters' dtypes."""
        found: list[Tensor | None] = []
        for pair, da, db in zip(self.adapters, das, dbs, strict=True):
            found += [None, None] if pair is None else [da.to(pair[0].dtype), db.to(pair[1].dtype)]
        return found


def _blocks(x: Tensor, *shapes: tuple[int, int]) -> int:
    """Programs of `gradients` to a share."""
    columns = kernels.GRADIENTS[x.element_size()][1]
    return sum(-(-n // columns) * -(-r // kernels.RANKS) for n, r in shapes)


@lru_cache(maxsize=8)
def _tokens(seeds: tuple[int, ...], cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token its document's key, int64 (T,), and its place in it, int32 (T,); once for a batch."""
    digests = [hashlib.blake2b(str(seed).encode(), digest_size=8).digest() for seed in seeds]
    keys = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.long)
    sizes = torch.tensor([b - a for a, b in pairwise(cu_seqlens)])
    found = keys.repeat_interleave(sizes), torch.cat([torch.arange(n, dtype=torch.int32) for n in sizes.tolist()])
    if device.type == "cuda":  # from pageable memory, the host would wait for everything that is queued
        found = found[0].pin_memory(), found[1].pin_memory()
    keys_T, places_T = (t.to(device, non_blocking=True) for t in found)
    return keys_T, places_T


def mask_of(dropout: Dropout | None, place: str, device: torch.device) -> Mask | None:
    """The mask of a place (PLACES) for the kernels; None without dropout."""
    if dropout is None or not dropout.rate:
        return None
    number = 16 * (len(PLACES) * dropout.layer + PLACES.index(place) + 1)
    tables = _tokens(dropout.seeds, dropout.cu_seqlens, device)
    return Mask(*tables, number, min(round(dropout.rate * 2**32), 2**32 - 1), 1 / (1 - dropout.rate))


Angles = tuple[Tensor, Tensor]  # cos and sin of rope.tables


def _rotate(qkv: Sequence[Tensor], to: Sequence[Tensor], angles: Angles, inverse: bool = False) -> None:
    """q and k (T, O) rotated into q and k of `to`, which may be the same."""
    D = 2 * angles[0].shape[-1]
    q, k, q_out, k_out = (x.unflatten(1, (-1, D)) for x in (*qkv[:2], *to[:2]))
    rope.launch((q, k), (q_out, k_out), angles, inverse)


def _rotate_back(dys: Sequence[Tensor], angles: Angles) -> Tensor:
    """dq|dk|dv (T, O) before the rotation of q and k: in place where attention has made them so, else a new tensor."""
    outs = [dy.shape[1] for dy in dys]
    joined = own_gradients(*dys)
    if joined is not None:
        parts = given = joined.split(outs, 1)
    else:
        joined, given = dys[0].new_empty((len(dys[0]), sum(outs))), [dy.contiguous() for dy in dys]
        parts = joined.split(outs, 1)
        parts[2].copy_(dys[2])
    _rotate(given, parts, angles, inverse=True)
    return joined


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TE, norm_E, eps, group, dropout, angles, *adapters):
        ctx.mask = mask_of(dropout, "qkv", x_TE.device)
        x_ext, z_TR, r_T = kernels.norm_shrink(x_TE, norm_E, group.a_RI, eps, ctx.mask)
        ctx.group = group
        ctx.save_for_backward(x_TE, r_T, z_TR, norm_E, group.whole, group.a_RI, *(angles or ()))
        ctx.set_materialize_grads(False)
        if angles is None:
            # Values apart: attention keeps them, and would keep q and k before their norms with them.
            q, k, _ = group.outs
            both_TO = group.product(x_ext, slice(0, q + k))
            return x_TE, *both_TO.split([q, k], dim=1), group.product(x_ext, slice(q + k, None))
        qkv = group.product(x_ext).split(group.outs, dim=1)
        _rotate(qkv, qkv, angles)
        return x_TE, *qkv

    @staticmethod
    def backward(ctx, dtotal_TE, *given):
        x_TE, r_T, z_TR, norm_E, whole, a_RI, *angles = ctx.saved_tensors
        group, T, outs = ctx.group, len(x_TE), ctx.group.outs
        need_dx, first = ctx.needs_input_grad[0], 0 if ctx.needs_input_grad[0] else group.inputs
        dys = [x_TE.new_zeros(T, n) if dy is None else dy for dy, n in zip(given, outs, strict=True)]
        if angles:
            dqkv = _rotate_back(dys, angles)
            dys, d = dqkv.split(outs, 1), dqkv @ whole[:, first:]  # [dx' | e], or e alone
        else:
            dys, ws = [dy.contiguous() for dy in dys], whole[:, first:].split(outs)
            d = dys[0] @ ws[0]
            for dy, w in zip(dys[1:], ws[1:], strict=True):
                d.addmm_(dy, w)
        e_TR = d[:, group.inputs - first :]
        shapes = [tuple(a_RI.shape[::-1]), *zip(group.outs, group.ranks, strict=True)]
        sums = Sums.empty(x_TE, T, group.length(), _blocks(x_TE, *shapes))
        kernels.gradients(e_TR, x_TE, (norm_E, r_T), z_TR, dys, group.ranks, group.scale, sums, 0, ctx.mask)
        total = sums.total()
        dx_TE = None
        if need_dx:
            dtotal_TE = dtotal_TE if dtotal_TE is None else dtotal_TE.contiguous()
            dx_TE = kernels.norm_backward(d, x_TE, (norm_E, r_T), a_RI, dtotal_TE, ctx.mask)
        return dx_TE, *[None] * 5, *group.grads(group.of_a(total), group.of_b(total[a_RI.numel() :]))


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TO, x_TI, group, dropout, *adapters):
        mask = ctx.mask = mask_of(dropout, "o", x_TI.device)
        z_TR = shrink(x_TI, group.a_RI, 1.0) if mask is None else kernels.shrink_dropped(x_TI, group.a_RI, mask)
        ctx.group = group
        ctx.save_for_backward(x_TI, z_TR, group.whole, group.a_RI)
        return kernels.add_product(x_TI @ group.weights[0].t(), residual_TO, z_TR, group.sB)

    @staticmethod
    def backward(ctx, dout_TO):
        x_TI, z_TR, whole, a_RI = ctx.saved_tensors
        group, dy_TO = ctx.group, dout_TO.contiguous()
        need_dx = ctx.needs_input_grad[1]
        first = 0 if need_dx else group.inputs
        d = dy_TO @ whole[:, first:]
        e_TR = d[:, group.inputs - first :]
        dx_TI = kernels.add_product(d[:, : group.inputs], None, e_TR, a_RI.t(), ctx.mask) if need_dx else None
        shapes = [tuple(a_RI.shape[::-1]), (len(whole), group.ranks[0])]
        sums = Sums.empty(x_TI, len(x_TI), group.length(), _blocks(x_TI, *shapes))
        kernels.gradients(e_TR, x_TI, None, z_TR, [dy_TO], group.ranks, group.scale, sums, 0, ctx.mask)
        total = sums.total()
        grads = group.grads(group.of_a(total), group.of_b(total[a_RI.numel() :]))
        return dout_TO, dx_TI, None, None, *grads


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TE, norm_E, eps, gate_up, down, dropout, *adapters):
        ctx.masks = [mask_of(dropout, place, x_TE.device) for place in ("gate_up", "down")]
        x_ext, z_TR, r_T = kernels.norm_shrink(x_TE, norm_E, gate_up.a_RI, eps, ctx.masks[0])
        y = x_ext @ gate_up.whole.t()
        del x_ext
        h_ext, zd_Tr = kernels.swiglu_shrink(y, down.a_RI, ctx.masks[1])
        ctx.groups = gate_up, down
        ctx.save_for_backward(
            x_TE, r_T, z_TR, zd_Tr, y, norm_E, gate_up.whole, gate_up.a_RI, down.whole, down.a_RI
        )  # fmt: skip
        return torch.addmm(x_TE, h_ext, down.whole.t())

    @staticmethod
    def backward(ctx, dout_TE):
        x_TE, r_T, z_TR, zd_Tr, y, norm_E, gu_whole, gu_a, down_whole, down_a = ctx.saved_tensors
        (gate_up, down), dout_TE, T = ctx.groups, dout_TE.contiguous(), len(x_TE)
        d = dout_TE @ down_whole  # [dh' | e]
        most, drawn = max(len(down_a), *gate_up.ranks), ctx.masks[1] is not None
        blocks = -(-down.inputs // kernels.swiglu_blocks(y, most, drawn)[1])
        sums = Sums.empty(y, T, gate_up.length() + down.length(), blocks)
        dy = kernels.swiglu_backward(d, y, down_a, z_TR, tuple(gate_up.ranks), gate_up.scale, sums, ctx.masks[1])
        del d
        need_dx, first = ctx.needs_input_grad[0], 0 if ctx.needs_input_grad[0] else gate_up.inputs
        d = dy @ gu_whole[:, first:]
        e_TR = d[:, gate_up.inputs - first :]
        a, b = down_a.numel(), gate_up.length() - gu_a.numel()
        # In their order: dA of down, dB of gate and up, dA of gate and up, dB of down.
        kernels.gradients(
            e_TR, x_TE, (norm_E, r_T), zd_Tr, [dout_TE], down.ranks, down.scale, sums, a + b, ctx.masks[0]
        )
        total = sums.total()
        down_grads = down.grads(down.of_a(total), down.of_b(total[a + b + gu_a.numel() :]))
        grads = gate_up.grads(gate_up.of_a(total[a + b :]), gate_up.of_b(total[a:]))
        dx_TE = kernels.norm_backward(d, x_TE, (norm_E, r_T), gu_a, dout_TE, ctx.masks[0]) if need_dx else None
        return dx_TE, *[None] * 5, *grads, *down_grads


def _check(x_TI: Tensor, inputs: int, dropout: Dropout | None, **tensors: Tensor | None) -> None:
    if x_TI.dim() != 2 or x_TI.shape[1] != inputs:
        raise ValueError(f"x {tuple(x_TI.shape)} must be (T, {inputs})")
    if not use_triton(x_TI):
        raise ValueError(f"x is {x_TI.dtype} on {x_TI.device}: folded adapters are for the Triton kernels alone")
    check_alike(x=x_TI, **{name: t for name, t in tensors.items() if t is not None})
    if dropout is not None:
        dropout.check(x_TI)


def folded_qkv(
    x_TE: Tensor,
    norm_E: Tensor,
    eps: float,
    group: FoldedGroup,
    dropout: Dropout | None = None,
    angles: Angles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, q, k, v): x itself, for the residual's sake, whose gradient then needs no addition of its own, and the
    projections of norm(x), (T, O) each; q and k rotated by `angles`, cos and sin of rope.tables, if they are given.
    Then the three are columns of one tensor; their gradients, if attention made them of one too, are rotated back in
    place. Raises ValueError if shapes, devices or dtypes do not fit."""
    _check(x_TE, group.inputs, dropout, weight=group.whole)
    check_norm(x_TE, norm_E)
    check_frozen(norm=norm_E)
    if len(group.outs) != 3:
        raise ValueError(f"q, k and v are three layers, the group has {len(group.outs)}")
    if angles is not None:
        _check_angles(x_TE, group, angles)
        angles = angles[0].contiguous(), angles[1].contiguous()
    group.refresh()
    return _QKV.apply(x_TE, norm_E, eps, group, dropout, angles, *group.flat)


def _check_angles(x_TE: Tensor, group: FoldedGroup, angles: Angles) -> None:
    half = angles[0].shape[-1]
    if any(t.shape != (len(x_TE), 1, half) for t in angles) or any(n % (2 * half or 1) for n in group.outs):
        cos, sin = (tuple(t.shape) for t in angles)
        raise ValueError(f"the tables {cos}, {sin} do not fit {len(x_TE)} tokens of q, k and v {group.outs}")
    if any(t.device != x_TE.device for t in angles):
        raise ValueError(f"the tables are on {angles[0].device} and {angles[1].device}, x on {x_TE.device}")


def folded_add(residual_TO: Tensor, x_TI: Tensor, group: FoldedGroup, dropout: Dropout | None = None) -> Tensor:
    """residual + x W^T + scale (x A^T) B^T of a single projection, (T, O). Raises ValueError if shapes, devices or
    dtypes do not fit."""
    _check(x_TI, group.inputs, dropout, weight=group.whole, residual=residual_TO)
    if residual_TO.shape != (len(x_TI), *group.outs):
        raise ValueError(f"residual {tuple(residual_TO.shape)} must be ({len(x_TI)}, {group.outs[0]})")
    group.refresh()
    return _Add.apply(residual_TO, x_TI, group, dropout, *group.flat)


def folded_feed_forward(
    x_TE: Tensor, norm_E: Tensor, eps: float, gate_up: FoldedGroup, down: FoldedGroup, dropout: Dropout | None = None
) -> Tensor:
    """x + down(silu(gate(norm x)) * up(norm x)), (T, E). Raises ValueError if shapes, devices or dtypes do not fit."""
    _check(x_TE, gate_up.inputs, dropout, gate_up=gate_up.whole, down=down.whole)
    check_norm(x_TE, norm_E)
    check_frozen(norm=norm_E)
    if gate_up.outs != [down.inputs] * 2 or down.outs != [gate_up.inputs]:
        raise ValueError(f"gate and up {gate_up.outs} of {gate_up.inputs} and down {down.outs} of {down.inputs}")
    gate_up.refresh()
    down.refresh()
    return _FeedForward.apply(x_TE, norm_E, eps, gate_up, down, dropout, *gate_up.flat, *down.flat)
