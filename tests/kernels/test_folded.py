"""LoRA folded beside its weights (lora_folded.py, folded_layer.py), against plain autograd in float64."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ptst.kernels.dispatch import triton
from ptst.kernels.folded_layer import FoldedGroup, folded_add, folded_feed_forward, folded_qkv
from ptst.kernels.lora_layer import Dropout
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES, compare, random

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
SCALE = 0.5
HALVES = DTYPES if DEVICE == "cuda" else DTYPES[:2]  # float16 takes the interpreter's time and shows nothing new
# T, E, outs of q, k, v, F, ranks of q, k, v, o, gate, up, down: ragged; one token; two shares of tokens and two blocks
# of ranks in the sums of gradients.
CASES = [
    (37, 40, (48, 16, 16), 72, (3, 3, 3, 3, 3, 3, 3)),
    (1, 24, (8, 8, 8), 40, (2, None, 5, 1, None, 4, 9)),
    (601, 36, (20, 12, 12), 33, (40, 30, None, 8, 20, None, 17)),
]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()


def pairs(shapes, ranks, inputs: list[Tensor]):
    """Appends A and B of each adapter to `inputs`; where they are, by layer."""
    places: list[int | None] = []
    for (o, i), r in zip(shapes, ranks, strict=True):
        places.append(None if r is None else len(inputs))
        inputs += [] if r is None else [random(r, i, scale=i**-0.5), random(o, r)]
    return places


def linear(x, w, place, leaves, mask_TI=None):
    y = x @ w.to(DEVICE, x.dtype).t()
    x = x if mask_TI is None else x * mask_TI.to(x.dtype)
    return y if place is None else y + SCALE * ((x @ leaves[place].t()) @ leaves[place + 1].t())


def group(weights, places, leaves, biases=()):
    dtype = leaves[0].dtype
    adapters = [None if p is None else (leaves[p], leaves[p + 1]) for p in places]
    biases = [None if b is None else b.to(DEVICE, dtype) for b in biases]
    return FoldedGroup([w.to(DEVICE, dtype) for w in weights], adapters, SCALE, biases)


def philox(seed: int, *counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011) of broadcast counters, in numpy: (..., 4)."""
    low = np.uint64(0xFFFFFFFF)
    c = [x.astype(np.uint64) for x in np.broadcast_arrays(*counters)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [p1 >> np.uint64(32) ^ c[1] ^ key[0], p1 & low, p0 >> np.uint64(32) ^ c[3] ^ key[1], p0 & low]
        key = [key[0] + np.uint64(0x9E3779B9) & low, key[1] + np.uint64(0xBB67AE85) & low]
    return np.stack(c, axis=-1)


def mask(dropout: Dropout, place: str, I: int) -> Tensor:
    """The mask by the book, (T, I) float64: for every four columns of a document's token, four draws."""
    rows, fours = [], np.arange(-(-I // 4))[None]
    number = np.array(16 * (4 * dropout.layer + ("qkv", "o", "gate_up", "down").index(place) + 1))
    for seed, (a, b) in zip(dropout.seeds, pairwise(dropout.cu_seqlens), strict=True):
        key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
        drawn = philox(key, np.arange(b - a)[:, None], fours, number, np.array(0)).reshape(b - a, -1)[:, :I]
        rows.append((drawn >= round(dropout.rate * 2**32)) / (1 - dropout.rate))
    return torch.from_numpy(np.concatenate(rows)).to(DEVICE)


def norm(x, weight):
    return torch.nn.functional.rms_norm(x, x.shape[1:], weight.to(DEVICE, x.dtype), 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "E", "outs", "F", "ranks"), CASES)
def test_qkv(T, E, outs, F, ranks, dtype):
    weights = [random(o, E, scale=E**-0.5).to(dtype) for o in outs]
    scales = (torch.rand(E, dtype=torch.float64) + 0.5).to(dtype)
    biases = [random(outs[0]).to(dtype), None, random(outs[2]).to(dtype)] if T > 1 else []
    inputs = [random(T, E)]
    places = pairs([(o, E) for o in outs], ranks[:3], inputs)

    def ours(*leaves):
        return folded_qkv(leaves[0], scales.to(DEVICE, dtype), 1e-5, group(weights, places, leaves, biases))

    def plain(*leaves):
        n = norm(leaves[0], scales)
        ys = [linear(n, w, p, leaves) for w, p in zip(weights, places, strict=True)]
        added = zip(ys, biases or [None] * 3, strict=True)
        return leaves[0] * 1, *(y if b is None else y + b.to(DEVICE, y.dtype) for y, b in added)

    compare(ours, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "E", "outs", "F", "ranks"), CASES)
def test_add(T, E, outs, F, ranks, dtype):
    weight, inputs = random(E, outs[0], scale=E**-0.5).to(dtype), [random(T, E), random(T, outs[0])]
    places = pairs([(E, outs[0])], ranks[3:4], inputs)

    def ours(residual, x, *_):
        return folded_add(residual, x, group([weight], places, (residual, x, *_)))

    compare(ours, lambda r, x, *_: r + linear(x, weight, places[0], (r, x, *_)), inputs, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "E", "outs", "F", "ranks"), CASES)
