"""An interrupted evaluation goes on with the weights and the tokenizer that it began with, or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.evaluation.answers import AnswerFile
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from ptst.fingerprints import sampled_fingerprint, weights_fingerprint
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.tiny import write_tiny_model


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """An evaluation of a run, interrupted in the run's answers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    fine_tune(TrainConfig(model="model", data="word-problems:2", rank=2, max_steps=1, out=tmp_path / "run"))
    count, add = 0, AnswerFile.add

    def stop_at_the_fifth(*args):
        nonlocal count
        if (count := count + 1) == 5:
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AnswerFile, "add", stop_at_the_fifth)
        evaluate(config(tmp_path))
    return tmp_path / "out"


def config(here: Path, **changes) -> EvalConfig:
    base = {"checkpoint": here / "run", "tasks": ("safety",), "limit": 3, "max_new_tokens": 3, "out": here / "out"}
    return EvalConfig(**base | changes)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_adapter_weights_are_refused(out, tmp_path):
    before, sampled = weights_fingerprint(tmp_path / "run"), sampled_fingerprint(tmp_path / "run")
    flip(tmp_path / "run/adapter_model.safetensors", -1)  # where a sample of the file does not reach
    assert sampled == sampled_fingerprint(tmp_path / "run")
    message = rf"an unfinished ptst\.eval run of other settings: run_weights was {before}, now xxh3:.*; put those back"
    with pytest.raises(UserError, match=message):
        evaluate(config(tmp_path))
    flip(tmp_path / "run/adapter_model.safetensors", -1)
    assert evaluate(config(tmp_path)).out == out


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_another_tokenizer_is_refused(out, tmp_path, name, capsys):
    path = tmp_path / "model" / name
    assert "have changed since" not in capsys.readouterr().err
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"run of other settings: tokenizer was xxh3:.*, now xxh3:.*; put those back"):
        evaluate(config(tmp_path))
    assert re.search(r"note: tokenizer, .* in \S*model have\s+changed\s+since", capsys.readouterr().err)


def test_other_base_weights_are_refused(out, tmp_path):
    flip(tmp_path / "model/model.safetensors", -1)
    with pytest.raises(UserError, match=r"the adapter in .*run was trained on other weights than .*model holds now"):
        evaluate(config(tmp_path))


def test_answers_of_another_model_are_refused_whatever_the_record_says(out, tmp_path):
    flip(tmp_path / "run/adapter_model.safetensors", -1)
    edit(out / "run.json", run_weights=weights_fingerprint(tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"fine-tuned\.safety\.jsonl:1: is an answer of other weights .*delete the file"
    ):
        evaluate(config(tmp_path))
    (out / "answers/fine-tuned.safety.jsonl").unlink()
    assert evaluate(config(tmp_path)).out == out


def test_an_evaluation_of_an_earlier_version_goes_on(out, tmp_path):
    record = json.loads((out / "run.json").read_text())
    del record["tokenizer"], record["settings"]["decode_seeds"]
    samples = {"weights": sampled_fingerprint(tmp_path / "model"), "run_weights": sampled_fingerprint(tmp_path / "run")}
    (out / "run.json").write_text(json.dumps({**record, **samples}))
    edit(tmp_path / "run/run.json", weights=samples["weights"])
    assert evaluate(config(tmp_path)).out == out
    again = json.loads((out / "run.json").read_text())
    assert again["weights"] == weights_fingerprint(tmp_path / "model") and again["tokenizer"].startswith("xxh3:")
