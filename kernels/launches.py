"""The launches that compile.py asks the compiler for: each kernel's own launch code, on meta tensors, at the shapes
of Llama's models and at odd ones. A launch has a note, by which tables and main_loops.json name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ptst.kernels import (
    attention_decode,
    attention_prefill,
    flash_attention,
    linear_cross_entropy,
    lora,
    lora_folded,
    multi_lora,
    rms_norm,
    rope,
    rope_store,
    sampling,
    swiglu,
)

Launch = tuple[str, Callable[[], object]]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launches() -> Iterator[Launch]:
    """Forward and backward for the models' head sizes, two documents, with and without a window."""
    forward, backward = flash_attention.op._init_fn, flash_attention.backward_op._init_fn
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, kv_heads, head_dim, window in (
            (32, 8, 64, 0),
            (32, 8, 96, 0),
            (32, 8, 128, 0),
            (32, 8, 128, 4096),
            (28, 4, 128, 0),
            (16, 8, 256, 4096),
        ):
            q, k = (meta(512, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
            lse, bounds = meta(heads, 512), [0, 200, 512]
            group = "" if heads == 32 else f" H={heads} K={kv_heads}"  # Qwen2's: no power of two
            note = f"attention {str(dtype).removeprefix('torch.')} D={head_dim} W={window}{group}"
            yield note, partial(forward, q, k, k, bounds, bounds, window)
            yield note, partial(backward, q, q, k, k, q, lse, bounds, bounds, window)
            if (head_dim, window) == (128, 0):
                heads_each = (heads, kv_heads, kv_heads)
                qkv = meta(512, sum(heads_each), head_dim, dtype=dtype).split(heads_each, 1)
                yield f"{note} joined", partial(forward, *qkv, bounds, bounds, window)
                yield f"{note} joined", partial(backward, q, *qkv, q, lse, bounds, bounds, window)


def decode_launches() -> Iterator[Launch]:
    """One request over a cache without blocks, its keys split; many over the engine's blocks of 32, heads first."""
    decode = attention_decode._op._init_fn
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim, heads in ((64, 32), (128, 32), (128, 8), (128, 4)):
            q, k = (
                meta(64, 32 if heads > 4 else 28, head_dim, dtype=dtype),
                meta(64, 1024, heads, head_dim, dtype=dtype),
            )
            lengths, counters = meta(64, dtype=torch.int32), meta(64 * heads, dtype=torch.int32)
            note = f"decode {str(dtype).removeprefix('torch.')} D={head_dim} K={heads}"
            yield f"{note} split", partial(decode, q[:1], k, k, None, lengths[:1], 0, 4, counters)
            table, blocks = (
                meta(64, 40, dtype=torch.int32),
                k.view(64 * 1024 // 32, heads, 32, head_dim).transpose(1, 2),
            )
            yield f"{note} blocks", partial(decode, q, blocks, blocks, table, lengths, 0, 4, counters)


def prefill_launch(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, window: int) -> None:
    """With the tile of the architecture that is compiled for."""
    rows = attention_prefill.blocks(q.device, q.shape[2], q.dtype, q.shape[1] // k.shape[2]).queries
    attention_prefill._op._init_fn(q, k, k, table, meta(16, 5, dtype=torch.int32), rows, window)


def prefill_launches() -> Iterator[Launch]:
    """Chunks of new tokens over the engine's blocks of 32, heads first, with and without a window; one of each."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, kv_heads, head_dim, window in (
            (32, 8, 64, 0),
            (32, 8, 96, 0),
            (32, 8, 128, 0),
            (32, 32, 128, 4096),
            (28, 4, 128, 0),
            (16, 8, 256, 4096),
        ):
            q, cache = meta(512, heads, head_dim, dtype=dtype), meta(2048, kv_heads, 32, head_dim, dtype=dtype)
            group = "" if heads == 32 else f" H={heads} K={kv_heads}"
            note = f"prefill {str(dtype).removeprefix('torch.')} D={head_dim} W={window}{group}"
            table = meta(8, 40, dtype=torch.int32)
            yield note, partial(prefill_launch, q, cache.transpose(1, 2), table, window)
    q, k, table = meta(1, 1, 20), meta(1, 4, 1, 20), meta(1, 1, dtype=torch.int32)
    for window in (0, 1):
        yield f"prefill float32 D=20 W={window} of one", partial(prefill_launch, q, k, table, window)


def rope_store_launches() -> Iterator[Launch]:
    """A decode step's of Llama-3's heads into the engine's blocks, and odd shapes."""
    for dtype in (torch.bfloat16, torch.float32):
        for T, Q, K, D, P in ((64, 32, 8, 128, 32), (7, 3, 1, 20, 5)):
            cache, angles = meta(256, K, P, D, dtype=dtype), meta(T, 1, D // 2)
            given = meta(T, Q + 2 * K, D, dtype=dtype), angles, angles, meta(T, dtype=torch.long), cache, cache
            kind = str(dtype).removeprefix("torch.")
            w = meta(D, dtype=dtype)
            note, norms = f"rope_store {kind} D={D} Q={Q} K={K}", rope_store.HeadNorms(w, w, 1e-6)
            yield note, partial(rope_store.rotate_and_store, *given)
            yield f"{note} norms", partial(rope_store.rotate_and_store, *given, norms)


def lora_launches() -> Iterator[Launch]:
    """Llama-2-7B's q, k and v at rank 16, gate and up at rank 64, the adapter in float32; an odd shape."""
    shrink, expand, gradient = (f._init_fn for f in (lora.shrink, lora.expand, lora.weight_gradient))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, I, O, R in ((4096, 4096, 4096, 48), (4096, 4096, 11008, 192), (77, 33, 45, 3)):
            x, y, z = (meta(T, n, dtype=dtype) for n in (I, O, R))
            a, b = meta(R, I), meta(O, R)
            note = f"lora {str(dtype).removeprefix('torch.')} I={I} O={O} R={R}"
            yield note, partial(shrink, x, a, 1.0)
            yield f"{note} e", partial(shrink, y, b.t(), 2.0)
            yield note, partial(expand, y, z, b, 2.0)
            yield f"{note} dx", partial(expand, x, z, a.t(), 1.0)
            yield f"{note} dA", partial(gradient, z, x, 1.0, False)
            yield f"{note} dB", partial(gradient, z, y, 2.0, True)


def folded_launches() -> Iterator[Launch]:
    """A layer of Llama-2-7B with rank 16 on all projections, and one of rank 64; an odd shape."""
    for dtype in (torch.bfloat16, torch.float32):
        for T, E, F, r in ((4096, 4096, 11008, 16), (4096, 4096, 11008, 64), (77, 33, 45, 3)):
            note, R = f"folded {str(dtype).removeprefix('torch.')} E={E} F={F} r={r}", -(-r // 8) * 8
            x, y, d = (meta(T, n, dtype=dtype) for n in (E, 2 * F, F + R))
            w, rstd = meta(E, dtype=dtype), meta(T)
            all3, all2 = (-(-n * r // 8) * 8 for n in (3, 2))
            a3, a2, a = meta(all3, E, dtype=dtype), meta(all2, E, dtype=dtype), meta(R, F, dtype=dtype)
            e3, dx3, z2, z = (meta(T, n, dtype=dtype) for n in (all3, E + all3, all2, R))
            yield f"{note} qkv", partial(lora_folded.norm_shrink, x, w, a3, 1e-5)
            yield f"{note} qkv", partial(lora_folded.norm_backward, dx3, x, (w, rstd), a3, x)
            yield f"{note} gate_up", partial(lora_folded.norm_shrink, x, w, a2, 1e-5)
            yield f"{note} down", partial(lora_folded.swiglu_shrink, y, a)
            yield f"{note} o", partial(lora_folded.add_product, x, x, z, meta(E, E + R, dtype=dtype)[:, E:])
            dx = meta(T, E + R, dtype=dtype)
            back = partial(lora_folded.add_product, dx[:, :E], None, dx[:, E:], meta(R, E, dtype=dtype).t())
            yield f"{note} o, dx", back
            sums = lora_folded.Sums(meta(2, 8 * E * r + 8 * F * r), 2048)
            yield f"{note} down, dx", partial(lora_folded.swiglu_backward, d, y, a, z2, (r, r), 2.0, sums)
            given = partial(lora_folded.gradients, e3, x, (w, rstd), e3, [x, x, x], [r, r, r], 2.0, sums)
            yield f"{note} qkv, dA and dB", given
            yield f"{note} o, dA and dB", partial(lora_folded.gradients, z, x, None, z, [x], [r], 2.0, sums)
            mask = lora_folded.Mask(meta(T, dtype=torch.long), meta(T, dtype=torch.int32), 16, 214748365, 1 / 0.95)
            yield f"{note} qkv, dropout", partial(lora_folded.norm_shrink, x, w, a3, 1e-5, mask)
            yield f"{note} qkv, dropout", partial(lora_folded.norm_backward, dx3, x, (w, rstd), a3, x, mask)
            yield f"{note} down, dropout", partial(lora_folded.swiglu_shrink, y, a, mask)
            back = partial(lora_folded.swiglu_backward, d, y, a, z2, (r, r), 2.0, sums, mask)
            yield f"{note} down, dx, dropout", back
            yield f"{note} qkv, dA and dB, dropout", partial(given, mask=mask)
            yield f"{note} o, dropout", partial(lora_folded.shrink_dropped, x, meta(R, E, dtype=dtype), mask)
            back = partial(lora_folded.add_product, dx[:, :E], None, dx[:, E:], meta(R, E, dtype=dtype).t(), mask)
            yield f"{note} o, dx, dropout", back


def loss_launch(logits_nV: torch.Tensor, targets_n: torch.Tensor, losses_n: torch.Tensor) -> None:
    """The loss's own kernel, between its two multiplications."""
    grid, V = (logits_nV.shape[0],), logits_nV.shape[1]
    for grad in (False, True):
        linear_cross_entropy._softmax_gradient[grid](
            *(logits_nV, targets_n, targets_n, losses_n, V, 0.75),
            WEIGHTED=False, GRAD=grad, BLOCK=linear_cross_entropy.BLOCK, num_warps=8,
        )  # fmt: skip


def multi_lora_launches() -> Iterator[Launch]:
    """Eight adapters of rank 16 on q, k and v and on a feed-forward block: decoding, prompts, and an odd shape."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, I, O, R in ((64, 4096, 6144, 48), (4096, 4096, 28672, 32), (7, 33, 45, 3)):
            y, x, which = meta(T, O, dtype=dtype), meta(T, I, dtype=dtype), meta(T, dtype=torch.int32)
            ranks = meta(8, dtype=torch.int32)
            stacked = multi_lora.Stacked(meta(8, R, I, dtype=dtype), meta(8, R, O, dtype=dtype), ranks)
            note = f"multi_lora {str(dtype).removeprefix('torch.')} T={T} I={I} O={O} R={R}"
            yield note, partial(multi_lora.launch_shrink, x, which, stacked)
            z = meta(4 if T == 64 else 1, T, R)
            yield note, partial(multi_lora.launch_expand, y, z, which, stacked)


def sampling_launches() -> Iterator[Launch]:
    """Llama-3's vocabulary, Llama-2's, and an odd one."""
    for V in (128256, 32000, 301):
        given = meta(64, V), meta(64, dtype=torch.int32), meta(2, 64, dtype=torch.float64)
        yield f"sampling V={V}", partial(sampling.launch, *given)


def launches() -> Iterator[Launch]:
    """Every kernel with the shapes that matter: Llama-2-7B's, and an odd one without any divisibility."""
    for module in (lora, rms_norm, rope, rope_store, swiglu):
        vars(module)["use_triton"] = lambda *_: True
    yield from attention_launches()
    yield from prefill_launches()
    yield from decode_launches()
    yield from rope_store_launches()
    yield from lora_launches()
    yield from folded_launches()
    yield from multi_lora_launches()
    yield from sampling_launches()
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for T, H, F, Q, K, D in ((512, 4096, 11008, 32, 8, 128), (7, 33, 77, 3, 1, 20)):
            x, w, g = meta(T, H, dtype=dtype), meta(H, dtype=dtype), meta(T, F, dtype=dtype)
            r, cos = meta(T), meta(T, 1, D // 2)
            q, k = (meta(T, n, D, dtype=dtype) for n in (Q, K))
            # The operators' bodies: a call of the operator would send meta tensors to the fake kernels.
            norm, norm_back = rms_norm._op._init_fn, rms_norm._backward_op._init_fn
            rotate, act, act_back = rope._op._init_fn, swiglu._op._init_fn, swiglu._backward_op._init_fn
            yield f"rms_norm {kind} H={H}", partial(norm, x, None, w, 1e-5)
            rows = meta(T * Q, D, dtype=dtype)  # queries by head, as Qwen3 normalizes them
            yield f"rms_norm {kind} H={D} heads", partial(norm, rows, None, meta(D, dtype=dtype), 1e-6)
            back = partial(norm_back, rows, None, rows, meta(D, dtype=dtype), meta(T * Q), True)
            yield f"rms_norm {kind} H={D} heads, dw", back
            yield f"rms_norm {kind} H={H} residual", partial(norm, x, x, w, 1e-5)
            yield f"rms_norm {kind} H={H} frozen", partial(norm_back, x, None, x, w, r, False)
            yield f"rms_norm {kind} H={H} residual, dw", partial(norm_back, x, x, x, w, r, True)
            yield f"swiglu {kind} F={F}", partial(act, g, g)
            yield f"swiglu {kind} F={F}", partial(act_back, g, g, g, False)
            yield f"swiglu {kind} F={F} and h", partial(act_back, g, g, g, True)
            if T > 7:  # the widest
                x, w = meta(T, rms_norm.WIDEST, dtype=dtype), meta(rms_norm.WIDEST, dtype=dtype)
                yield f"rms_norm {kind} H={rms_norm.WIDEST} residual", partial(norm, x, x, w, 1e-5)
                yield f"rms_norm {kind} H={rms_norm.WIDEST} frozen", partial(norm_back, x, x, x, w, r, False)
                yield f"rms_norm {kind} H={rms_norm.WIDEST} residual, dw", partial(norm_back, x, x, x, w, r, True)
            logits, ids = meta(T, F, dtype=dtype), meta(T, dtype=torch.long)
            yield f"loss {kind} V={F}", partial(loss_launch, logits, ids, r)
            yield f"rope {kind} D={D} Q={Q} K={K}", partial(rotate, q, k, cos, cos, False)
            qk = meta(T, Q + 2 * K, D, dtype=dtype).split((Q, K, K), 1)[:2]
            yield f"rope in place {kind} D={D} Q={Q} K={K}", partial(rope.launch, qk, qk, (cos, cos))
