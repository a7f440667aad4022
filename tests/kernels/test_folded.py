"""LoRA folded beside its weights (lora_folded.py, folded_layer.py), against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptst.kernels.dispatch import triton
from ptst.kernels.folded_layer import FoldedGroup, folded_add, folded_feed_forward, folded_qkv
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES, compare, random

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
SCALE = 0.5
# T, E, outs of q, k, v, F, ranks of q, k, v, o, gate, up, down: ragged; one to a block; more than one share of tokens.
CASES = [
    (37, 40, (48, 16, 16), 72, (3, 3, 3, 3, 3, 3, 3)),
    (1, 24, (8, 8, 8), 40, (2, None, 5, 1, None, 4, 9)),
    (601, 36, (20, 12, 12), 33, (4, 4, None, 8, 20, None, 17)),
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


def linear(x, w, place, leaves):
    y = x @ w.to(DEVICE, x.dtype).t()
    return y if place is None else y + SCALE * ((x @ leaves[place].t()) @ leaves[place + 1].t())


def group(weights, places, leaves, biases=()):
    dtype = leaves[0].dtype
    adapters = [None if p is None else (leaves[p], leaves[p + 1]) for p in places]
    biases = [None if b is None else b.to(DEVICE, dtype) for b in biases]
    return FoldedGroup([w.to(DEVICE, dtype) for w in weights], adapters, SCALE, biases)


def norm(x, weight):
    return torch.nn.functional.rms_norm(x, x.shape[1:], weight.to(DEVICE, x.dtype), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "outs", "F", "ranks"), CASES)
def test_add(T, E, outs, F, ranks, dtype):
    weight, inputs = random(E, outs[0], scale=E**-0.5).to(dtype), [random(T, E), random(T, outs[0])]
    places = pairs([(E, outs[0])], ranks[3:4], inputs)

    def ours(residual, x, *_):
        return folded_add(residual, x, group([weight], places, (residual, x, *_)))

    compare(ours, lambda r, x, *_: r + linear(x, weight, places[0], (r, x, *_)), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
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
