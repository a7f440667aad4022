"""Prompts read through the paged cache by one kernel, in Triton's interpreter: the answers and scores of the gathered
path, without a gather."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ptst.generation.engine import Engine
from ptst.generation.paged_attention import StepAttention
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.generation.score import token_log_probabilities
from ptst.kernels.dispatch import triton
from ptst.model.weights import load_decoder
from tests.generation.test_engine import same
from tests.kernels import interpreter
from tests.tiny import FAMILIES, write_tiny_model

pytestmark = pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
VIEWS = {"transpose", "slice", "view", "new_empty", "split"}
PREFIX = list(range(10, 45))  # ends inside a page


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def attended(monkeypatch) -> list[tuple[int, int, Counter[str], Counter[str]]]:
    """Of each call of a layer's attention: decoding rows, chunks, torch's operations and Triton's launches."""
    from triton.runtime.interpreter import GridExecutor

    interpreter.install()
    found: list = []
    attend, launch = StepAttention.__call__, GridExecutor.__call__

    def watched(self, *args):
        found.append((self.num_decode, len(self.chunks.spans) if self.chunks else 0, Counter(), Counter()))
        with _Operations(found[-1][2]):
            return attend(self, *args)

    def counted(self, *args, **named):
        if found:
            found[-1][3][self.fn.__name__] += 1
        with _disable_current_modes():
            return launch(self, *args, **named)

    monkeypatch.setattr(StepAttention, "__call__", watched)
    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return found


def test_the_same_greedy_answers_and_no_gather(tmp_path, attended, monkeypatch):
    """Prompts in chunks that begin inside pages, a cached prefix, steps that decode and read prompts, a layer with a
    window and one without."""
    decoder = load_decoder(write_tiny_model(tmp_path, **FAMILIES["ministral"]))
    asked = [PREFIX + [60 + i] * (1 + 9 * i) for i in range(3)]
    answers = {}
    for way in ("reference", "triton"):
        monkeypatch.setenv("PTST_KERNELS", way)
        attended.clear()
        engine = Engine(decoder, (), EngineOptions(batch_size=3, max_length=120, max_prefill_tokens=24))
        done: dict = {}
        engine.run([Request(p, Sampling(2), i) for i, p in enumerate(asked)], done.__setitem__)
        assert engine.statistics.prompt_tokens < sum(map(len, asked))  # of the prefix only once
        answers[way] = {i: done[i] for i in range(3)}
    same(decoder, asked, answers["reference"], answers["triton"])
    kinds = set()
    for decoding, chunks, operations, launches in attended:
        kinds.add((decoding > 0, chunks))
        wanted = {"_rotate_store": 1, "_decode": int(decoding > 0), "_prefill": int(chunks > 0)}
        assert {name: launches[name] for name in wanted} == wanted
        if chunks:
            allowed = VIEWS | {"attention_prefill", "attention_decode", "empty", "zeros"}
            assert set(operations) - allowed == ({"cat"} if decoding else set())
    assert {(False, 1), (True, 0), (True, 2)} <= kinds


def test_the_same_scores(tmp_path, attended, monkeypatch):
    decoder = load_decoder(write_tiny_model(tmp_path))
    rows = [(PREFIX + [70 + i] * (2 + 9 * i), [False] * len(PREFIX) + [True] * (2 + 9 * i)) for i in range(2)]
    found = {}
    for way in ("reference", "triton"):
        monkeypatch.setenv("PTST_KERNELS", way)
        attended.clear()
        found[way] = token_log_probabilities(decoder, rows)
    for ours, wanted in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert [(decoding, chunks) for decoding, chunks, *_ in attended[:: len(attended) // 2]] == [(0, 1), (0, 2)]
    assert all(launches["_prefill"] == 1 and not operations["index_select"] for *_, operations, launches in attended)
