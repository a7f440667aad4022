r"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a group of linear layers of one input: y_g = x W_g^T + s (x A_g^T) B_g^T.

The W_g are frozen. A group (q, k and v; gate and up) stacks its A_g to A (R, I), so that one pass over x gives
z = x A^T, the only tensor that the forward pass keeps besides x. With e_g = s dy_g B_g, stacked to e (T, R):

    dx = sum_g dy_g W_g + e A        dA = e^T x        dB_g = s dy_g^T z_g

No gradient of W is ever formed, and dx only if something below is trained. The large products are left to cuBLAS. The
low-rank ones are bound by memory traffic and have a kernel each: `shrink` (z, e), `expand` (adds s z B^T to y, or e A
to dx, in place) and `weight_gradient` (dA, dB, summed in float32 and without atomics). They read float32 adapters
without a cast copy.

Shapes: T tokens, I inputs, O outputs, r rank, R sum of the group's ranks; x (T, I), W (O, I), A (r, I), B (O, r). In
the kernels N is I or O.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, check_alike, check_frozen, jit, tl, triton, use_triton
from ptst.kernels.operators import operator

Adapter = tuple[Tensor, Tensor] | None  # (A, B) of a layer, or None for a layer without an adapter

# (tokens, columns, ranks, warps, stages) of a block by bytes per element; ranks at most. No register spills (python
# ptst.kernels.compile); not yet timed.
SHRINK = {2: (32, 128, 128, 4, 3), 4: (32, 32, 64, 4, 1)}
EXPAND = {2: (64, 64, 64, 4, 1), 4: (32, 32, 32, 4, 1)}
WEIGHT_GRADIENT = {2: (64, 64, 128, 4, 3), 4: (32, 32, 64, 4, 1)}
PROGRAMS = 256  # enough to occupy a large GPU: tokens are split between programs up to this number


