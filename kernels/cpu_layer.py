"""RMSNorm with its residual sum or of parts of a row, and SwiGLU, for sampling on a CPU: one pass each instead of
torch's four and two.

Maths as in rms_norm.py and swiglu.py. No gradient.

Shapes: T tokens, E hidden_size, F intermediate_size; a row of O numbers in parts of N.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from ptst.kernels.cpu import compiled, exponential, num_threads_for, run_in_threads

WORTH_A_THREAD = 1 << 16  # numbers


@cache
def _add_norm() -> Callable:
    zero, one = np.float32(0), np.float32(1)

    def add_norm(x_TE, total_TE, weight_E, eps):
        T, E = x_TE.shape
        for t in range(T):
            x, total = x_TE[t], total_TE[t]
            squares = zero
            for e in range(E):
                y = x[e] + total[e]
                total[e] = y
                squares += y * y
            scale = one / np.sqrt(squares / np.float32(E) + eps)
            for e in range(E):
                x[e] = total[e] * scale * weight_E[e]

    return compiled(add_norm)


@cache
def _norm_parts() -> Callable:
    zero, one = np.float32(0), np.float32(1)

    def norm_parts(x_TO, weight_N, eps):
        T, O = x_TO.shape
        N = len(weight_N)
        for t in range(T):
            for start in range(0, O, N):
                x = x_TO[t, start : start + N]
                squares = zero
                for n in range(N):
                    squares += x[n] * x[n]
                scale = one / np.sqrt(squares / np.float32(N) + eps)
                for n in range(N):
                    x[n] *= scale * weight_N[n]

    return compiled(norm_parts)


@cache
def _norm_add() -> Callable:
    zero, one = np.float32(0), np.float32(1)

    def norm_add(x_TE, total_TE, weight_E, eps):
        T, E = x_TE.shape
        for t in range(T):
            x, total = x_TE[t], total_TE[t]
            squares = zero
            for e in range(E):
                squares += x[e] * x[e]
            scale = one / np.sqrt(squares / np.float32(E) + eps)
            for e in range(E):
                y = total[e] + x[e] * scale * weight_E[e]
                total[e] = y
                x[e] = y

    return compiled(norm_add)


@cache
def _swiglu() -> Callable:
    one, exp = np.float32(1), exponential(-87)

    def swiglu(gate_up_T2F, out_TF, start, end):
        F = out_TF.shape[1]
        for t in range(start, end):
            gate, up, out = gate_up_T2F[t, :F], gate_up_T2F[t, F:], out_TF[t]
            for f in range(F):
                # silu(g) = g / (1 + e^-g), from e^-|g|, which cannot overflow.
                g = gate[f]
                e = exp(-g if g > 0 else g)
                out[f] = g * (one if g > 0 else e) / (one + e) * up[f]

    return compiled(swiglu)


def add_rms_norm(x_TE: np.ndarray, total_TE: np.ndarray, weight_E: np.ndarray, eps: np.float32) -> None:
    """In place: total += x, then x = norm(total). float32, contiguous."""
    _add_norm()(x_TE, total_TE, weight_E, eps)


def norm_add(x_TE: np.ndarray, total_TE: np.ndarray, weight_E: np.ndarray, eps: np.float32) -> None:
    """In place: total += norm(x), then x = total. float32, contiguous."""
    _norm_add()(x_TE, total_TE, weight_E, eps)


def norm_parts(x_TO: np.ndarray, weight_N: np.ndarray, eps: np.float32) -> None:
    """In place: each N numbers of a row (N divides O) are normalized by themselves. float32, rows contiguous."""
    _norm_parts()(x_TO, weight_N, eps)


def swiglu(gate_up_T2F: np.ndarray, out_TF: np.ndarray) -> None:
    """Writes silu(gate) * up, from the two halves of (T, 2 F), into `out`. float32, contiguous."""
    T, F = out_TF.shape
    n = max(1, min(T, num_threads_for(T * F, WORTH_A_THREAD)))
    run_in_threads(_swiglu(), (gate_up_T2F, out_TF), [T * i // n for i in range(n + 1)])
