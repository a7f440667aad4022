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
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from ptst.kernels import flash_backward, flash_forward
from ptst.kernels.dispatch import block
from ptst.kernels.flash_blocks import Blocks, Part, blocks_of

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


def _work(start: int, end: int, begin: int, other_end: int, size: int, window: int, of_keys: bool) -> int:
    """Tokens of the other tensor that a block has to do with: its loop in the kernels."""
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
    entries.sort(key=lambda entry: _work(*entry, size, window, of_keys), reverse=True)
    found = torch.tensor(entries, dtype=torch.int32).reshape(-1, 4)
    if device.type == "cuda":  # from pageable memory, the host would wait for everything that is queued
        return found.pin_memory().to(device, non_blocking=True)
    return found.to(device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for t in tensors for s in t.stride()[:2])


def _descriptor(x_TKD: Tensor, rows: int, wide: int):
    """How TMA copies `rows` tokens of a head, or None where it cannot (addresses and strides by 16 bytes)."""
    size = x_TKD.element_size()
    if x_TKD.data_ptr() % 16 or any(stride * size % 16 for stride in x_TKD.stride()[:2]) or x_TKD.stride(2) != 1:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x_TKD, list(x_TKD.shape), list(x_TKD.stride()), [rows, 1, wide])


def _descriptors(*tensors: Tensor, rows: int, wide: int, tma: bool) -> tuple:
    """A descriptor for each, or None for each."""
    found = tuple(_descriptor(x, rows, wide) for x in tensors) if tma else (None,)
    return found if all(x is not None for x in found) else (None,) * len(tensors)


def _current(x: Tensor) -> AbstractContextManager:
    """Inside, kernels are launched on the GPU of x, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _constants(shape: Blocks, q_THD: Tensor, window: int, tma: bool) -> dict[str, object]:
    """What a kernel is compiled for."""
    D, wide = q_THD.shape[2], _wide(q_THD)
    sizes = {"BM": shape.queries, "BN": shape.keys, "BD": wide, "EDGE": shape.edge}
    copies = {"STAGES": shape.stages, "EDGE_STAGES": shape.edge_stages, "TMA": tma, "WHOLE": D == wide}
    kind = {"WINDOW": window > 0, "IEEE": q_THD.dtype == torch.float32}
    return sizes | copies | kind | {"num_warps": shape.warps, "num_stages": shape.stages}


def _wide(q_THD: Tensor) -> int:
    """Columns of a block that holds a head: tl.dot wants 16 at least."""
    return max(16, block(q_THD.shape[2], WIDEST))


@torch.library.custom_op("ptst::attention", mutates_args=())
def op(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], window: int
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), log-sum-exp in base 2, float32 (H, T)). `window` 0: none."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    out_THD, lse_HT = q_THD.new_empty((T, H, D)), q_THD.new_empty((H, T), dtype=torch.float32)
    shape = blocks(q_THD.device, D, q_THD.dtype, H // K, "forward")
    queries_B4 = table(tuple(cu_q), tuple(cu_k), shape.queries, q_THD.device, window)
    if len(queries_B4):
        k_tma, v_tma = _descriptors(k_TKD, v_TKD, rows=shape.keys, wide=_wide(q_THD), tma=shape.tma)
        with _current(q_THD):
            flash_forward.forward[(H, len(queries_B4))](
                *(q_THD, k_TKD, v_TKD, out_THD, lse_HT, queries_B4, k_tma, v_tma, *_strides(q_THD, k_TKD, v_TKD)),
                *(T, H, H // K, window, D**-0.5 * LOG2E, D),
                **_constants(shape, q_THD, window, k_tma is not None),
            )
    return out_THD, lse_HT


@op.register_fake
def _(q_THD, k_TKD, v_TKD, cu_q, cu_k, window):
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty((q_THD.shape[1], len(q_THD)), dtype=torch.float32)


@torch.library.custom_op("ptst::attention_backward", mutates_args=())
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
    """(dq, dk, dv)."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    dq_THD, dk_TKD, dv_TKD = (x.new_empty(x.shape) for x in (q_THD, k_TKD, v_TKD))
    delta_HT = q_THD.new_empty((H, T), dtype=torch.float32)
    numbers = (*_strides(q_THD, k_TKD, v_TKD), T, H, H // K, window, D**-0.5, D**-0.5 * LOG2E, D)
    given = (q_THD, k_TKD, v_TKD, do_THD, lse_HT, delta_HT)
    of_queries, of_keys = (blocks(q_THD.device, D, q_THD.dtype, H // K, part) for part in ("dq", "dkdv"))
    queries_B4 = table(tuple(cu_q), tuple(cu_k), of_queries.queries, q_THD.device, window)
    keys_B4 = table(tuple(cu_k), tuple(cu_q), of_keys.keys, q_THD.device, window, True)
    tile = {"wide": _wide(q_THD)}
    with _current(q_THD):
        if len(queries_B4):
            flash_backward.delta[(-(-T // 32), H)](
                out_THD, do_THD, delta_HT, T, H, D, BM=32, BD=tile["wide"], num_warps=4
            )
            k_tma, v_tma = _descriptors(k_TKD, v_TKD, rows=of_queries.keys, tma=of_queries.tma, **tile)
            flash_backward.dq[(H, len(queries_B4))](
                *(*given, dq_THD, queries_B4, k_tma, v_tma, *numbers),
                **_constants(of_queries, q_THD, window, k_tma is not None),
            )
        if len(keys_B4):
            # Without a query there is nothing to describe, and the loops are empty.
            q_tma, do_tma = _descriptors(q_THD, do_THD, rows=of_keys.queries, tma=of_keys.tma and T > 0, **tile)
            flash_backward.dkdv[(K, len(keys_B4))](
                *(*given, dk_TKD, dv_TKD, keys_B4, q_tma, do_tma, *numbers),
                **_constants(of_keys, q_THD, window, q_tma is not None),
            )
    return dq_THD, dk_TKD, dv_TKD


@backward_op.register_fake
def _(do_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, cu_q, cu_k, window):
    return tuple(x.new_empty(x.shape) for x in (q_THD, k_TKD, v_TKD))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.bounds = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do_THD, _dlse):
    dq, dk, dv = torch.ops.ptst.attention_backward(do_THD.contiguous(), *ctx.saved_tensors, *ctx.bounds)
    return dq, dk, dv, None, None, None


op.register_autograd(_differentiate, setup_context=_setup)
