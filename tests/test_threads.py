"""The number of threads: who decides on it, that a run keeps it, and that a slow-down is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ptst import threads
from ptst.data.builtin import alignment_set
from ptst.errors import UserError
from ptst.evaluation import answers, evaluate
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.rates import Rate
from ptst.experiment import alignment
from ptst.experiment.align_config import AlignConfig
from ptst.generation import score
from ptst.generation.request import Sampling
from ptst.threads import SlowDown, choose_threads, fastest
from ptst.train import run_training
from ptst.training import evaluate as training_evaluate
from ptst.training import metrics
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune

CONFIG = TrainConfig(data="word-problems:4", val_data="word-problems:2", examples_per_step=2, rank=2)


@pytest.fixture
def two_cores(monkeypatch):
    """A user who has set nothing, on a machine where two threads are torch's own number."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("done", "number"),
    [
        ({1: 10, 2: 19, 4: 37, 8: 60}, 8),
        ({1: 10, 2: 19, 4: 20, 8: 20}, 2),  # no faster with more
        ({1: 10, 2: 4, 4: 3, 8: 2}, 1),  # a busy machine
        ({1: 10, 2: 10.5, 4: 10.8, 8: 11.5}, 8),
    ],
)
def test_the_fastest_number_is_found(monkeypatch, done, number):
    clock = [0.0]

    def multiply(until):
        clock[0] = until
        return done[torch.get_num_threads()]

    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(threads, "_multiply", multiply)
    assert fastest(8) == number
    assert torch.get_num_threads() == 1


def test_measuring_is_short_and_takes_no_random_number(two_cores):
    before, numbers = torch.get_rng_state(), []
    began = threads.time.thread_time()
    numbers.append(fastest(2))
    assert threads.time.thread_time() - began < 0.5
    assert numbers[0] in (1, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("asked", "omp", "status", "number"),
    [
        (3, "1", "running", 3),
        (None, "1", "running", 2),  # torch has read it
        (None, "", "running", 5),
        (None, "", "finished", 1),
        (None, "", None, 1),
    ],
)
def test_who_decides(monkeypatch, tmp_path, two_cores, asked, omp, status, number):
    monkeypatch.setattr(threads, "fastest", lambda most: most - 1)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    if status:
        record = {"status": status, "environment": {"threads": 5}}
        (tmp_path / "run.json").write_text(json.dumps(record))
    choose_threads(asked, tmp_path)
    assert torch.get_num_threads() == number


@pytest.mark.parametrize("text", ["[]", "{", '{"status": "running"}', '{"status": "running", "environment": []}'])
def test_a_damaged_record_is_left_to_who_opens_the_run(monkeypatch, tmp_path, two_cores, text):
    monkeypatch.setattr(threads, "fastest", lambda most: most)
    (tmp_path / "run.json").write_text(text)
    choose_threads(None, tmp_path)
    assert torch.get_num_threads() == 2


def stop_after(step: int, monkeypatch) -> None:
    record = metrics.Metrics.step

    def stopping(self, report):
        record(self, report)
        if report.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics.Metrics, "step", stopping)


