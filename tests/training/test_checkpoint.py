"""Checkpoints as they lie on the disk: what is believed of them, what they hold on to, what may fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from ptst.errors import UserError
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.weights import load_decoder
from ptst.training.checkpoint import Checkpoints, list_checkpoints
from ptst.training.trainer import Trainer, TrainerConfig
from tests.training.steps import examples


@pytest.fixture
def begin(tiny_folder, tmp_path):
    """Makes a trainer at its beginning, with its checkpoints in tmp_path/run/state."""

    def checkpoints(keep: int = 9) -> Checkpoints:
        decoder = load_decoder(tiny_folder)
        parameters = add_lora(decoder, LoraConfig(rank=2, alpha=4))
        trainer = Trainer(decoder, parameters, examples(6), TrainerConfig(examples_per_step=1, lr=0.01))
        return Checkpoints(tmp_path / "run" / "state", trainer, keep)

    return checkpoints


def step(checkpoints: Checkpoints, times: int = 1) -> None:
    for _ in range(times):
        report = checkpoints.trainer.step()
        checkpoints.save({"loss": report.loss})


def weights(checkpoints: Checkpoints) -> list[torch.Tensor]:
    return [w.detach().clone() for w in checkpoints.trainer.tensors.values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_copied_or_renamed_checkpoint_is_passed_over(begin, capsys):
    first = begin()
    step(first, 4)
    whole = weights(first)
    state = first.folder
    shutil.copytree(state / "step-00000003", state / "step-00000006")  # it would be believed to be of step 6
    shutil.copytree(state / "step-00000003", state / "step-00000005 (copy)")
    shutil.copytree(state / "step-00000003", state / "step-7")
    again = begin()
    again.restore()
    told = said(capsys)
    assert f"{state / 'step-00000006'} is damaged: it is of step 3 (a copy, or renamed)" in told
    assert f"{state / 'step-00000005 (copy)'} is passed over: it does not have the name of a checkpoint" in told
    assert f"{state / 'step-7'} is passed over" in told
    assert again.trainer.done == 4 and same(weights(again), whole)
    step(again)
    assert (state / "step-00000005 (copy)").exists() and not (state / "step-00000006").exists()
    step(again)
    later = begin()
    later.restore()
    assert later.trainer.done == 6


def test_where_only_a_copy_is_left_nothing_begins_anew_in_silence(begin):
    first = begin()
    step(first)
    os.rename(first.folder / "step-00000001", first.folder / "step-00000002")
    with pytest.raises(UserError, match=r"none of the checkpoints .* is whole.*; remove the folder .*/state to begin"):
        begin().restore()
    shutil.rmtree(first.folder)
    again = begin()
    assert again.restore() == {} and again.trainer.done == 0


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_run_that_goes_on_holds_no_file_that_it_removes(begin):
    """A view of a mapped file would keep its space taken, and on NFS its folder from being removed."""
    step(begin())
    again = begin(keep=1)
    again.restore()
    state = again.trainer.optimizer.state_dict()["state"]
    assert state[1]["exp_avg"].abs().sum() > 0
    assert not mapped(again.folder)
    step(again)
    assert not mapped(again.folder) and len(list_checkpoints(again.folder)) == 1


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(begin, monkeypatch, capsys):
    rmtree = shutil.rmtree

    def kept(path, *args, **kwargs):
        if str(path).endswith(".old"):
            raise OSError(39, "Directory not empty", str(path))
        return rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kept)
        first = begin(keep=1)
        step(first, 4)
    told = said(capsys)
    assert told.count("warning") == 1
    assert f"warning: an old checkpoint in {first.folder} cannot be removed ([Errno 39] Directory not empty" in told
    assert [p.name for p in list_checkpoints(first.folder)] == ["step-00000004"]
    again = begin(keep=1)
    again.restore()
    assert again.trainer.done == 4 and [p.name for p in first.folder.iterdir()] == ["step-00000004"]


def test_an_old_checkpoint_that_cannot_be_renamed_ends_nothing(begin, monkeypatch, capsys):
    rename = os.rename

    def kept(old, new):
        if str(new).endswith(".old"):
            raise PermissionError(1, "Operation not permitted", str(old))
        return rename(old, new)

    monkeypatch.setattr(os, "rename", kept)
    step(first := begin(keep=1), 3)
    assert said(capsys).count("warning") == 1 and len(list_checkpoints(first.folder)) == 3


def test_links_among_checkpoints_are_not_followed(begin, tmp_path):
    step(first := begin())
    shutil.move(first.folder, tmp_path / "elsewhere")
    first.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"state is a symbolic link to .*elsewhere.*; remove it"):
        begin().restore()
    first.folder.unlink()
    first.folder.mkdir()
    (first.folder / ".step-00000001.old").symlink_to(tmp_path / "elsewhere")
    step(begin())  # what looks half-removed is removed: the link alone
    assert (tmp_path / "elsewhere" / "step-00000001" / "state.json").exists()
    assert [p.name for p in first.folder.iterdir()] == ["step-00000001"]