@jit
def _shrink(x, a, z, x_row, a_row, a_col, z_row, T, N, R, scale,
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
def _expand(y, z, b, y_row, z_row, b_row, b_col, T, N, R, scale,
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
def _weight_gradient(e, x, out, e_row, x_row, out_part, out_r, out_n, T, N, R, share, scale,
                     IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """out[p] (R, N) = scale e (T, R)^T x (T, N) over the p-th `share` of tokens."""
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


@operator("lora_shrink")
def shrink(x_TN: Tensor, a_RN: Tensor, scale: float) -> Tensor:
    """scale x a^T, (T, R) in x's dtype."""
    if not use_triton(x_TN):
        return (x_TN @ a_RN.t().to(x_TN.dtype)).mul_(scale)
    (T, N), R = x_TN.shape, a_RN.shape[0]
    z_TR = torch.empty((T, R), dtype=x_TN.dtype, device=x_TN.device)
    tokens, columns, ranks, warps, stages = SHRINK[x_TN.element_size()]
    if z_TR.numel():
        _shrink[(triton.cdiv(T, tokens), triton.cdiv(R, ranks))](
            *(x_TN, a_RN, z_TR, x_TN.stride(0), *a_RN.stride(), R, T, N, R, scale),
            IEEE=x_TN.dtype == torch.float32, BT=tokens, BN=columns, BR=_width(R, ranks),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return z_TR


@shrink.register_fake
def _(x_TN, a_RN, scale):
    return x_TN.new_empty((x_TN.shape[0], a_RN.shape[0]))


@torch.library.custom_op("ptst::lora_expand", mutates_args=("y_TN",))
def expand(y_TN: Tensor, z_TR: Tensor, b_NR: Tensor, scale: float) -> None:
    """y += scale z b^T, in place."""
    if not use_triton(y_TN):
        y_TN.addmm_(z_TR, b_NR.t().to(y_TN.dtype), alpha=scale)
        return
    (T, N), R = y_TN.shape, b_NR.shape[1]
    tokens, columns, ranks, warps, stages = EXPAND[y_TN.element_size()]
    if y_TN.numel():
        _expand[(triton.cdiv(T, tokens), triton.cdiv(N, columns))](
            *(y_TN, z_TR, b_NR, y_TN.stride(0), z_TR.stride(0), *b_NR.stride(), T, N, R, scale),
            IEEE=y_TN.dtype == torch.float32, BT=tokens, BN=columns, BR=_width(R, ranks),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


@expand.register_fake
def _(y_TN, z_TR, b_NR, scale):
    return None


@operator("lora_weight_gradient")
def weight_gradient(e_TR: Tensor, x_TN: Tensor, scale: float, transposed: bool) -> Tensor:
    """scale e^T x, float32 (float64 for float64) (R, N), or (N, R) if `transposed`."""
    if not use_triton(x_TN):
        out = x_TN.t() @ e_TR if transposed else e_TR.t() @ x_TN
        return out.to(torch.promote_types(out.dtype, torch.float32)).mul_(scale)
    (T, R), N = e_TR.shape, x_TN.shape[1]
    tokens, columns, ranks, warps, stages = WEIGHT_GRADIENT[x_TN.element_size()]
    blocks = triton.cdiv(N, columns)
    # If the columns give too few programs, tokens are split; the partial sums are added in a fixed order.
    parts = max(1, min(PROGRAMS // blocks, triton.cdiv(T, 8 * tokens)))
    share = triton.cdiv(triton.cdiv(T, parts), tokens) * tokens
    shape, (r_stride, n_stride) = ((N, R), (1, R)) if transposed else ((R, N), (N, 1))
    out = torch.zeros((parts, *shape), dtype=torch.float32, device=x_TN.device)
    if T:
        _weight_gradient[(blocks, parts, triton.cdiv(R, ranks))](
            *(e_TR, x_TN, out, e_TR.stride(0), x_TN.stride(0), R * N, r_stride, n_stride, T, N, R, share, scale),
            IEEE=x_TN.dtype == torch.float32, BT=tokens, BN=columns, BR=_width(R, ranks),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


@weight_gradient.register_fake
def _(e_TR, x_TN, scale, transposed):
    R, N = e_TR.shape[1], x_TN.shape[1]
    return x_TN.new_empty((N, R) if transposed else (R, N), dtype=torch.promote_types(x_TN.dtype, torch.float32))


class Projections(NamedTuple):
    """Linear layers of one input: frozen weights (O, I) and biases (O,), or None without one, an adapter for each or
    None, and their common scale s; and their forward and backward passes, without autograd.

    `merge`: in plain torch, adapters may be merged into their weights for a product; worth it for the many tokens of
    training, and the same for every split of a batch, so that all splits agree to the last digit."""

    weights: Sequence[Tensor]
    adapters: Sequence[Adapter]
    scale: float
    merge: bool = False
    biases: Sequence[Tensor | None] = ()  # none at all, or one or None for each layer

    @classmethod
    def from_flat(
        cls, weights: Sequence[Tensor], tensors: Sequence[Tensor | None], scale: float, merge: bool = False
    ) -> Self:
        """From `tensors` as `flat` lists them, the form in which autograd functions take and save adapters."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return cls(weights, [None if a is None or b is None else (a, b) for a, b in pairs], scale, merge)

    @property
    def flat(self) -> list[Tensor | None]:
        """A_1, B_1, A_2, B_2, ..., None where a layer has no adapter."""
        return [t for pair in self.adapters for t in pair or (None, None)]

    @property
    def ranks(self) -> list[int]:
        return [0 if pair is None else pair[0].shape[0] for pair in self.adapters]

    @property
    def stacked_A(self) -> Tensor:
        """A (R, I) of all adapters."""
        return torch.cat([pair[0] for pair in self.adapters if pair is not None])

    def merges(self, w_OI: Tensor, adapter: Adapter, mask_TI: Tensor | None) -> bool:
        """Whether a product uses W + s B A. This saves a pass over its T rows, which costs more than forming the sum if
        T is large. Only if W has the adapter's dtype: rounded to a narrower one, B A would be lost."""
        fits = adapter is not None and mask_TI is None and w_OI.dtype == adapter[0].dtype
        return self.merge and fits and not use_triton(w_OI)

    def weight(self, w_OI: Tensor, adapter: Adapter, mask_TI: Tensor | None) -> Tensor:
        """W, or W + s B A if the adapter is merged for the product."""
        if adapter is None or not self.merges(w_OI, adapter, mask_TI):
            return w_OI
        a_rI, b_Or = adapter
        return torch.addmm(w_OI, b_Or, a_rI, alpha=self.scale)

    def forward(
        self, x_TI: Tensor, base_TO: Tensor | None = None, mask_TI: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """([y_g (T, O_g)], z (T, R)). `base` is added to y_g, in place of a bias; `mask` multiplies the input of A."""
        z_TR = x_TI.new_empty(x_TI.shape[0], 0)
        if any(self.ranks):
            z_TR = shrink(x_TI if mask_TI is None else x_TI * mask_TI, self.stacked_A, 1.0)
        ys, biases = [], self.biases or [base_TO] * len(self.weights)
        zs = z_TR.split(self.ranks, dim=1)
        for w_OI, adapter, z_Tr, base in zip(self.weights, self.adapters, zs, biases, strict=True):
            used_OI = self.weight(w_OI, adapter, mask_TI)
            y_TO = x_TI @ used_OI.t() if base is None else torch.addmm(base, x_TI, used_OI.t())
            if adapter is not None and not self.merges(w_OI, adapter, mask_TI):
                expand(y_TO, z_Tr, adapter[1], self.scale)
            ys.append(y_TO)
        return ys, z_TR

    def backward(
        self, dys: Sequence[Tensor], x_TI: Tensor | None, z_TR: Tensor, need_dx: bool, mask_TI: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
        """(dx or None, [dA_1, dB_1, dA_2, ...]); `x` is read for dA only."""
        dx_TI, e_TR, dbs = self.input_gradient(dys, z_TR, need_dx, mask_TI)
        return dx_TI, self.adapter_gradients(e_TR, dbs, x_TI, mask_TI)

    def input_gradient(
        self, dys: Sequence[Tensor], z_TR: Tensor, need_dx: bool, mask_TI: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """(dx or None, e (T, R) or None without an adapter, [dB_1, ...]): what needs no x."""
        es: list[Tensor] = []
        dbs: list[Tensor | None] = []
        dx_TI, zs = None, z_TR.split(self.ranks, dim=1)
        for dy_TO, w_OI, adapter, z_Tr in zip(dys, self.weights, self.adapters, zs, strict=True):
            if need_dx:
                used_OI = self.weight(w_OI, adapter, mask_TI)
                dx_TI = dy_TO @ used_OI if dx_TI is None else dx_TI.addmm_(dy_TO, used_OI)
            db = None
            if adapter is not None:
                dy_TO, b_Or = dy_TO.contiguous(), adapter[1]
                es.append(shrink(dy_TO, b_Or.t(), self.scale))
                db = weight_gradient(z_Tr, dy_TO, self.scale, True).to(b_Or.dtype)
            dbs.append(db)
        if not es:
            return dx_TI, None, dbs
        e_TR = torch.cat(es, dim=1)
        merged = any(self.merges(w, a, mask_TI) for w, a in zip(self.weights, self.adapters, strict=True))
        if dx_TI is not None and not merged:  # otherwise e A is in dx already
            a_IR = self.stacked_A.t()
            if mask_TI is None:
                expand(dx_TI, e_TR, a_IR, 1.0)
            else:
                dx_TI.addcmul_(mask_TI, e_TR @ a_IR.t().to(e_TR.dtype))
        return dx_TI, e_TR, dbs

    def adapter_gradients(
        self, e_TR: Tensor | None, dbs: Sequence[Tensor | None], x_TI: Tensor | None, mask_TI: Tensor | None = None
    ) -> list[Tensor | None]:
        """[dA_1, dB_1, dA_2, ...] from what `input_gradient` returned and x."""
        if e_TR is None:
            return [None] * (2 * len(dbs))
        assert x_TI is not None
        da_RI = weight_gradient(e_TR, x_TI if mask_TI is None else x_TI * mask_TI, 1.0, False)
        grads: list[Tensor | None] = []
        for adapter, da_rI, db in zip(self.adapters, da_RI.split(self.ranks), dbs, strict=True):
            grads += [None if adapter is None else da_rI.to(adapter[0].dtype), db]
        return grads


class Group(torch.autograd.Function):
    """The outputs of `Projections.forward`; `draw_mask(x, layers)` gives the same mask in both passes, or None."""

    @staticmethod
    def forward(ctx, x_TI, base_TO, scale, merge, draw_mask, weights, biases, *adapters):
        ctx.draw_mask, ctx.count, ctx.options = draw_mask, len(weights), (scale, merge)
        layers = Projections.from_flat(weights, adapters, scale, merge)._replace(biases=biases)
        ys, z_TR = layers.forward(x_TI, base_TO, draw_mask and draw_mask(x_TI, layers))
        # x is kept for dA only.
        ctx.save_for_backward(x_TI if any(layers.ranks) else None, z_TR, *weights, *adapters)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x_TI, z_TR, *rest = ctx.saved_tensors
        layers = Projections.from_flat(rest[: ctx.count], rest[ctx.count :], *ctx.options)
        mask_TI = ctx.draw_mask and ctx.draw_mask(x_TI, layers)
        dx_TI, grads = layers.backward(dys, x_TI, z_TR, ctx.needs_input_grad[0], mask_TI)
        return dx_TI, dys[0] if ctx.needs_input_grad[1] else None, *[None] * 5, *grads


def check_layers(x_TI: Tensor, layers: Projections, shapes: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless weights, biases and adapters fit each other and lie where x does, weights and biases are
    frozen, and each weight's shape ends with its one of `shapes`: (I,) or (O, I)."""
    weights, adapters, biases = layers.weights, layers.adapters, layers.biases or [None] * len(layers.weights)
    if not len(shapes) == len(weights) == len(adapters) == len(biases):
        given = f"{len(weights)} weights, {len(adapters)} adapters and {len(biases)} biases"
        raise ValueError(f"{given} are given; there must be {len(shapes)} of each, None for a missing one")
    x = tuple(x_TI.shape)
    for number, (w_OI, pair, b_O, shape) in enumerate(zip(weights, adapters, biases, shapes, strict=True), 1):
        weight, bias = f"weight {number}", f"bias {number}"
        check_alike(x=x_TI, **{weight: w_OI})
        check_frozen(**{weight: w_OI, bias: b_O})
        if x_TI.dim() != 2 or w_OI.dim() != 2 or tuple(w_OI.shape[-len(shape) :]) != tuple(shape):
            wanted = ", ".join(map(str, shape)) if len(shape) > 1 else f"O, {shape[0]}" if shape else "O, I"
            raise ValueError(f"{weight} {tuple(w_OI.shape)} does not fit x {x}, which must be (T, I): ({wanted})")
        if b_O is not None and b_O.shape != w_OI.shape[:1]:
            raise ValueError(f"{bias} {tuple(b_O.shape)} does not fit {weight} {tuple(w_OI.shape)}")
        if b_O is not None:
            check_alike(x=x_TI, **{bias: b_O})
        if pair is not None:
            _check_adapter(*pair, f"{weight} {tuple(w_OI.shape)}", w_OI, x_TI)


def _check_adapter(a_rI: Tensor, b_Or: Tensor, weight: str, w_OI: Tensor, x_TI: Tensor) -> None:
    (O, I), a, b = w_OI.shape, tuple(a_rI.shape), tuple(b_Or.shape)
    if a_rI.dim() != 2 or a != (len(a_rI), I) or b != (O, len(a_rI)):
        raise ValueError(f"A {a} and B {b} do not fit {weight}")
    for name, t in (("A", a_rI), ("B", b_Or)):
        if t.device != x_TI.device:
            x = tuple(x_TI.shape)
            raise ValueError(f"{name} {tuple(t.shape)} is on {t.device}, x {x} on {x_TI.device}: {weight}")
        if not t.is_floating_point():
            raise ValueError(f"{name} {tuple(t.shape)} is {t.dtype}, x {x_TI.dtype}: {weight}")


def lora_group(
    x_TI: Tensor, weights: Sequence[Tensor], adapters: Sequence[Adapter], scale: float,
    biases: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """y_g (T, O_g) = x W_g^T + b_g + scale (x A_g^T) B_g^T for every layer; differentiable in x, A_g and B_g.

    `adapters[g]` is (A_g, B_g), or None for a layer without one; they may be float32 over a bfloat16 base. `biases`:
    one or None for each layer, or none at all. Raises ValueError if shapes, devices or dtypes do not fit, if a weight
    or bias is not frozen, or if no layer has an adapter."""
    layers = Projections(weights, adapters, scale, biases=biases)
    if all(pair is None for pair in adapters):
        raise ValueError(f"{len(weights)} weights need {len(weights)} adapters, at least one of them not None")
    check_layers(x_TI, layers, [x_TI.shape[-1:]] * len(weights))
    return Group.apply(x_TI, None, scale, False, None, tuple(weights), tuple(biases), *layers.flat)
