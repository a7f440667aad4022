"""Speculative decoding and the memory plan, checked by hand."""

from __future__ import annotations

import pytest
import torch

from ptst.generation import engine as module
from ptst.generation.engine import Engine
from ptst.generation.kv_cache import BLOCK_SIZE, bytes_per_token, gigabytes, plan_blocks
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.generation.speculative import draft_tokens
from ptst.model.config import DecoderConfig
from ptst.model.weights import load_decoder
from tests.tiny import CONFIG, write_tiny_model


def test_the_draft_is_what_followed_the_same_tokens():
    assert draft_tokens([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert draft_tokens([1, 2, 3, 9, 5, 3], 4) == [9, 5, 3]  # only the last token occurs earlier
    assert draft_tokens([7, 3, 8, 3, 9, 3], 1) == [9]  # the latest place
    assert draft_tokens([1, 2, 3], 4) == []
    assert draft_tokens([4], 4) == draft_tokens([], 4) == []
    assert draft_tokens([5, 5, 5], 2) == [5]
    assert draft_tokens([1, 2, 1], 0) == []


def test_the_draft_comes_from_earlier_sequences():
    assert draft_tokens([1, 2], 2, [[1, 2, 7, 8], [1, 2, 5, 5]]) == [7, 8]  # the first text that has it
    assert draft_tokens([6, 2, 9, 1, 2], 1, [[3, 1, 2, 7]]) == [7]  # the longer end counts more
    assert draft_tokens([2, 9, 2], 1, [[2, 7]]) == [9]  # of ends alike, the request's own


def test_draft_tokens_come_from_earlier_answers_too(tmp_path):
    decoder = load_decoder(write_tiny_model(tmp_path))
    engine = Engine(decoder, {2}, EngineOptions(batch_size=1, max_length=200))
    steps = []
    for i in range(2):
        engine.run([Request([11, 7, 23], Sampling(9), i)])
        steps.append(engine.statistics.steps)
    assert steps[1] - steps[0] < steps[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draft_tokens_save_steps_and_change_nothing(tmp_path, temperature, monkeypatch):
    decoder = load_decoder(write_tiny_model(tmp_path))
    asked = [list(range(3, 40)), [5, 6] * 20]

    def answered() -> tuple[list, int, int]:
        out: dict = {}
        engine = Engine(decoder, {2}, EngineOptions(batch_size=1, max_length=200))
        engine.run(
            [Request(p, Sampling(40, temperature, top_k=3, logprobs=True), i) for i, p in enumerate(asked)],
            out.__setitem__,
        )
        told = [(out[i].token_ids, [round(x, 3) for x in out[i].logprobs], out[i].finish_reason) for i in range(2)]
        return told, engine.statistics.steps, engine.statistics.tokens

    drafted = answered()
    monkeypatch.setattr(module, "draft_tokens", lambda _ids, _most, _earlier: [])
    plain = answered()
    assert drafted[0] == plain[0]
    assert drafted[2] == plain[2] == 80
    assert drafted[1] < plain[1]  # this model repeats itself


def test_the_plan():
    config = DecoderConfig.from_dict(CONFIG)
    block = BLOCK_SIZE * bytes_per_token(config, torch.float32)
    assert bytes_per_token(config, torch.float32) == 2 * 2 * 2 * 8 * 4
    cpu = torch.device("cpu")
    assert plan_blocks(config, torch.float32, cpu, 3, 2 * BLOCK_SIZE) == 4 * 2  # no more than is needed
    assert plan_blocks(config, torch.float32, cpu, 64, 2048, 10 * block) == 9  # block 0 counts
    assert plan_blocks(config, torch.bfloat16, cpu, 64, 2048, 10 * block) == 19
    with pytest.raises(ValueError, match=rf"kv_memory is .*, of {BLOCK_SIZE} tokens, takes {gigabytes(2 * block)}"):
        plan_blocks(config, torch.float32, cpu, 64, 2048, 2 * block - 1)
