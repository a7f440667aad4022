"""Prompts that are read: likelihoods of all tokens, and the hidden state at the last."""

from __future__ import annotations

import pytest
import torch

from ptst.errors import UserError
from ptst.generation import score as module
from ptst.generation.read import read_prompts
from ptst.model.weights import load_decoder
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_decoder(write_tiny_model(tmp_path_factory.mktemp("m")))


SHARED = [[*range(10, 40), *rest] for rest in ([5, 6, 7], [5, 9], [8], [5, 6, 7, 8, 9])]
APART = [[5, 6, 7, 8], [9, 6, 7], [11, 12]]
WITHIN = [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7]]  # one is the beginning of another, and is there twice


@pytest.mark.parametrize("prompts", [SHARED, APART, WITHIN, [[5, 6]], [[7, 8], [7, 8]]])
@pytest.mark.parametrize("tokens", [1024, 4])
def test_every_token_and_the_state_at_the_last(decoder, prompts, tokens, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", tokens)
    monkeypatch.setattr("ptst.generation.read.MAX_LOGITS_ROWS", 3)
    found = read_prompts(decoder, prompts)
    assert len(found) == len(prompts)
    for ids, read in zip(prompts, found, strict=True):
        with torch.inference_mode():
            hidden = decoder.documents(torch.tensor(ids), [0, len(ids)])
            logprobs = decoder.logits(torch.tensor(ids)).log_softmax(-1)
        wanted = [float(logprobs[i - 1, t]) for i, t in enumerate(ids) if i]
        assert read.logprobs == pytest.approx(wanted, rel=1e-4)
        assert torch.allclose(read.state_E, hidden[-1].float(), rtol=1e-4, atol=1e-5)


def test_mistakes(decoder):
    assert read_prompts(decoder, []) == []
    for prompts, message in (
        ([[5, 6], [5]], "row 1: the answer has no tokens"),
        ([[5, 300]], r"row 0: token 300 is outside 0\.\.299"),
        ([[5] * 2049], "row 0: 2049 tokens exceed"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(decoder, prompts)
