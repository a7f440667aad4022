"""`generate`: an answer depends on its prompt and seed alone, never on the rest of the batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ptst.generation.engine import generate
from ptst.generation.request import EngineOptions, Sampling
from ptst.model.weights import load_decoder
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

PREFIX = list(range(10, 30))


def prompts(count: int, prefix: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [prefix + torch.randint(3, 290, (1 + n % 7,), generator=generator).tolist() for n in range(count)]


def slow_greedy(decoder, prompt: list[int], stops: set[int], limit: int) -> list[int]:
    """The definition: the whole row anew for every token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        token = int(decoder.logits(torch.tensor(ids))[-1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A plain decoder and one with a sliding window shorter than the prompts."""
    plain = load_decoder(write_tiny_model(tmp_path_factory.mktemp("a")))
    window = write_tiny_model(tmp_path_factory.mktemp("b"), architectures=["MistralForCausalLM"], sliding_window=6)
    return {"plain": plain, "window": load_decoder(window)}


@pytest.mark.parametrize("kind", ["plain", "window"])
@pytest.mark.parametrize("prefix", [[], PREFIX])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_answers_are_those_of_the_definition(decoders, kind, prefix, batch_size):
    decoder = decoders[kind]
    asked = prompts(9, prefix)
    stops = set(range(0, 300, 9))  # so that answers end at different lengths and slots are handed on
    wanted = [slow_greedy(decoder, p, stops, 12) for p in asked]
    tokens = []
    options = EngineOptions(batch_size=batch_size)
    got = generate(decoder, asked, stops, Sampling(12), options, on_step=lambda s: tokens.append((s.answers, s.tokens)))
    assert [c.token_ids for c in got] == wanted
    assert [c.truncated for c in got] == [len(w) == 12 for w in wanted]
    # Progress moves with the steps, not only with the answers.
    assert tokens == sorted(tokens)
    assert tokens[-1] == (9, sum(map(len, wanted)))
    assert len(set(tokens)) > len({answers for answers, _ in tokens})
    assert len({len(w) for w in wanted}) > 2


def test_sampled_answers_do_not_depend_on_the_batch(decoders):
    sampling = Sampling(10, temperature=1.5, top_p=0.95, seed=7)
    asked = prompts(8, PREFIX)
    one = generate(decoders["plain"], asked, {2}, sampling, EngineOptions(batch_size=1))
    many = generate(decoders["plain"], asked, {2}, sampling, EngineOptions(batch_size=8))
    assert [c.token_ids for c in one] == [c.token_ids for c in many]
    other = generate(decoders["plain"], asked, {2}, Sampling(10, 1.5, 0.95, seed=8), EngineOptions(batch_size=8))
    assert [c.token_ids for c in other] != [c.token_ids for c in many]


def test_mistakes(decoders):
    with pytest.raises(ValueError, match="must be at least 1"):
        Sampling(0)
    with pytest.raises(ValueError, match="must be at least 0"):
        Sampling(1, temperature=-1)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Sampling(1, top_p=0)
    with pytest.raises(ValueError, match="exceed the model's 2048 positions"):
        generate(decoders["plain"], [[5] * 2040], {2}, Sampling(10))
    with pytest.raises(ValueError, match="request 1: the prompt has no tokens"):
        generate(decoders["plain"], [[5], []], {2}, Sampling(10))
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate(decoders["plain"], [[5]], {2}, Sampling(10), EngineOptions(batch_size=0))
    assert generate(decoders["plain"], [], {2}, Sampling(10)) == []


def test_the_answer_type_needs_no_torch():
    code = (
        "import sys; from ptst.generation.request import Answer, Sampling; a = Answer([5], 'x', 'length'); "
        "assert a.truncated and not Answer([5], 'x', 'stop').truncated; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
