r"""Paged attention of new tokens on a CPU: apply the rotary embedding, store keys and values, attend.

Each of the R queries is one new token. Its queries and keys are rotated by its position (rope.py), its key and value
are stored in the KV cache, and for each query head, over the tokens j that it sees,

    s_j = q . k_j / sqrt(D)        p_j = exp(s_j - max s) / sum        o = sum_j p_j v_j.

Entry r of the block table names the blocks of query r. Queries may share blocks: requests with a common prefix, or
several tokens of one request, each one token longer than the one before. A block is read from end to end for all query
heads of a group in turn, so it comes from memory once. A query's result does not depend on the other queries, to the
bit.

Keys and values are float32, or bfloat16 (as uint16), which halves the reading: a block is then widened into a buffer
that stays in the first-level cache. All arithmetic is in float32.

The sizes are constants of the compiled code, so that vectors of D elements stay in registers. Weights below e^-80 of
the largest become e^-80.

Shapes: T new tokens, the first R of which attend; H query heads, K key/value heads, G = H / K, D head_dim, B blocks of
P tokens, N blocks per query at most, L keys of a query.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy import ndarray as Array

from ptst.kernels.cpu import compiled, exponential, jitable, num_threads_for, run_in_threads

WORTH_A_THREAD = 4096  # keys to read


@cache
def _rotate_and_store(H: int, K: int, D: int, P: int, wide: bool) -> Callable:
    half = D // 2
    below_half, low_bit, not_a_number = np.uint32(0x7FFF), np.uint32(1), np.uint16(0x7FC0)

    def rotate_and_store(qkv_THD, cos_TD2, sin_TD2, slots_T, k_BKPD, v_BKPD):
        for t in range(qkv_THD.shape[0]):
            for h in range(H + K):
                x = qkv_THD[t, h]
                for d in range(half):
                    a, b = x[d], x[d + half]
                    x[d] = a * cos_TD2[t, d] - b * sin_TD2[t, d]
                    x[d + half] = b * cos_TD2[t, d] + a * sin_TD2[t, d]
            b, p = slots_T[t] // P, slots_T[t] % P
            for k in range(K):
                if wide:
                    for d in range(D):
                        k_BKPD[b, k, p, d] = qkv_THD[t, H + k, d]
                        v_BKPD[b, k, p, d] = qkv_THD[t, H + K + k, d]
                else:  # to the nearest bfloat16, ties to even
                    for h, to in ((H + k, k_BKPD), (H + K + k, v_BKPD)):
                        for d in range(D):
                            x = qkv_THD[t, h, d]
                            bits = np.float32(x).view(np.uint32)
                            rounded = np.uint16((bits + below_half + ((bits >> 16) & low_bit)) >> 16)
                            to[b, k, p, d] = rounded if x == x else not_a_number

    return compiled(rotate_and_store)


def _block(P: int, D: int, wide: bool) -> Callable:
    """A block in float32: itself, or widened into a buffer."""

    def as_it_is(block_PD, _buffer_PD):
        return block_PD

    def widened(block_PD, buffer_PD):
        for p in range(P):
            for d in range(D):
                buffer_PD[p, d] = np.uint32(np.uint32(block_PD[p, d]) << 16).view(np.float32)
        return buffer_PD

    return jitable(as_it_is if wide else widened)


def _softmax() -> Callable:
    zero, one, lowest, exp = np.float32(0), np.float32(1), np.float32(-np.inf), exponential(-80)

    def softmax(s_L, low, high):
        """In place, over the scores from `low` to `high`; the others get a weight of zero."""
        s_L[:low] = lowest
        s_L[high:] = lowest
        m0, m1, m2, m3, m4, m5, m6, m7 = lowest, lowest, lowest, lowest, lowest, lowest, lowest, lowest
        for j in range(0, len(s_L), 8):
            m0 = s_L[j] if s_L[j] > m0 else m0
            m1 = s_L[j + 1] if s_L[j + 1] > m1 else m1
            m2 = s_L[j + 2] if s_L[j + 2] > m2 else m2
            m3 = s_L[j + 3] if s_L[j + 3] > m3 else m3
            m4 = s_L[j + 4] if s_L[j + 4] > m4 else m4
            m5 = s_L[j + 5] if s_L[j + 5] > m5 else m5
            m6 = s_L[j + 6] if s_L[j + 6] > m6 else m6
            m7 = s_L[j + 7] if s_L[j + 7] > m7 else m7
        top = max(max(max(m0, m1), max(m2, m3)), max(max(m4, m5), max(m6, m7)))
        seen_L = s_L[low:high]
        total = zero
        for j in range(len(seen_L)):  # from 0: possibly negative indices would not be vectorized
            x = seen_L[j] - top
            e = exp(x)
            e = e if x == x else x
            seen_L[j] = e
            total += e
        s_L[:low] = zero
        s_L[high:] = zero
        share = one / total
        for j in range(len(seen_L)):
            seen_L[j] *= share

    return jitable(softmax)


@cache
def _attend(H: int, K: int, D: int, P: int, wide: bool) -> Callable:
    if P % 8 or H % K:
        raise ValueError(f"{H} query heads, {K} key heads, blocks of {P} tokens: H / K and P / 8 must be whole numbers")
    G, zero, scale = H // K, np.float32(0), np.float32(1 / math.sqrt(D))
    block, softmax = _block(P, D, wide), _softmax()

    def attend(qkv_THD, kv_BKPD, visible, out_RHD, start, end):
        (k_BKPD, v_BKPD), (table_RN, lengths_R, window) = kv_BKPD, visible
        s_HL = np.empty((H, table_RN.shape[1] * P), np.float32)
        buffer_PD = np.empty((P, D), np.float32)
        for r in range(start, end):
            length = lengths_R[r]
            low = max(0, length - window) if window else 0
            first, last = low // P, (length + P - 1) // P  # blocks
            for i in range(first, last):
                for k in range(K):
                    k_PD = block(k_BKPD[table_RN[r, i], k], buffer_PD)
                    for h in range(k * G, (k + 1) * G):
                        q_D, s_P = qkv_THD[r, h], s_HL[h, i * P : (i + 1) * P]
                        for p in range(0, P, 4):
                            k0, k1, k2, k3 = k_PD[p], k_PD[p + 1], k_PD[p + 2], k_PD[p + 3]
                            s0, s1, s2, s3 = zero, zero, zero, zero
                            for d in range(D):
                                x = q_D[d]
                                s0 += x * k0[d]
                                s1 += x * k1[d]
                                s2 += x * k2[d]
                                s3 += x * k3[d]
                            s_P[p], s_P[p + 1], s_P[p + 2], s_P[p + 3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale
            for h in range(H):
                softmax(s_HL[h, first * P : last * P], low - first * P, length - first * P)
                out_RHD[r, h] = zero
            for i in range(first, last):
                for k in range(K):
                    v_PD = block(v_BKPD[table_RN[r, i], k], buffer_PD)
                    for h in range(k * G, (k + 1) * G):
                        o_D, w_P = out_RHD[r, h], s_HL[h, i * P : (i + 1) * P]
                        for p in range(0, P, 8):
                            w0, w1, w2, w3 = w_P[p], w_P[p + 1], w_P[p + 2], w_P[p + 3]
                            w4, w5, w6, w7 = w_P[p + 4], w_P[p + 5], w_P[p + 6], w_P[p + 7]
                            v0, v1, v2, v3 = v_PD[p], v_PD[p + 1], v_PD[p + 2], v_PD[p + 3]
                            v4, v5, v6, v7 = v_PD[p + 4], v_PD[p + 5], v_PD[p + 6], v_PD[p + 7]
                            for d in range(D):
                                a = (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
                                b = (w4 * v4[d] + w5 * v5[d]) + (w6 * v6[d] + w7 * v7[d])
                                o_D[d] += a + b

    return compiled(attend)


def rotate_and_store(
    qkv_THD: Array, cos_TD2: Array, sin_TD2: Array, slots_T: Array, k_BKPD: Array, v_BKPD: Array
) -> None:
    """Apply the rotary embedding to the queries and keys of `qkv_THD` (T, H + 2 K, D) in place, and store keys and
    values at `slots_T` (token p of block b is slot b P + p), as bfloat16 if the cache is uint16."""
    K, P, D = k_BKPD.shape[1:]
    function = _rotate_and_store(qkv_THD.shape[1] - 2 * K, K, D, P, k_BKPD.dtype == np.float32)
    function(qkv_THD, cos_TD2, sin_TD2, slots_T, k_BKPD, v_BKPD)


def split_queries(lengths_R: np.ndarray, window: int | None = None) -> list[int]:
    """Boundaries that split the queries between threads so that each reads about as many keys."""
    keys_R = np.minimum(lengths_R, window or np.iinfo(np.int32).max).cumsum()
    n = num_threads_for(int(keys_R[-1]), WORTH_A_THREAD)
    cuts = 1 + np.searchsorted(keys_R, keys_R[-1] * np.arange(1, n) / n)
    return np.unique([0, *cuts, len(lengths_R)]).tolist()


def paged_attention(
    qkv_THD: Array, kv_BKPD: tuple[Array, Array], table_RN: Array, lengths_R: Array, window: int | None, out_RHD: Array,
    ends: list[int],
) -> None:  # fmt: skip
    """Write into `out_RHD` the attention of the first R (rotated) queries over the `lengths_R[r]` (>= 1) tokens in the
    blocks `table_RN[r]`, or over the last `window` of them. float32 (keys and values also bfloat16 as uint16),
    contiguous; unused slots must hold finite numbers. `ends`: from `split_queries`, the same for all layers of a step.
    """
    K, P, D = kv_BKPD[0].shape[1:]
    function = _attend(qkv_THD.shape[1] - 2 * K, K, D, P, kv_BKPD[0].dtype == np.float32)
    run_in_threads(function, (qkv_THD, kv_BKPD, (table_RN, lengths_R, window or 0), out_RHD), ends)