def test_feed_forward(T, E, outs, F, ranks, dtype):
    shapes = ((F, E), (F, E), (E, F))
    weights = [random(o, i, scale=i**-0.5).to(dtype) for o, i in shapes]
    scales = (torch.rand(E, dtype=torch.float64) + 0.5).to(dtype)
    inputs = [random(T, E)]
    places = pairs(shapes, ranks[4:], inputs)

    def ours(*leaves):
        both = group(weights[:2], places[:2], leaves), group(weights[2:], places[2:], leaves)
        return folded_feed_forward(leaves[0], scales.to(DEVICE, dtype), 1e-5, *both)

    def plain(*leaves):
        g, u = (linear(norm(leaves[0], scales), weights[i], places[i], leaves) for i in (0, 1))
        return leaves[0] + linear(torch.nn.functional.silu(g) * u, weights[2], places[2], leaves)

    compare(ours, plain, inputs, dtype)


DROPOUT = Dropout(0.3, (5, 2**70, 11), (0, 20, 21, 37), 2)


def test_the_mask_is_philox():
    """Known answers of Philox4x32-10 (Random123's kat_vectors)."""
    ones, pi = np.array(0xFFFFFFFF), [np.array(x) for x in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    found = [philox(0, *[np.array(0)] * 4), philox(2**64 - 1, *[ones] * 4), philox(0x299F31D0A4093822, *pi)]
    assert [[f"{x:08x}" for x in answer.tolist()] for answer in found] == [
        ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"],
        ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"],
        ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
    ]
    drawn = mask(Dropout(0.25, (3,), (0, 200)), "down", 101)
    assert abs((drawn == 0).double().mean() - 0.25) < 0.02  # 20,200 draws: a standard error of 0.003


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["qkv", "add", "feed_forward"])
def test_dropout(function, dtype):
    T, E, outs, F, ranks = CASES[0]
    scales = (torch.rand(E, dtype=torch.float64) + 0.5).to(dtype)
    shapes = {"qkv": [(o, E) for o in outs], "add": [(E, outs[0])], "feed_forward": [(F, E), (F, E), (E, F)]}[function]
    weights = [random(o, i, scale=i**-0.5).to(dtype) for o, i in shapes]
    inputs = [random(T, E), random(T, outs[0])] if function == "add" else [random(T, E)]
    places = pairs(shapes, ranks[: len(shapes)], inputs)
    masks = {place: mask(DROPOUT, place, n) for place, n in (("qkv", E), ("o", outs[0]), ("gate_up", E), ("down", F))}

    def ours(x, *leaves):
        leaves = (x, *leaves)
        if function == "qkv":
            return folded_qkv(x, scales.to(DEVICE, dtype), 1e-5, group(weights, places, leaves), DROPOUT)
        if function == "add":
            return folded_add(x, leaves[1], group(weights, places, leaves), DROPOUT)
        both = group(weights[:2], places[:2], leaves), group(weights[2:], places[2:], leaves)
        return folded_feed_forward(x, scales.to(DEVICE, dtype), 1e-5, *both, DROPOUT)

    def plain(x, *leaves):
        leaves = (x, *leaves)
        if function == "add":
            return x + linear(leaves[1], weights[0], places[0], leaves, masks["o"])
        n, place = norm(x, scales), "qkv" if function == "qkv" else "gate_up"
        ys = [linear(n, w, p, leaves, masks[place]) for w, p in zip(weights, places, strict=True) if len(w) != E]
        if function == "qkv":
            return x * 1, *ys
        return x + linear(torch.nn.functional.silu(ys[0]) * ys[1], weights[2], places[2], leaves, masks["down"])

    compare(ours, plain, inputs, dtype)


def test_rows_of_a_wider_tensor():
    """x, the residual and the gradients that arrive may be columns of others, expanded or transposed."""
    T, E, F = 37, 24, 40
    weights = [random(o, E).to(DEVICE, torch.float32) for o in (16, 8, 8)]
    wide = [random(o, i).to(DEVICE, torch.float32) for o, i in ((F, E), (F, E), (E, F))]
    adapters = [(random(3, w.shape[1]).to(w), random(len(w), 3).to(w)) for w in (*weights, *wide)]
    scales, whole = torch.rand(E, device=DEVICE) + 0.5, random(T, 3 * E).to(DEVICE, torch.float32)
    groups = [FoldedGroup(weights, adapters[:3], SCALE), FoldedGroup(wide[:2], adapters[3:5], SCALE)]
    groups += [FoldedGroup(wide[2:], adapters[5:], SCALE), FoldedGroup(wide[:1], adapters[3:4], SCALE)]

    def run(change):
        x, residual = (change(t).detach().requires_grad_() for t in (whole[:, E : 2 * E], whole[:, :E]))
        wider = torch.ones(T, 2 * F, device=DEVICE)[:, :F]
        calls = [folded_qkv(x, scales, 1e-5, groups[0]), [folded_feed_forward(x, scales, 1e-5, groups[1], groups[2])]]
        calls += [[folded_add(whole[:, :F], x, groups[3])], [folded_add(residual, wider, groups[2], DROPOUT)]]
        found = []
        for outs in calls:
            found += outs
            sliced = [torch.linspace(-1, 1, 2 * out.numel(), device=DEVICE).view(T, -1) for out in outs]
            sliced = [g[:, : out.shape[1]] for g, out in zip(sliced, outs, strict=True)]
            for upstream in (sliced, [torch.ones(1, 1, device=DEVICE).expand(out.shape) for out in outs]):
                given = [change(g) for g in upstream]
                found += torch.autograd.grad(outs, [x, residual], given, retain_graph=True, allow_unused=True)
        return found

    for a, b in zip(run(lambda t: t), run(torch.Tensor.contiguous), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
