"""Weights that a training run keeps after some of its epochs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from ptst.data.order import SourcePlan, plan
from ptst.train import run_training
from ptst.training.config import TrainConfig
from ptst.training.run_plan import epoch_folders


def test_what_is_kept_after_an_epoch_is_what_a_run_that_ended_there_has(tiny_folder, tmp_path):
    """With a constant rate; and the end of the last epoch is the end of the run."""
    config = TrainConfig(model=str(tiny_folder), data="word-problems:4", val_data="word-problems:2", rank=2)
    config = replace(config, examples_per_step=2, schedule="constant", warmup=0.0)
    run_training(replace(config, epochs=2, at_epochs=(1, 2), out=tmp_path / "two"))
    run_training(replace(config, epochs=1, out=tmp_path / "one"))
    for folder, same in (("two/epoch-1", "one"), ("two/epoch-2", "two")):
        kept, ended = (load_file(tmp_path / f / "adapter_model.safetensors") for f in (folder, same))
        assert all((kept[k] == ended[k]).all() for k in ended)
        record = json.loads((tmp_path / folder / "run.json").read_text())
        assert (record["status"], record["steps"]) == ("finished", 2 if same == "one" else 4)


@pytest.mark.parametrize(
    ("epochs", "at", "steps", "expected"),
    [
        (3, (1, 3), None, [2, 6]),
        (2, (0.5, 1.5), None, [1, 3]),
        (2, (2.5,), None, "must be above 0 and within the run's"),
        (2, (1.5,), 2, "must be above 0 and within the run's"),
        (2, (1, 0.9), None, "epoch-1 and epoch-0.9 are the same step, 2 of 4; leave one out"),
    ],
)
def test_epochs_that_are_not_reached_or_fall_together_are_refused(epochs, at, steps, expected):
    planned = list(plan([9] * 4, [SourcePlan(4, epochs)], 0, 2, None, steps))
    config = TrainConfig(epochs=epochs, at_epochs=at, max_steps=steps)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            epoch_folders(config, planned)
    else:
        assert list(epoch_folders(config, planned)) == expected
