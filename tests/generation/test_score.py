"""Likelihoods of given answers."""

from __future__ import annotations

import pytest
import torch

from ptst.errors import UserError
from ptst.generation import score as module
from ptst.generation.score import token_log_probabilities
from ptst.model.weights import load_decoder
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module", params=[None, 7])
def decoder(request, tmp_path_factory):
    changes = {"architectures": ["MistralForCausalLM"], "sliding_window": request.param} if request.param else {}
    return load_decoder(write_tiny_model(tmp_path_factory.mktemp("m"), **changes))


def score_pairs(decoder, pairs) -> list[list[float]]:
    """Of each token of the answer, for (prompt, answer)."""
    return token_log_probabilities(decoder, [([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in pairs])


def rows() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)
    prompts = [list(range(10, 30)) + torch.randint(3, 290, (n % 5,), generator=generator).tolist() for n in range(12)]
    return [(p, [5, 9, 2][: 1 + i % 3]) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("tokens", [1024, 15])
def test_each_token_of_each_answer(decoder, tokens, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", tokens)
    monkeypatch.setattr(module, "MAX_LOGITS_ROWS", 5)
    pairs = rows()
    got = score_pairs(decoder, pairs)
    for (prompt, answer), row in zip(pairs, got, strict=True):
        logits = decoder.logits(torch.tensor(prompt + answer)).log_softmax(-1)
        wanted = [float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(answer)]
        assert row == pytest.approx(wanted, rel=1e-4)


def test_turns_in_between(decoder):
    ids, mask = [5, 6, 7, 8, 9, 10], [False, True, True, False, False, True]
    logits = decoder.logits(torch.tensor(ids)).log_softmax(-1)
    wanted = [float(logits[i - 1, ids[i]]) for i in (1, 2, 5)]
    assert token_log_probabilities(decoder, [(ids, mask)])[0] == pytest.approx(wanted, rel=1e-4)
    assert token_log_probabilities(decoder, []) == []


def test_mistakes(decoder):
    for pairs, message in (
        ([([5], [6]), ([5], [])], "row 1: the answer has no tokens"),
        ([([], [6])], "row 0: the prompt has no tokens"),
        ([([5] * 2040, [6] * 10)], "row 0: 2050 tokens exceed the model's 2048 positions"),
        ([([5], [300])], r"row 0: token 300 is outside 0\.\.299"),
    ):
        with pytest.raises(UserError, match=message):
            score_pairs(decoder, pairs)
