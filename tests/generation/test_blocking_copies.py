"""No step of generation makes the host wait for a GPU but where it reads what was computed."""

from __future__ import annotations

import pytest

from ptst.generation import engine as engine_file
from ptst.generation.engine import Engine
from ptst.generation.forward import Forward
from ptst.generation.multi_lora import Adapter, attached_adapter
from ptst.generation.read import _logprobs
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.generation.score import hidden_states
from ptst.model.config import LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora
from ptst.model.weights import load_decoder
from tests.blocking_copies import META, BlockingCopies
from tests.generation.test_engine import prompts


def decoder_and_adapter(folder) -> tuple[Decoder, Adapter]:
    other = load_decoder(folder)
    add_lora(other, LoraConfig(2, 4.0))
    return load_decoder(folder), attached_adapter(other)


@pytest.mark.parametrize("adapters", [False, True])
def test_steps_wait_for_nothing(tiny_folder, adapters, monkeypatch):
    """Prompts in chunks, decoding and both in one step, greedy and sampled, with adapters and without."""
    monkeypatch.setattr(engine_file, "plan_blocks", lambda *_: 80)
    decoder, adapter = decoder_and_adapter(tiny_folder)
    options = EngineOptions(batch_size=4, max_length=200, max_prefill_tokens=20)
    engine = Engine(decoder.to(META), [], options, adapters={"a": adapter} if adapters else None)
    engine._lag = 1
    for i, prompt in enumerate(prompts(4)):
        sampling = Sampling(20, temperature=i % 2, top_p=0.9, top_k=3 * i, logprobs=i == 2, top_logprobs=2 * (i == 2))
        engine.add(Request(prompt, sampling, i, adapter="a" if adapters and i % 2 else None))
    steps, run = [], engine._runner.run
    monkeypatch.setattr(
        engine._runner, "run", lambda step: steps.append((len(step.decode), len(step.prefill))) or run(step)
    )
    with BlockingCopies(monkeypatch) as watch:
        while engine.busy:
            engine.step()
    assert any(a and b for a, b in steps), steps
    assert any(a and not b for a, b in steps), steps
    assert watch.found == []
    assert watch.read
    assert all(".wait().tolist()" in line for line in watch.read), watch.read  # copies of a step that has ended


def test_scoring_reads_its_results_alone(tiny_folder, monkeypatch):
    forward = Forward(load_decoder(tiny_folder).to(META))
    with BlockingCopies(monkeypatch) as watch:
        for _, hidden_TE in hidden_states(forward, [[1, 2, 3, 4], [1, 2, 5]], 2):
            _logprobs(forward, hidden_TE, [3] * len(hidden_TE))
    assert watch.found == []
    assert all("tolist()" in line for line in watch.read)
