"""A run or cell that fails does not stop the others, and is reported at the end."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from ptst.cli import flag_of
from ptst.errors import Setting, UserError
from ptst.experiment import workers
from ptst.experiment.config import GridConfig
from tests.experiment.conftest import CONFIG, ONE_RUN, finished


def test_a_run_that_fails_leaves_all_others_trained_and_measured(grid, here, monkeypatch):
    real = workers.fine_tune

    def train(config):
        if (config.template, config.seed) == ("chat:vanilla", 0):
            raise UserError("the loss is not a number", ("lower ", Setting("lr")))
        return real(config)

    monkeypatch.setattr(workers, "fine_tune", train)
    with pytest.raises(UserError, match=r"5 of 24 .*\(chat-vanilla\.seed0: .*lower train\.lr\)") as raised:
        grid("grid")
    assert "lower --train.lr)" in raised.value.tell(lambda setting: flag_of(GridConfig, setting))
    done = finished(here / "grid")
    assert len(done) == 19
    monkeypatch.setattr(workers, "fine_tune", real)
    grid("grid")
    assert finished(here / "grid").items() >= done.items()


def test_a_cell_that_fails_leaves_all_others_measured(grid, here, monkeypatch):
    real = workers.measure

    def measure(task, data, answerer, *rest):
        if answerer.adapter == "chat-vanilla.seed0" and answerer.prompt_format.template.name == "chat:llama":
            raise UserError("the judge has failed")
        return real(task, data, answerer, *rest)

    monkeypatch.setattr(workers, "measure", measure)
    with pytest.raises(ValueError, match=r"2 of 24 .*\(chat-vanilla\.seed0/chat-llama\.safety: the judge has failed"):
        grid("grid")
    assert len(finished(here / "grid")) == 22
    monkeypatch.setattr(workers, "measure", real)
    grid("grid")
    assert len(finished(here / "grid")) == 24


def test_an_adapter_that_is_damaged_leaves_the_base_and_the_others_measured(grid, here):
    grid("grid", ONE_RUN, tasks=("safety",))
    for cell in (here / "grid/cells").glob("*/*.json"):
        cell.unlink()
    (here / "grid/runs/chat-vanilla.seed0/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 3 .*\(chat-vanilla\.seed0/chat-llama\.safety: "):
        grid("grid", ONE_RUN, tasks=("safety",))
    (cell,) = (here / "grid/cells").glob("*/*.json")
    assert json.loads(cell.read_text())["template"] is None


def test_names_that_would_share_a_file_are_refused_from_one_command_to_the_next(grid, here):
    for name in ("my set.csv", "my-set.csv"):
        (here / name).write_text(f"prompt\nsay {name}\n")
    grid("grid", ONE_RUN, tasks=("prompts:my set.csv",))
    with pytest.raises(ValueError, match="prompts:my set and prompts:my-set would both be prompts-my-set"):
        grid("grid", ONE_RUN, tasks=("prompts:my-set.csv",))


def test_what_others_finish_meanwhile_is_no_failure(grid, here, monkeypatch, capsys):
    whole = grid("grid", ONE_RUN)
    path = here / "grid/cells/untouched/chat-llama.safety.json"
    path.rename(here / "kept")

    def measure_some(_self):
        (here / "kept").rename(path)  # another worker's until now
        return False

    monkeypatch.setattr(workers.Worker, "measure_some", measure_some)
    assert grid("grid", ONE_RUN)["cells"] == whole["cells"]
    assert "waiting" not in capsys.readouterr().err

    path.rename(here / "kept")
    slept = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _seconds: measure_some(None))
    monkeypatch.setattr(workers, "time", slept)
    monkeypatch.setattr(workers.Worker, "measure_some", lambda _self: False)
    assert grid("grid", ONE_RUN)["cells"] == whole["cells"]
    assert "waiting for other workers\n" in capsys.readouterr().err


def test_a_damaged_file_of_answers_fails_its_own_cell_only(grid, here):
    grid("grid", CONFIG, tasks=("safety",))
    for cell in (here / "grid/cells").glob("*/*.json"):
        cell.unlink()
    (here / "grid/cells/chat-vanilla.seed1/chat-llama.safety.answers.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"1 of 14 .*\(chat-vanilla\.seed1/chat-llama\.safety: .*:1: is not a valid record"
    ):
        grid("grid", CONFIG, tasks=("safety",))
    assert len(list((here / "grid/cells").glob("*/*.json"))) == 9
