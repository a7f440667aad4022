"""Rotary embedding and the store into the cache: both ways against rope.py and plain indexing."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels.dispatch import triton
from ptst.kernels.rms_norm import rms_norm
from ptst.kernels.rope import apply_rope, frequencies, reference, tables
from ptst.kernels.rope_store import HeadNorms, rotate_and_store
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES

WAYS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="Triton is for Linux"))]


@pytest.fixture(autouse=True)
def _honest():
    if DEVICE == "cpu" and triton is not None:
        interpreter.install()


def angles(T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tables(torch.arange(T, device=DEVICE) * 7, frequencies(D, 1e4).to(DEVICE))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Q", "K", "D", "P"), [(4, 2, 16, 4), (3, 1, 20, 5), (14, 2, 8, 32), (2, 2, 64, 3)])
def test_queries_keys_and_values_reach_their_places(way, Q, K, D, P, dtype, monkeypatch):
    """Between other columns, with other strides of keys and of values; padding and slots outside write nothing."""
    monkeypatch.setenv("PTST_KERNELS", way)
    T, B = 6, 5
    qkv = torch.randn(T, Q + 2 * K + 3, D, device=DEVICE).to(dtype)[:, 1:-2]
    cos, sin = angles(T, D)
    keys = torch.randn(B, P, K, D, device=DEVICE).to(dtype).transpose(1, 2)
    values = torch.randn(B, K, P, D + 3, device=DEVICE).to(dtype)[..., :D]
    slots = torch.tensor([P, 0, 2 * P + 1, P - 1, B * P - 1, B * P], device=DEVICE, dtype=torch.int32)
    wanted = [x.clone() for x in (keys, values)]
    for t in (0, 2, 4):
        place, token = int(slots[t]) // P, int(slots[t]) % P
        wanted[0][place, :, token] = reference(qkv[t : t + 1, Q : Q + K], cos[t : t + 1], sin[t : t + 1])[0]
        wanted[1][place, :, token] = qkv[t, Q + K :]
    q = rotate_and_store(qkv, cos, sin, slots, keys, values)
    limit = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(q, reference(qkv[:, :Q], cos, sin), **limit)
    torch.testing.assert_close(keys, wanted[0], **limit)
    assert torch.equal(values, wanted[1])
    assert q.dtype == dtype


def normed(given, norms, way, monkeypatch) -> tuple[torch.Tensor, ...]:
    """Queries, and keys and values of the cache, from (qkv, cos, sin, slots, B, K, P)."""
    monkeypatch.setenv("PTST_KERNELS", way)
    (qkv, cos, sin, slots), (B, K, P) = given[:4], given[4:]
    cache = [qkv.new_zeros(B, K, P, qkv.shape[2]) for _ in range(2)]
    return (rotate_and_store(qkv, cos, sin, slots, *cache, norms), *cache)


# T tokens of Q query and K key heads: other numbers of heads than a program takes, head_dims that are no powers of two.
NORMED = [(5, 6, 2, 64), (3, 7, 1, 96), (2, 8, 4, 128), (1, 3, 3, 20)]


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "Q", "K", "D"), NORMED)
def test_norms_of_queries_and_keys(T, Q, K, D, dtype, monkeypatch):
    """Against float64, by the law of test_triton.py; of rows of a wider tensor."""
    N, P, eps = Q + 2 * K, 4, 1e-2
    wide = torch.randn(T, N + 3, D, device=DEVICE) * torch.logspace(-2, 1, T * (N + 3), device=DEVICE).view(T, -1, 1)
    weights = [(1 + torch.randn(D, device=DEVICE) / 2).to(dtype) for _ in range(2)]
    slots = torch.arange(T, device=DEVICE) * 3 + P
    found = []
    for way, to in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        qkv = wide.to(dtype)[:, 1:-2].to(to)
        norms = HeadNorms(*(w.to(to) for w in weights), eps)
        found.append(normed((qkv, *angles(T, D), slots, T + 1, K, P), norms, way, monkeypatch))
    for ours, eager, exact in zip(*found, strict=True):
        error, allowed = ((x.double() - exact).norm() for x in (ours, eager))
        assert error <= 2 * allowed + 1e-6 * exact.norm()
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.skipif(triton is None or DEVICE == "cuda", reason="a GPU may fuse multiplications and additions")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_normed_head_is_rounded_before_it_is_rotated(dtype, monkeypatch):
    """To the bit, as by two kernels; of whole numbers, whose squares have one sum in any order."""
    T, Q, K, D, P = 3, 4, 2, 96, 4
    qkv = torch.randint(-9, 10, (T, Q + 2 * K, D)).to(dtype)
    q_D, k_D = (torch.randn(D).to(dtype) for _ in range(2))
    cos, sin = angles(T, D)
    slots = torch.arange(T) + P
    q, keys, values = normed((qkv, cos, sin, slots, 2, K, P), HeadNorms(q_D, k_D, 1e-2), "triton", monkeypatch)
    split = qkv.split((Q, K, K), dim=1)
    apart = [rms_norm(x.reshape(-1, D), w, 1e-2).view(x.shape) for x, w in zip(split[:2], (q_D, k_D), strict=True)]
    wanted = apply_rope(*apart, cos, sin)
    assert torch.equal(q, wanted[0])
    assert torch.equal(keys[1, :, :T].transpose(0, 1), wanted[1])
    assert torch.equal(values[1, :, :T].transpose(0, 1), split[2])


@pytest.mark.parametrize("way", WAYS)
def test_a_value_is_copied_as_it_is(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    qkv, (cos, sin) = torch.full((1, 3, 4), float("inf"), device=DEVICE), angles(1, 4)
    keys, values = (torch.zeros(2, 1, 4, 4, device=DEVICE) for _ in range(2))
    rotate_and_store(qkv, cos, sin, torch.tensor([5], device=DEVICE), keys, values)
    assert values[1, 0, 1].isinf().all()
    assert not values[0].any()


@pytest.mark.parametrize("way", WAYS)
def test_mistakes(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    T, (cos, sin) = 2, angles(2, 8)
    w = torch.ones(16, device=DEVICE)
    qkv, keys, slots = torch.ones(T, 4, 8, device=DEVICE), torch.ones(3, 1, 4, 8, device=DEVICE), torch.tensor([4, 5])
    slots = slots.to(DEVICE)
    assert rotate_and_store(qkv[:0], cos[:0], sin[:0], slots[:0], keys, keys.clone()).shape == (0, 2, 8)
    for wrong, said in (
        ((qkv.flatten(1), cos, sin, slots, keys, keys), r"qkv \(2, 32\).*must be \(T, Q"),
        ((qkv, cos, sin, slots, keys, keys[:2]), r"values \(2, 1, 4, 8\)"),
        ((qkv, cos, sin, slots, keys[..., :6], keys[..., :6]), r"keys \(3, 1, 4, 6\).*do not fit"),
        ((qkv[:, :2], cos, sin, slots, keys, keys), r"qkv \(2, 2, 8\).*query heads"),
        ((qkv, cos[:1], sin, slots, keys, keys), r"cos \(1, 1, 4\) .*do not fit qkv"),
        ((qkv, cos, sin, slots[:1], keys, keys), r"slots \(1,\)"),
        ((qkv, cos, sin, slots.float(), keys, keys), r"slots \(2,\) is torch\.float32"),
        ((qkv, cos, sin, torch.ones(2, 3, device=DEVICE, dtype=torch.long)[:, 1], keys, keys), "slots .*contiguous"),
        ((qkv, cos.to("meta"), sin, slots, keys, keys), r"cos \(2, 1, 4\) .* on meta"),
        ((qkv, cos, sin.repeat(1, 1, 2)[..., ::2], slots, keys, keys), r"sin .*contiguous"),
        ((qkv, cos, sin.transpose(0, 2).contiguous(), slots, keys, keys), r"sin \(4, 1, 2\) do not fit qkv"),
        ((qkv.half(), cos, sin, slots, keys, keys), r"keys is torch\.float32"),
        ((qkv, cos, sin, slots, keys.transpose(2, 3).contiguous().transpose(2, 3), keys), "last axis of keys"),
        ((qkv, cos, sin, slots, keys, keys, HeadNorms(w[:7], w[:8], 1.0)), r"q's norm \(7,\) .*: \(8,\)"),
        ((qkv, cos, sin, slots, keys, keys, HeadNorms(w[:8], w, 1.0)), r"k's norm \(16,\)"),
        ((qkv, cos, sin, slots, keys, keys, HeadNorms(w[:8], w[::2], 1.0)), "last axis of k's norm"),
        ((qkv, cos, sin, slots, keys, keys, HeadNorms(w[:8], w[:8].half(), 1.0)), r"k's norm is torch\.float16"),
    ):
        with pytest.raises(ValueError, match=said):
            rotate_and_store(*wrong)
