"""Checkpoints to resume a run from: `step-00000020/` with weights, optimizer, random numbers and notes.

A checkpoint is written under a temporary name, every file with its checksum noted and synced, and then renamed: a kill
at any instant leaves it whole or absent. Reading checks the checksums and falls back to the checkpoint before.
Safetensors and JSON only. The order of the data needs no checkpoint: it follows from the seed and the step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ptst.errors import UserError
from ptst.model.weights import read_safetensors, save_safetensors
from ptst.progress import say
from ptst.storage import sync, write_atomically
from ptst.training.trainer import Trainer

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a trainer in a folder, of which the last `keep` and the best by validation loss stay."""

    folder: Path
    trainer: Trainer
    keep: int

    def restore(self) -> dict[str, Any]:
        """Bring the trainer to the newest whole checkpoint, on every rank; returns its notes ({} without one)."""
        trainer, found = self.trainer, None
        if trainer.world.is_main_process:
            remove_partial_checkpoints(self.folder)
            found = newest_checkpoint(self.folder)
        trainer.done = int(trainer.world.sum(int(found.name.removeprefix(_PREFIX)) if found else 0))
        if not trainer.done:
            return {}
        notes = load_checkpoint(self.folder / f"{_PREFIX}{trainer.done:08d}", trainer.tensors, trainer.optimizer)
        say(f"resuming after step {trainer.done}")
        return notes

    def save(self, notes: Mapping[str, Any]) -> None:
        """Write the trainer's checkpoint. Raises OSError as `save_checkpoint`, with how to resume."""
        trainer = self.trainer
        try:
            save_checkpoint(self.folder, trainer.done, trainer.tensors, trainer.optimizer, notes, self.keep)
        except OSError as error:
            whole = list_checkpoints(self.folder)
            raise OSError(
                f"saving after step {trainer.done} failed ({error}); the last whole checkpoint is "
                f"{whole[-1] if whole else 'the beginning'}; make room, then resume the run in {self.folder.parent}"
            ) from None


def save_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Tensor], optimizer: Optimizer, notes: Mapping[str, Any], keep: int
) -> None:
    """Write the checkpoint after `step` into `folder`, then remove all but the last `keep` and the best.

    `weights`: the trained ones by name, in the optimizer's order. `notes`: JSON values that `load_checkpoint` returns;
    the best checkpoint is the one with the lowest `validation_loss` in them. Raises OSError when the disk is full, say:
    the earlier checkpoints are then as they were.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    remove_partial_checkpoints(folder)
    try:
        partial.mkdir(parents=True)
        save_safetensors(partial / "weights.safetensors", weights)
        save_safetensors(partial / "optimizer.safetensors", _optimizer_tensors(weights, optimizer))
        save_safetensors(partial / "random.safetensors", _random_states())
        described: dict[str, Any] = {"step": step, "notes": dict(notes)}
        described["sha256"] = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
        described["sha256"]["state.json"] = _json_sha256(described)
        write_atomically(partial / "state.json", (json.dumps(described, indent=2) + "\n").encode())
        sync(partial)
        if final.exists():  # of a run that went back to an earlier state
            _remove(final)
        os.rename(partial, final)
        sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    saved = list_checkpoints(folder)
    now = saved.index(final)
    losses = {path: loss for path in saved[: now + 1] if (loss := _loss(path)) is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    # Whatever comes after this one was damaged, or the run would not have gone back.
    for path in [*saved[: max(0, now + 1 - keep)], *saved[now + 1 :]]:
        if path != best:
            _remove(path)


def _remove(path: Path) -> None:
    """Rename first, so that a kill leaves no half of a checkpoint under its name."""
    old = path.with_name(f".{path.name}.old")
    os.rename(path, old)
    shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first, whole or not."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises UserError, with the reason, where a file is missing, torn or altered."""
    try:
        described = json.loads((path / "state.json").read_bytes())
        sums = described["sha256"]
        own = sums.pop("state.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"state.json cannot be read ({error})") from None
    if own != _json_sha256(described):
        raise UserError("state.json does not have its checksum")
    for name, expected in sums.items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise UserError(f"{name} does not have its checksum")
    return described


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Damaged ones are reported and passed over."""
    for path in reversed(list_checkpoints(folder)):
        try:
            read_checkpoint(path)
        except UserError as error:
            say(f"warning: the checkpoint {path} is damaged: {error}; falling back to the one before")
            continue
        return path
    return None


def load_checkpoint(path: Path, weights: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Bring weights, optimizer and random numbers to a checkpoint; returns its notes, with `step`.

    Raises UserError when it belongs to other weights.
    """
    saved = dict(read_safetensors(path / "weights.safetensors"))
    shapes = {name: w.shape for name, w in weights.items()}
    if shapes != {name: w.shape for name, w in saved.items()}:
        raise UserError(f"{path} holds other weights than this run trains; was it started with other settings?")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: i for i, name in enumerate(weights)}
        for name, tensor in read_safetensors(path / "optimizer.safetensors"):
            owner, _, key = name.rpartition(":")
            state.setdefault(numbers[owner], {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, value in read_safetensors(path / "random.safetensors"):
            if name == "cpu":
                torch.set_rng_state(value)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(value)
    described = read_checkpoint(path)
    return {**described["notes"], "step": described["step"]}


def _optimizer_tensors(weights: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Every state tensor under `<weight>:<key>`."""
    state = optimizer.state_dict()["state"]
    return {f"{name}:{key}": t for i, name in enumerate(weights) for key, t in state.get(i, {}).items()}


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _loss(path: Path) -> float | None:
    try:
        return json.loads((path / "state.json").read_bytes())["notes"].get("validation_loss")
    except (OSError, ValueError, KeyError):
        return None
