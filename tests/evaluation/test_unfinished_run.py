"""A run that has not finished is evaluated at a step that it saved, and the record says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import EvalResult, evaluate
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune

SMALL = {"data": "word-problems:3", "val_data": "word-problems:1", "examples_per_step": 1, "lr": 1e-2}


@pytest.fixture(params=["lora", "full", "masters"])
def run(request, tiny_folder, tmp_path, monkeypatch) -> Path:
    """A run with all its steps that looks interrupted; its final weights are there to compare with."""
    monkeypatch.chdir(tmp_path)
    kind = {"full": request.param != "lora", "dtype": "bfloat16" if request.param == "masters" else "float32"}
    fine_tune(TrainConfig(model=str(tiny_folder), **SMALL, **kind, rank=2, save_every=1, keep=9, out=Path("run")))
    return Path("run")


def measure(checkpoint: Path, **changes) -> EvalResult:
    dtype = json.loads(Path("run/run.json").read_text())["dtype"]
    return evaluate(EvalConfig(checkpoint=checkpoint, tasks=("nll",), limit=1, dtype=dtype, **changes))


def nll(result: EvalResult) -> list[float]:
    return [by_task["nll"].values["nats_per_token"] for by_task in result.results.values()]


def test_a_step_is_evaluated_and_recorded(run):
    finished = measure(run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running", "steps": None}))
    with pytest.raises(UserError, match="run is not a finished training run; resume it first, or take its last checkp"):
        measure(run)
    last = measure(run / "state" / "step-00000003")
    assert nll(last) == nll(finished)
    first = measure(run / "state" / "step-00000001", baseline=False)
    assert nll(first)[0] not in nll(finished)
    for result, step in ((finished, 3), (last, 3), (first, 1)):
        assert result.out.parent == run / "eval"
        assert json.loads((result.out / "run.json").read_text())["step"] == step
        assert json.loads((result.out / "results.json").read_text())["step"] == step
    assert first.title.startswith("PTST: trained under chat:vanilla until step 1, tested under")
    weights = run / "state" / "step-00000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match=r"00000001 cannot be used: weights\.safetensors does not have its checksum"):
        measure(run / "state" / "step-00000001")
