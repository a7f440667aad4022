"""Top-k and top-p by bisection keep what the definition over sorted probabilities keeps, and draw the same tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptst.generation.request import Sampling
from ptst.generation.sampling import sample
from ptst.kernels import sampling as module
from ptst.kernels.dispatch import triton
from ptst.kernels.sampling import sample_kept
from tests.kernels import interpreter

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = [(0, 1.0), (1, 1.0), (3, 1.0), (10**9, 0.9), (0, 0.9), (0, 0.5), (0, 1e-9), (7, 0.6), (5, 0.999), (2, 1e-300)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 128)
    if DEVICE == "cpu":
        interpreter.install()


UNIFORMS = [0.0, 0.37, 0.9, 1 - 2**-53, 0.1, 0.5, 0.99, 0.7, 0.25, 0.6]


def in_rows(p_V: Tensor, limits: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """(tokens, least kept) of the kernel, one row for each limit, with a number of UNIFORMS."""
    top_k = torch.tensor([min(k or len(p_V), len(p_V)) for k, _ in limits], dtype=torch.int32, device=DEVICE)
    others = [[p for _, p in limits], UNIFORMS[: len(limits)]]
    limits_2M = torch.tensor(others, dtype=torch.float64, device=DEVICE)
    tokens_M, least_M = module.launch(p_V.to(DEVICE).expand(len(limits), -1).contiguous(), top_k, limits_2M)
    return tokens_M.cpu(), least_M.cpu()


def kept(p_V: Tensor, k: int, top_p: float) -> Tensor:
    """The definition, over all probabilities sorted, in float64."""
    values_V = p_V.double().sort(descending=True).values
    values_k = values_V[: k or None]
    before = torch.cat((values_k.new_zeros(1), values_k.cumsum(0)[:-1]))
    last = int((before < top_p * values_k.sum()).sum()) - 1 if top_p < 1 else len(values_k) - 1
    return p_V.double() >= values_k[last]


def rows_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    if kind == "128,256":
        return torch.randn(128256, generator=generator) * 3
    V = {"one": 1, "a block": 128, "blocks": 384}.get(kind, 300)
    logits = torch.randn(V, generator=generator) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "equal":
        logits.zero_()
    elif kind == "-inf":
        logits[::2] = -math.inf
    elif kind == "one huge":
        logits[137] = 1e30
    elif kind == "flat":
        logits *= 1e-3
    elif kind == "steep":
        logits *= 30
    return logits


KINDS = ["random", "ties", "equal", "-inf", "one huge", "flat", "steep", "one", "a block", "blocks"]


@pytest.mark.parametrize("kind", [*KINDS, "128,256"])
def test_what_is_kept_is_the_definitions_and_tokens_are_those_of_plain_torch(kind, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8192 if kind == "128,256" else 128)
    limits = [(2000, 0.9)] if kind == "128,256" else LIMITS
    p_V = rows_of(kind).softmax(-1)
    tokens_M, least_M = in_rows(p_V, limits)
    for (k, top_p), least in zip(limits, least_M, strict=True):
        assert torch.equal((p_V >= least) & (p_V > 0), kept(p_V, k, top_p) & (p_V > 0)), (k, top_p, float(least))
    monkeypatch.setenv("PTST_KERNELS", "reference")
    rows = p_V.expand(len(limits), -1).contiguous()
    wanted_M = sample_kept(rows, [k for k, _ in limits], [p for _, p in limits], UNIFORMS[: len(limits)])
    assert torch.equal(tokens_M, wanted_M)
    assert all(p_V[token] > 0 for token in wanted_M)


def test_a_share_that_is_reached_exactly():
    """What the sums of powers of two decide is decided without rounding."""
    p_V = torch.tensor([0.125, 0.5, 0.25, 0.0625, 0.0625])
    for top_p, least in ((0.5, 0.5), (0.5 + 2**-30, 0.25), (0.75, 0.25), (0.875, 0.125), (0.9375, 0.0625)):
        assert in_rows(p_V, [(0, top_p)])[1].item() == least
    assert in_rows(p_V, [(2, 2 / 3 - 1e-9)])[1].item() == 0.5  # of 0.5 and 0.25
    assert in_rows(p_V, [(2, 2 / 3 + 1e-9)])[1].item() == 0.25
    assert in_rows(p_V, [(4, 1.0)])[1].item() == 0.0625


def test_rows_of_a_wider_tensor_and_none():
    wide = torch.rand(3, 40, device=DEVICE) / 40
    top_k = torch.full((3,), 5, dtype=torch.int32, device=DEVICE)
    limits = torch.full((2, 3), 0.7, dtype=torch.float64, device=DEVICE)
    ours, wanted = (module.launch(p, top_k, limits) for p in (wide[:, 8:40], wide[:, 8:40].contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert module.launch(wide[:0], top_k[:0], limits[:, :0])[0].shape == (0,)


def test_sampling_through_the_kernel(monkeypatch):
    """From logits, with temperatures, a greedy row, and rows that are not numbers."""
    logits = torch.randn(7, 200, generator=torch.Generator().manual_seed(4))
    logits[5, 3], logits[6] = math.nan, -math.inf
    settings = [
        (1.0, 0, 0.9),
        (0.0, 0, 1.0),
        (0.7, 3, 1.0),
        (1.3, 0, 1.0),
        (1.0, 40, 0.5),
        (1.0, 3, 0.5),
        (1.0, 3, 0.5),
    ]
    samplings = [Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in settings]
    results = []
    for way in ("triton", "reference"):
        monkeypatch.setenv("PTST_KERNELS", way)
        results.append(sample(logits.to(DEVICE), samplings, [0.3] * 7).tolist())
    assert results[0] == results[1]
    assert results[0][5:] == [-1, -1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((torch.ones(3), [0], [1.0], [0.0]), r"p \(3,\)"),
        ((torch.ones(1, 3).double(), [0], [1.0], [0.0]), "torch.float64"),
        ((torch.ones(3, 2).t(), [0, 0], [1.0, 1.0], [0.0, 0.0]), r"last axis of p \(2, 3\)"),
        ((torch.ones(1, 3), [0, 1], [1.0], [0.0]), r"top_k \[0, 1\] .* p \(1, 3\)"),
        ((torch.ones(1, 3), [-1], [1.0], [0.0]), r"top_k \[-1\]"),
        ((torch.ones(1, 3), [1], [0.0], [0.0]), r"top_p \[0.0\]"),
        ((torch.ones(1, 3), [1], [1.0], [1.0]), r"uniforms \[1.0\]"),
    ],
)
def test_mistakes(given, says):
    with pytest.raises(ValueError, match=says):
        sample_kept(*given)
