"""What a request may ask for on its own: random numbers, ends, decoding, the most likely tokens."""

from __future__ import annotations

import pytest
import torch

from ptst.generation.engine import Engine, generate
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.model.weights import load_decoder
from tests.generation.test_engine import STOPS, answers, prompts


@pytest.fixture(scope="module")
def decoder(tiny_folder):
    return load_decoder(tiny_folder)


def test_the_draw_stands_in_for_the_id(decoder):
    """Requests with ids of their own are answered as `generate` answers its first prompt."""
    prompt, sampling = prompts(1)[0], Sampling(12, temperature=1.5, seed=5)
    (wanted,) = generate(decoder, [prompt], STOPS, sampling)
    asked = [Request(prompt, sampling, f"user {i}", draw=0) for i in range(3)]
    asked += [Request(prompt, sampling, f"user {i}", draw=i) for i in range(3, 9)]
    got = answers(decoder, asked)
    assert [got[f"user {i}"].token_ids for i in range(3)] == [wanted.token_ids] * 3
    assert any(got[f"user {i}"].token_ids != wanted.token_ids for i in range(3, 9))


@pytest.mark.parametrize("way", ["plain", "drafts", "late"])
def test_the_most_likely_tokens_come_with_the_answer(decoder, way):
    """By definition, for requests of different numbers in one batch; events have what the answer has."""
    asked = [[5, 6, 7, 8] * 6] if way == "drafts" else prompts(5)
    requests = [
        Request(p, Sampling(9, 0.9 * (i % 2), seed=2, logprobs=i != 1, top_logprobs=(3, 0, 5, 1, 99)[i]), i)
        for i, p in enumerate(asked)
    ]
    engine, done, events = Engine(decoder, STOPS, EngineOptions(batch_size=4, max_length=400)), {}, []
    engine._lag = int(way == "late")
    engine.run(requests, done.__setitem__, events.append)
    assert sum(len(a.token_ids) for a in done.values()) > 8
    for i, answer in done.items():
        k, ids = requests[i].sampling.top_logprobs, list(asked[i])
        assert (answer.top_logprobs is None) == (k == 0)
        assert (answer.logprobs is None) == (i == 1)
        for part in ("logprobs", "top_logprobs"):
            parts = [getattr(e, part) for e in events if e.id == i]
            assert [x for p in parts for x in p or []] == (getattr(answer, part) or [])
            assert all((p is None) == (getattr(answer, part) is None) for p in parts)
        for token, row in zip(answer.token_ids, answer.top_logprobs or [], strict=k > 0):
            wanted = decoder.logits(torch.tensor(ids))[-1].float().log_softmax(-1).topk(k)
            assert [t for t, _ in row] == wanted.indices.tolist()
            assert [v for _, v in row] == pytest.approx(wanted.values.tolist(), abs=1e-4)
            ids.append(token)


def test_requests_may_bring_their_own_ends_and_decoding(decoder):
    """Prompts of several templates share an engine; a request without its own has the engine's."""
    prompt, sampling = prompts(1)[0], Sampling(12, temperature=1.0, seed=3)
    engine, done, texts = Engine(decoder, {-1}, EngineOptions(batch_size=4, max_length=400)), {}, []
    first = answers(decoder, [Request(prompt, sampling, draw=0)], {-1})[0].token_ids
    end = first[4]
    assert end not in first[:4]
    decode = lambda _prompt, ids: "".join(f"<{t}>" for t in ids)  # noqa: E731
    own = {"stop_ids": frozenset({end}), "decode": decode, "stream": True}
    engine.run(
        [Request(prompt, sampling, "plain", draw=0), Request(prompt, sampling, "own", draw=0, **own)],
        done.__setitem__,
        lambda e: texts.append((e.id, e.text)),
    )
    assert (done["plain"].token_ids, done["plain"].finish_reason, done["plain"].text) == (first, "length", "")
    assert (done["own"].token_ids, done["own"].finish_reason) == (first[:4], "stop")
    assert "".join(t for i, t in texts if i == "own") == done["own"].text == decode([], first[:4])
    assert {t for i, t in texts if i == "plain"} == {""}
    with pytest.raises(ValueError, match="streaming text needs `decode`"):
        engine.check(Request(prompt, sampling, "none", stream=True))
