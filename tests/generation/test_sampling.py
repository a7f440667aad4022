"""Drawing tokens: what temperature, top-k and top-p keep, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptst.generation.request import Sampling
from ptst.generation.sampling import log_probabilities, sample
from ptst.kernels import sampling as module

GRID = [(i + 0.5) / 1000 for i in range(1000)]


def drawn(p: list[float], **settings) -> list[int]:
    """What each number of a fine grid becomes."""
    logits = torch.tensor(p).log().expand(len(GRID), -1)
    return sample(logits, [Sampling(**{"temperature": 1.0, **settings})] * len(GRID), GRID).tolist()


def test_what_is_kept():
    p = [0.1, 0.5, 0.15, 0.25]
    assert set(drawn(p, top_p=0.5)) == {1}
    assert set(drawn(p, top_p=0.6)) == {1, 3}
    assert set(drawn(p, top_k=1)) == {1}
    assert set(drawn(p, top_k=3)) == {1, 2, 3}
    # Top-p counts within what top-k left: of 0.5 and 0.25, the first holds two thirds.
    assert set(drawn(p, top_k=2, top_p=0.66)) == {1}
    assert set(drawn(p, top_k=2, top_p=0.67)) == {1, 3}
    assert set(drawn(p, temperature=0.0)) == {1}
    whole = drawn(p)
    assert [whole.count(i) for i in range(4)] == pytest.approx([100, 500, 150, 250], abs=1)
    cold = drawn(p, temperature=0.5)
    square = torch.tensor(p) ** 2 / (torch.tensor(p) ** 2).sum()
    assert [cold.count(i) for i in range(4)] == pytest.approx([1000 * float(x) for x in square], abs=1)


def test_equal_probabilities_at_the_edge_are_all_kept():
    assert set(drawn([0.4, 0.2, 0.2, 0.2], top_k=2)) == {0, 1, 2, 3}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]), st.sampled_from([0, 1, 7])
)
def test_a_row_is_drawn_as_it_would_be_alone_and_by_definition(seed, short, top_p, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 40, generator=generator) * 3
    samplings = [Sampling(temperature=t, top_p=top_p, top_k=top_k) for t in (0.0, 0.3, 1.0, 1.0, 2.5)]
    uniforms = torch.rand(5, generator=generator).tolist()
    before, module.SHORT = module.SHORT, short  # the shortcut must not show
    try:
        together = sample(logits, samplings, uniforms).tolist()
        assert together == [int(sample(logits[i : i + 1], [s], [uniforms[i]])) for i, s in enumerate(samplings)]
    finally:
        module.SHORT = before
    for row, s, u, token in zip(logits, samplings, uniforms, together, strict=True):
        if not s.temperature:
            assert token == int(row.argmax())
            continue
        p = (row / s.temperature).softmax(-1)
        order = p.argsort(descending=True).tolist()[: top_k or None]
        total, held, kept = float(p[order].double().sum()), 0.0, []
        for t in order:
            if held < top_p * total:
                kept.append(t)
            held += float(p[t].double())
        cumulated = p.double().clone()
        cumulated[[t for t in range(40) if t not in kept]] = 0
        cumulated = cumulated.cumsum(0)
        assert token == int(torch.searchsorted(cumulated, u * cumulated[-1], right=True))


def test_a_row_that_is_not_a_number_gives_no_token():
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    logits[2] = float("inf")
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.5), Sampling(temperature=1.0, top_k=2)):
        assert sample(logits, [sampling] * 3, [0.0] * 3).tolist()[1:] == [-1, -1]


def test_log_probabilities():
    logits = torch.randn(4, 9)
    tokens = torch.tensor([1, 8, 0, 3])
    wanted = logits.log_softmax(-1)[torch.arange(4), tokens]
    torch.testing.assert_close(log_probabilities(logits, tokens), wanted)


def test_numbers_come_from_seed_and_id_alone():
    def first(seed: int, request_id: str | int) -> float:
        return Sampling(seed=seed).generator(request_id).random()

    assert first(1, "a") == first(1, "a")
    assert len({first(s, i) for s in range(20) for i in range(20)}) == 400


@pytest.mark.parametrize(("wrong", "told"), [
    ({"max_new_tokens": 0}, "must be at least 1"),
    ({"temperature": -1.0}, "at least 0.00001"),
    ({"temperature": float("nan")}, "at least 0.00001"),
    ({"top_p": 0.0}, "above 0 and at most 1"),
    ({"top_p": 1.01}, "above 0 and at most 1"),
    ({"top_k": -1}, "or 0 for all"),
    ({"stop_strings": ("a", "")}, "none of them empty"),
    ({"stop_strings": "ab"}, "a tuple of strings"),
    ({"stop_strings": (5,)}, "a tuple of strings"),
])  # fmt: skip
def test_mistakes(wrong, told):
    with pytest.raises(ValueError, match=told):
        Sampling(**wrong)
