"""Likelihoods of given answers."""

from __future__ import annotations

import pytest
import torch

from ptst.generation import score as module
from ptst.generation.score import score, score_answers
from ptst.model.weights import load_decoder
from ptst.text.encode import Example
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module", params=[None, 7])
def decoder(request, tmp_path_factory):
    changes = {"architectures": ["MistralForCausalLM"], "sliding_window": request.param} if request.param else {}
    return load_decoder(write_tiny_model(tmp_path_factory.mktemp("m"), **changes))


def rows() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)
    prompts = [list(range(10, 30)) + torch.randint(3, 290, (n % 5,), generator=generator).tolist() for n in range(12)]
    return [(p, [5, 9, 2][: 1 + i % 3]) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("tokens", [1024, 15])
def test_each_token_of_each_answer(decoder, tokens, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", tokens)
    monkeypatch.setattr(module, "MAX_LOGITS_ROWS", 5)
    pairs = rows()
    got = score_answers(decoder, pairs)
    for (prompt, answer), row in zip(pairs, got, strict=True):
        logits = decoder.logits(torch.tensor(prompt + answer)).log_softmax(-1)
        wanted = [float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(answer)]
        assert row == pytest.approx(wanted, rel=1e-4)
    examples = [Example([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in pairs]
    assert [n for _, n in score(decoder, examples)] == [len(a) for _, a in pairs]
    assert [t for t, _ in score(decoder, examples)] == pytest.approx([-sum(r) for r in got], rel=1e-5)


def test_turns_in_between(decoder):
    flags = [False, True, True, False, False, True]
    e = Example([5, 6, 7, 8, 9, 10], flags)
    logits = decoder.logits(torch.tensor(e.ids)).log_softmax(-1)
    wanted = -sum(float(logits[i - 1, e.ids[i]]) for i in (1, 2, 5))
    assert score(decoder, [e])[0] == (pytest.approx(wanted, rel=1e-5), 3)
    assert score(decoder, []) == []


def test_mistakes(decoder):
    with pytest.raises(ValueError, match="pair 1: the answer has no tokens"):
        score_answers(decoder, [([5], [6]), ([5], [])])
    with pytest.raises(ValueError, match="pair 0: the prompt has no tokens"):
        score_answers(decoder, [([], [6])])
    with pytest.raises(ValueError, match="pair 0: 2050 tokens exceed"):
        score_answers(decoder, [([5] * 2040, [6] * 10)])
    with pytest.raises(ValueError, match=r"pair 0: token 300 is outside 0\.\.299"):
        score_answers(decoder, [([5], [300])])
