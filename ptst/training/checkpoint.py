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
from ptst.training.metrics import sizes, truncate_logs
from ptst.training.trainer import Trainer

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a trainer in a folder, of which the last `keep` and the best by validation loss stay."""

    folder: Path
    trainer: Trainer
    keep: int

    def restore(self) -> dict[str, Any]:
        """Bring the trainer, on every rank, and the logs to the newest whole checkpoint, or to the beginning; returns
        its notes ({} without one)."""
        trainer, newest = self.trainer, 0
        notes: dict[str, Any] = {}
        if trainer.world.is_main_process:
            remove_partial_checkpoints(self.folder)
            newest = newest_step(self.folder)
        trainer.done = int(trainer.world.sum(newest))
        if trainer.done:
            notes = load_checkpoint(self.folder / f"{_PREFIX}{trainer.done:08d}", trainer.tensors, trainer.optimizer)
            say(f"resuming after step {trainer.done}")
        if trainer.world.is_main_process:
            truncate_logs(self.folder.parent, notes.get("sizes", {}))
        return notes

    def save(self, notes: Mapping[str, Any]) -> None:
        """Write the trainer's checkpoint, then remove all but the last `keep` and the best.

        `notes`: JSON values that `restore` returns; the best checkpoint is the one with the lowest `validation_loss` in
        them. Raises OSError, with how to resume, when the disk is full, say: the earlier checkpoints are then as they
        were.
        """
        trainer, folder = self.trainer, self.folder
        final = folder / f"{_PREFIX}{trainer.done:08d}"
        partial = folder / f".{final.name}.partial"
        try:
            remove_partial_checkpoints(folder)
            self._write(partial, {**notes, "sizes": sizes(folder.parent)})
            if final.exists():  # of a run that went back to an earlier state
                _remove(final)
            os.rename(partial, final)
            sync(folder)
            saved = list_checkpoints(folder)
            now = saved.index(final)
            losses = {path: loss for path in saved[: now + 1] if (loss := _loss(path)) is not None}
            best = min(losses, key=losses.__getitem__, default=None)
            # Whatever comes after this one was damaged, or the run would not have gone back.
            for path in [*saved[: max(0, now + 1 - self.keep)], *saved[now + 1 :]]:
                if path != best:
                    _remove(path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            whole = list_checkpoints(folder)
            raise OSError(
                f"saving after step {trainer.done} failed ({error}); the last whole checkpoint is "
                f"{whole[-1] if whole else 'the beginning'}; make room, then resume the run in {folder.parent}"
            ) from None

    def _write(self, partial: Path, notes: Mapping[str, Any]) -> None:
        """The files of a checkpoint. Optimizer states are under `<weight>:<key>`: it numbers weights in their order."""
        weights, state = self.trainer.tensors, self.trainer.optimizer.state_dict()["state"]
        moments = {f"{name}:{key}": t for i, name in enumerate(weights) for key, t in state.get(i, {}).items()}
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        partial.mkdir(parents=True)
        for name, tensors in (("weights", weights), ("optimizer", moments), ("random", random)):
            save_safetensors(partial / f"{name}.safetensors", tensors)
        described: dict[str, Any] = {"step": self.trainer.done, "notes": notes}
        described["sha256"] = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
        described["sha256"]["state.json"] = _json_sha256(described)
        write_atomically(partial / "state.json", (json.dumps(described, indent=2) + "\n").encode())
        sync(partial)


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


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, or 0. Damaged ones are reported and passed over."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return int(read_checkpoint(path)["step"])
        except UserError as error:
            say(f"warning: the checkpoint {path} is damaged: {error}; falling back to the one before")
    return 0


def load_checkpoint(path: Path, weights: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Bring weights, optimizer and random numbers to a checkpoint; returns its notes. Raises UserError when it
    belongs to other weights."""
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
    return read_checkpoint(path)["notes"]


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