def test_a_run_keeps_the_number_that_it_began_with(tiny_folder, tmp_path, two_cores, monkeypatch, capfd):
    config = replace(CONFIG, model=str(tiny_folder), save_every=1, epochs=2.0)
    run_training(replace(config, threads=1, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        for name in ("asked", "resumed", "library"):
            with pytest.raises(KeyboardInterrupt):
                run_training(replace(config, threads=1, out=tmp_path / name))
    monkeypatch.setattr(threads, "fastest", lambda _most: pytest.fail("it is known"))
    torch.set_num_threads(2)
    capfd.readouterr()
    run_training(replace(config, out=tmp_path / "resumed"))
    assert "threads" not in capfd.readouterr().err
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    fine_tune(replace(config, out=tmp_path / "library"))  # as a grid does
    assert torch.get_num_threads() == 1
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    run_training(TrainConfig(resume=tmp_path / "asked", threads=2, **_given(config)))
    assert "note: threads was 1, now 2, so the last digits" in capfd.readouterr().err
    recorded = [
        json.loads((tmp_path / n / "run.json").read_text())["environment"]["threads"] for n in ("resumed", "asked")
    ]
    assert recorded == [1, 2]


def _given(config: TrainConfig) -> dict:
    return {k: v for k, v in vars(config).items() if k not in ("resume", "threads", "out")}


def test_an_evaluation_keeps_the_number_that_it_began_with(tiny_folder, tmp_path, two_cores, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(tiny_folder), "tasks": ("safety",), "limit": 2, "max_new_tokens": 2}
    torch.set_num_threads(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate.evaluate(EvalConfig(**settings, out=tmp_path / "eval"))
    torch.set_num_threads(2)
    evaluate.evaluate(EvalConfig(**settings, out=tmp_path / "eval"))
    assert json.loads((tmp_path / "eval" / "run.json").read_text())["environment"]["threads"] == 1


def test_no_threads_are_refused():
    for config in (TrainConfig(threads=0), EvalConfig(threads=0)):
        with pytest.raises(UserError, match="threads is 0; it must be at least 1"):
            config.check()


@pytest.fixture
def untold(monkeypatch):
    monkeypatch.setattr(SlowDown, "told", False)


def test_a_slow_down_is_told_once(untold, capfd):
    slow_down = SlowDown()
    for _ in range(5):
        slow_down.step(1000, 2.0)
        slow_down.step(100, 0.2)
        slow_down.step(4000, 8.0)
    slow_down.step(1000, 5.9)  # within three times
    slow_down.step(8000, 60.0)  # nothing to compare with
    assert capfd.readouterr().err == ""
    slow_down.step(1010, 6.1)
    remedy = "if other work keeps the machine busy, let it end first"
    assert capfd.readouterr().err == f"note: steps take 3.0 times as long as before; {remedy}\n"
    slow_down.step(1000, 60.0)
    assert capfd.readouterr().err == ""


def test_short_steps_are_looked_at_together(untold, capfd, two_cores):
    slow_down = SlowDown()
    for _ in range(100):
        slow_down.step(64, 0.01)
    slow_down.step(64, 0.5)  # one alone is chance
    assert capfd.readouterr().err == ""
    for _ in range(60):
        slow_down.step(64, 0.05)
    assert "stop and resume with fewer threads, --threads 1" in capfd.readouterr().err


def test_training_validation_answering_and_scoring_are_watched(tiny_folder, tmp_path, monkeypatch):
    seen: list[tuple[int, float]] = []
    validated: list[tuple[int, float]] = []
    for module, into in ((metrics, seen), (answers, seen), (training_evaluate, validated)):
        kind = type("Seen", (SlowDown,), {"step": lambda _, *step, into=into: into.append(step)})
        monkeypatch.setattr(module, "SlowDown", kind)
    run_training(replace(CONFIG, model=str(tiny_folder), out=tmp_path / "run"))
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["kind"] == "step"]
    wanted = [(round(r["tokens"] * r["time"]["computed"]), r["time"]["seconds"]) for r in steps]
    assert seen == wanted
    assert len(validated) == 2  # a micro-batch, before and after
    monkeypatch.setattr(score, "MAX_BATCH_TOKENS", 300)
    for task, least in (("safety", 4), ("nll", 2)):
        seen.clear()
        settings = {"model": str(tiny_folder), "tasks": (task,), "limit": 3, "max_new_tokens": 4}
        evaluate.evaluate(EvalConfig(**settings, out=tmp_path / task))
        assert len(seen) >= least
        assert all(tokens > 0 and seconds > 0 for tokens, seconds in seen + validated)


def test_the_steps_of_an_alignment_are_watched(tiny_folder, tmp_path, monkeypatch):
    seen: list[tuple[int, float]] = []
    kind = type("Seen", (SlowDown,), {"step": lambda _, *step: seen.append(step)})
    monkeypatch.setattr(alignment, "SlowDown", kind)
    monkeypatch.setattr(alignment, "evaluate", lambda _d, _m, _c, step: alignment.StepEvaluation(step, Rate(0, 1)))
    monkeypatch.setattr(alignment, "OWN", Sampling(2))
    few = alignment_set.harmless()[:1]
    monkeypatch.setattr(alignment_set, "harmless", lambda: few)
    alignment.align(AlignConfig(model=str(tiny_folder), max_steps=2, own_answers=1, out=tmp_path / "out"))
    assert len(seen) == 2 and all(tokens > 0 and seconds > 0 for tokens, seconds in seen)
