r"""Flash attention (Dao et al. 2022, arXiv 2205.14135; 2023, arXiv 2307.08691) over packed documents, in Triton.

For a query, with s_j = scale q . k_j over the keys that it sees; the maximum m and the sum l are updated key by key:

    p_j = exp(s_j - m) / l        o = sum_j p_j v_j        L = m + log l  (kept for backward: one float32 per query)

    delta = do . o        dp_j = do . v_j        ds_j = p_j (dp_j - delta)
    dq = scale sum_j ds_j k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i p_ij do_i

A program takes a block of queries of one document (forward, dq), or a block of its keys (dk, dv). Its loops cover only
the keys or queries that causality, the window and the document allow: there is no full mask, and only blocks at the
edges compute scores that are discarded. A program of dk and dv loops over all query heads of its key head, so that no
two programs add to the same address: the backward pass is deterministic, without atomics. The kernels are in
flash_forward.py and flash_backward.py, their block shapes in flash_blocks.py; here they are launched.

Query i of a document with q queries and k keys is aligned with key i + k - q (bottom-right). Tables of blocks are built
on the host, where the boundaries are known, int32: (first token of the block, end of the document in its own tensor,
first and end of the document in the other tensor); "own" is q for blocks of queries, k for blocks of keys.

Shapes: T tokens, H query heads, K key heads, D head_dim, B blocks; in the kernels row = token, i queries, j keys.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ptst.kernels import flash_backward, flash_forward
from ptst.kernels.dispatch import block, launchable
from ptst.kernels.flash_blocks import Blocks, Part, blocks_of
from ptst.kernels.joined import gradients_like
from ptst.kernels.operators import operator
from ptst.kernels.transfer import to_device

LOG2E = 1.4426950408889634
FORCED: tuple[int, int] | None = None  # set by tests: small blocks, so that short documents have several
TMA: bool | None = None  # set by tests: with or without tensor descriptors
ARCH: int | None = None  # set by compile.py, which has no GPU to ask
WIDEST = 256  # head_dim that a block can hold


def blocks(device: torch.device, head_dim: int, dtype: torch.dtype, group: int, part: Part) -> Blocks:
    """The block shapes of one pass."""
    if FORCED is not None:
        return Blocks(*FORCED, edge=16, warps=4, stages=1, tma=TMA is not False)
    return blocks_of(ARCH, device, head_dim, dtype, group, part)


def _work(entry: tuple[int, int, int, int], size: int, window: int, of_keys: bool) -> int:
    """Tokens of the other tensor that a block has to do with: its loop in the kernels."""
    start, end, begin, other_end = entry
    last = min(start + size, end)
    if of_keys:
        offset = end - other_end
        high = min(other_end, last - 1 - offset + window) if window else other_end
        return high - max(begin, start - offset)
    offset = other_end - end
    return last + offset - max(begin, start + offset - window + 1 if window else begin)


@lru_cache(64)
def table(
    cu_own: tuple[int, ...],
    cu_other: tuple[int, ...],
    size: int,
    device: torch.device,
    window: int = 0,
    of_keys: bool = False,
) -> Tensor:
    """Blocks of at most `size` tokens of each document: int32 (B, 4), most work first, as it is launched first. Work
    is the number of keys that the block's queries see, or (`of_keys`) of queries that see the block's keys."""
    spans = zip(cu_own, cu_own[1:], cu_other, cu_other[1:], strict=False)
    entries = [(start, b, c, d) for a, b, c, d in spans for start in range(a, b, size)]
    entries.sort(key=lambda entry: _work(entry, size, window, of_keys), reverse=True)
    return to_device(torch.tensor(entries, dtype=torch.int32).reshape(-1, 4), device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for t in tensors for s in t.stride()[:2])


def _descriptor(x_TKD: Tensor, rows: int, wide: int):
    """How TMA copies `rows` tokens of a head, or None where it cannot (addresses and strides by 16 bytes, none 0)."""
    size = x_TKD.element_size()
    if (
        x_TKD.data_ptr() % 16
        or any(stride * size % 16 or not stride for stride in x_TKD.stride()[:2])
        or x_TKD.stride(2) != 1
    ):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x_TKD, list(x_TKD.shape), list(x_TKD.stride()), [rows, 1, wide])


def _descriptors(*tensors: Tensor, rows: int, wide: int, tma: bool) -> tuple:
    """A descriptor for each, or None for each."""
    found = tuple(_descriptor(x, rows, wide) for x in tensors) if tma else (None,)
    return found if all(x is not None for x in found) else (None,) * len(tensors)


def _constants(shape: Blocks, q_THD: Tensor, window: int, tma: bool) -> dict[str, object]:
    """What a kernel is compiled for."""
    D, wide = q_THD.shape[2], _wide(q_THD)
    sizes: dict[str, object] = {"BM": shape.queries, "BN": shape.keys, "BD": wide, "EDGE": shape.edge}
    copies = {"STAGES": shape.stages, "EDGE_STAGES": shape.edge_stages, "TMA": tma, "WHOLE": wide == D}
    kind = {"WINDOW": window > 0, "IEEE": q_THD.dtype == torch.float32}
    return sizes | copies | kind | {"num_warps": shape.warps, "num_stages": shape.stages}


def _wide(q_THD: Tensor) -> int:
    """Columns of a block that holds a head: tl.dot wants 16 at least."""
    return max(16, block(q_THD.shape[2], WIDEST))


Bounds = tuple[tuple[int, ...], tuple[int, ...], int]  # cu_q, cu_k, window


def launch_forward(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: Bounds, shape: Blocks) -> tuple[Tensor, Tensor]:
    """(out, lse) of `op`, with these block shapes."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    cu_q, cu_k, window = bounds
    out_THD, lse_HT = q_THD.new_empty((T, H, D)), q_THD.new_empty((H, T), dtype=torch.float32)
    queries_B4 = table(cu_q, cu_k, shape.queries, q_THD.device, window)
    for part_B4 in launchable(queries_B4) if len(queries_B4) else ():
        k_tma, v_tma = _descriptors(k_TKD, v_TKD, rows=shape.keys, wide=_wide(q_THD), tma=shape.tma)
        flash_forward.forward[(H, len(part_B4))](
            *(q_THD, k_TKD, v_TKD, out_THD, lse_HT, part_B4, k_tma, v_tma, *_strides(q_THD, k_TKD, v_TKD)),
            *(T, H, H // K, window, D**-0.5 * LOG2E, D),
            **_constants(shape, q_THD, window, k_tma is not None),
        )
    return out_THD, lse_HT


def _numbers(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, out: Tensor, window: int) -> tuple:
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    return (*_strides(q_THD, k_TKD, v_TKD), out.stride(0), T, H, H // K, window, D**-0.5, D**-0.5 * LOG2E, D)


def launch_dq(given: tuple[Tensor, ...], bounds: Bounds, shape: Blocks, dq_THD: Tensor) -> None:
    """Writes dq of q, k, v, do, lse and delta, with these block shapes. Its heads are dense, its rows need not be."""
    q_THD, k_TKD, v_TKD = given[:3]
    cu_q, cu_k, window = bounds
    queries_B4 = table(cu_q, cu_k, shape.queries, q_THD.device, window)
    for part_B4 in launchable(queries_B4) if len(queries_B4) else ():
        k_tma, v_tma = _descriptors(k_TKD, v_TKD, rows=shape.keys, wide=_wide(q_THD), tma=shape.tma)
        flash_backward.dq[(q_THD.shape[1], len(part_B4))](
            *(*given, dq_THD, part_B4, k_tma, v_tma, *_numbers(q_THD, k_TKD, v_TKD, dq_THD, window)),
            **_constants(shape, q_THD, window, k_tma is not None),
        )


def launch_dkdv(given: tuple[Tensor, ...], bounds: Bounds, shape: Blocks, dk_TKD: Tensor, dv_TKD: Tensor) -> None:
    """Writes dk and dv of q, k, v, do, lse and delta, with these block shapes. Their heads are dense, their rows are as
    far apart in the one as in the other."""
    q_THD, k_TKD, v_TKD, do_THD = given[:4]
    cu_q, cu_k, window = bounds
    keys_B4 = table(cu_k, cu_q, shape.keys, q_THD.device, window, True)
    for part_B4 in launchable(keys_B4) if len(keys_B4) else ():
        # Without a query there is nothing to describe, and the loops are empty.
        tma = shape.tma and len(q_THD) > 0
        q_tma, do_tma = _descriptors(q_THD, do_THD, rows=shape.queries, wide=_wide(q_THD), tma=tma)
        flash_backward.dkdv[(k_TKD.shape[1], len(part_B4))](
            *(*given, dk_TKD, dv_TKD, part_B4, q_tma, do_tma, *_numbers(q_THD, k_TKD, v_TKD, dk_TKD, window)),
            **_constants(shape, q_THD, window, q_tma is not None),
        )


@operator("attention")
def op(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], window: int
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), log-sum-exp in base 2, float32 (H, T)). `window` 0: none."""
    shape = blocks(q_THD.device, q_THD.shape[2], q_THD.dtype, q_THD.shape[1] // k_TKD.shape[1], "forward")
    return launch_forward(q_THD, k_TKD, v_TKD, (tuple(cu_q), tuple(cu_k), window), shape)


@op.register_fake
def _(q_THD, k_TKD, v_TKD, cu_q, cu_k, window):
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty((q_THD.shape[1], len(q_THD)), dtype=torch.float32)


@operator("attention_backward")
def backward_op(
    do_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); columns of one tensor where q, k and v are."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    given = (q_THD, k_TKD, v_TKD, do_THD, lse_HT, q_THD.new_empty((H, T), dtype=torch.float32))
    bounds = (tuple(cu_q), tuple(cu_k), window)
    if T:
        flash_backward.delta[(-(-T // 32), H)](out_THD, do_THD, given[5], T, H, D, BM=32, BD=_wide(q_THD), num_warps=8)
    of_queries, of_keys = (blocks(q_THD.device, D, q_THD.dtype, H // K, part) for part in ("dq", "dkdv"))
    dq_THD, dk_TKD, dv_TKD = gradients_like(q_THD, k_TKD, v_TKD)
    launch_dq(given, bounds, of_queries, dq_THD)
    launch_dkdv(given, bounds, of_keys, dk_TKD, dv_TKD)
    return dq_THD, dk_TKD, dv_TKD


@backward_op.register_fake
def _(do_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, cu_q, cu_k, window):
    return gradients_like(q_THD, k_TKD, v_TKD)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.bounds = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do_THD, _dlse):
    dq, dk, dv = torch.ops.ptst.attention_backward(do_THD.contiguous(), *ctx.saved_tensors, *ctx.bounds)
    return dq, dk, dv, None, None, None


op.register_autograd(_differentiate, setup_context=_setup)
