"""Checkpoints to resume a run from: `step-00000020/` with weights, optimizer, random numbers and notes.

A checkpoint is written under a temporary name, every file with its checksum noted and synced, and then renamed: a kill
at any instant leaves it whole or absent. Reading checks the checksums and falls back to the checkpoint before. Which
step it is of is what its own checksummed file says: a folder that was copied or renamed is reported and passed over.
Safetensors and JSON only. The order of the data needs no checkpoint: it follows from the seed and the step.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ptst.errors import UserError
from ptst.model.config import LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora
from ptst.model.sharded_weights import Rows, in_file_order, read_parts, write_tensors
from ptst.model.weights import copy_settings, hf_name, read_safetensors, save_safetensors
from ptst.progress import say
from ptst.storage import partial_path, refuse_link, sync, write_atomically
from ptst.training.average import PREFIX as AVERAGE
from ptst.training.metrics import sizes, truncate_logs
from ptst.training.proximal import PREFIX as ANCHOR
from ptst.training.sharding import gathered
from ptst.training.trainer import Trainer
from ptst.weight_files import SINGLE

NO_ROWS: Mapping[str, Rows] = {}
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}([0-9]+)")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a trainer in a folder, of which the last `keep` and the best by validation loss stay."""

    folder: Path
    trainer: Trainer
    keep: int
    _told: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        """That of the trainer's step, there or not."""
        return self.folder / folder_name(self.trainer.done)

    def restore(self) -> dict[str, Any]:
        """Bring the trainer, on every rank, and the logs to the newest whole checkpoint, or to the beginning; returns
        its notes ({} without one). Raises UserError where there are checkpoints and none of them is whole."""
        trainer, newest = self.trainer, 0
        notes: dict[str, Any] = {}
        if trainer.world.is_main_process:
            refuse_link(self.folder)
            self._remove_partial()
            newest = newest_step(self.folder)
        trainer.done = int(trainer.world.sum(newest))
        if trainer.done:
            notes = load_checkpoint(self.path, trainer.tensors, trainer.optimizer, trainer.rows)
            trainer.masters.write()
            say(f"resuming after step {trainer.done}")
        if trainer.world.is_main_process:
            truncate_logs(self.folder.parent, notes.get("sizes", {}))
        return notes

    def save(self, notes: Mapping[str, Any]) -> None:
        """Write the trainer's checkpoint, then remove all but the last `keep` and the best. All ranks must call;
        the main process writes.

        `notes`: JSON values that `restore` returns; the best checkpoint is the one with the lowest `validation_loss` in
        them. Raises OSError, with how to resume, when the disk is full, say: the earlier checkpoints are then as they
        were. One that cannot be removed is reported, and stays.
        """
        trainer, folder = self.trainer, self.folder
        if not trainer.world.is_main_process:
            if trainer.rows:
                for tensors, rows in self._spread().values():
                    list(gathered(tensors, rows, trainer.world))
            return
        final = folder / folder_name(trainer.done)
        partial = partial_path(final)
        self._remove_partial()
        try:
            self._write(partial, {**notes, "sizes": sizes(folder.parent)})
            if os.path.lexists(final):  # of a run that went back to an earlier state
                os.rename(final, partial_path(final).with_suffix(".old"))
            os.rename(partial, final)
            sync(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            whole = list_checkpoints(folder)
            raise OSError(
                f"saving after step {trainer.done} failed ({error}); the last whole checkpoint is "
                f"{whole[-1] if whole else 'the beginning'}; make room, then resume the run in {folder.parent}"
            ) from None
        self._remove_old(final)

    def _remove_old(self, newest: Path) -> None:
        """Remove all checkpoints but the last `keep` and the best. Renamed first, so that a kill leaves no half of one
        under its name."""
        saved = list_checkpoints(self.folder)
        now = saved.index(newest)
        losses = {path: loss for path in saved[: now + 1] if (loss := _loss(path)) is not None}
        best = min(losses, key=losses.__getitem__, default=None)
        # Whatever comes after this one was damaged, or the run would not have gone back.
        for path in [*saved[: max(0, now + 1 - self.keep)], *saved[now + 1 :]]:
            if path != best:
                try:
                    os.rename(path, partial_path(path).with_suffix(".old"))
                except OSError as error:
                    self._tell(error)
        self._remove_partial()

    def _remove_partial(self) -> None:
        """Remove what a kill left half-written or half-removed, and what `_remove_old` renamed."""
        for path in self.folder.glob(f".{_PREFIX}*"):
            try:
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
            except OSError as error:
                self._tell(error)

    def _tell(self, error: OSError) -> None:
        """A warning, once: what cannot be removed takes space, and does no other harm."""
        if not self._told:
            say(f"warning: an old checkpoint in {self.folder} cannot be removed ({error}); it takes up disk space")
        self._told.add(str(error))

    def _write(self, partial: Path, notes: Mapping[str, Any]) -> None:
        """The files of a checkpoint."""
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        partial.mkdir(parents=True)
        for name, (tensors, rows) in self._spread().items():
            if rows:
                shapes = {k: (t.dtype, rows[k].shape if k in rows else t.shape) for k, t in tensors.items()}
                write_tensors(partial / f"{name}.safetensors", shapes, gathered(tensors, rows, self.trainer.world))
            else:
                save_safetensors(partial / f"{name}.safetensors", tensors)
        save_safetensors(partial / "random.safetensors", random)
        described: dict[str, Any] = {"step": self.trainer.done, "notes": notes}
        described["sha256"] = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
        described["sha256"]["state.json"] = _json_sha256(described)
        write_atomically(partial / "state.json", (json.dumps(described, indent=2) + "\n").encode())
        sync(partial)

    def _spread(self) -> dict[str, tuple[Mapping[str, Tensor], Mapping[str, Rows]]]:
        """Weights and the optimizer's state, and which rows of them this rank keeps, in the order of their files.
        States are under `<weight>:<key>`: the optimizer numbers weights in their order."""
        weights, rows = self.trainer.tensors, self.trainer.rows
        state = self.trainer.optimizer.state_dict()["state"]
        moments = {f"{name}:{key}": t for i, name in enumerate(weights) for key, t in state.get(i, {}).items()}
        if not rows:
            return {"weights": (weights, {}), "optimizer": (moments, {})}
        return {
            "weights": (_in_file_order(weights), rows),
            "optimizer": (_in_file_order(moments), _of_moments(rows)),
        }


def _in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    order = in_file_order({name: (t.dtype, t.shape) for name, t in tensors.items()})
    return {name: tensors[name] for name in order}


def folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first, whole or not."""
    named = [(int(found[1]), p) for p in folder.glob(f"{_PREFIX}*") if (found := _NAME.fullmatch(p.name))]
    return [path for step, path in sorted(named) if path.name == folder_name(step)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises UserError, with the reason, where a file is missing, torn or altered, and
    where the folder has the name of another step."""
    try:
        described = json.loads((path / "state.json").read_bytes())
        sums = described["sha256"]
        own = sums.pop("state.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"state.json cannot be read ({error})") from None
    if own != _json_sha256(described):
        raise UserError("state.json does not have its checksum")
    if path.name != folder_name(described["step"]):
        raise UserError(f"it is of step {described['step']} (a copy, or renamed)")
    for name, expected in sums.items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise UserError(f"{name} does not have its checksum")
    return described


def check_whole(path: Path) -> None:
    """Raise UserError for a checkpoint that is damaged."""
    try:
        read_checkpoint(path)
    except UserError as error:
        raise UserError(f"the checkpoint {path} cannot be used: {error}") from None


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, or 0 where none was saved yet. Damaged, copied and renamed ones are
    reported and passed over. Raises UserError where no other is left."""
    saved = list_checkpoints(folder)
    others = sorted(set(folder.glob(f"{_PREFIX}*")) - set(saved))
    for path in others:
        say(f"warning: {path} is passed over: it does not have the name of a checkpoint")
    for path in reversed(saved):
        refuse_link(path)
        try:
            return int(read_checkpoint(path)["step"])
        except UserError as error:
            say(f"warning: the checkpoint {path} is damaged: {error}; falling back to the one before")
    if saved or others:
        cause = f"none of the checkpoints in {folder} is whole, so the run cannot go on where it was"
        raise UserError(cause, f"remove the folder {folder} to begin the run anew")
    return 0


def kept_names(names: Collection[str]) -> dict[str, str]:
    """By weight, the name of what is evaluated and kept among the `names` in a checkpoint's weights: its average, where
    the run has one."""
    own = (name for name in names if not name.startswith((AVERAGE, ANCHOR)))
    return {name: f"{AVERAGE}{name}" if f"{AVERAGE}{name}" in names else name for name in own}


def load_checkpoint(
    path: Path, weights: Mapping[str, Tensor], optimizer: Optimizer | None = None, rows: Mapping[str, Rows] = NO_ROWS
) -> dict[str, Any]:
    """Bring weights, optimizer and random numbers to a checkpoint; returns its notes. Without an optimizer, the weights
    are those that are evaluated: their average, where the run keeps one. `rows`: of weights and of what the optimizer
    knows of them that are read, by weight. Raises UserError when it belongs to other weights."""
    saved = _read(path / "weights.safetensors", rows)
    if optimizer is None:
        saved = {name: saved[stored] for name, stored in kept_names(saved).items()}
    shapes = {name: w.shape for name, w in weights.items()}
    if shapes != {name: w.shape for name, w in saved.items()}:
        raise UserError(f"{path} holds other weights than this run trains; was it started with other settings?")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: i for i, name in enumerate(weights)}
        for name, tensor in _read(path / "optimizer.safetensors", _of_moments(rows)).items():
            owner, _, key = name.rpartition(":")
            # Copied: the optimizer keeps what it gets, and a view would hold the file's pages after its removal.
            state.setdefault(numbers[owner], {})[key] = tensor.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, value in read_safetensors(path / "random.safetensors"):
            if name == "cpu":
                torch.set_rng_state(value)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(value)
    # Rank 0 has looked at the checksums before: of many ranks, each would read all files.
    return (json.loads((path / "state.json").read_bytes()) if rows else read_checkpoint(path))["notes"]


def _read(path: Path, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    return dict(read_parts(path, rows) if rows else read_safetensors(path))


def _of_moments(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Rows of the optimizer's moments, from those of the weights."""
    return {f"{name}:{moment}": r for name, r in rows.items() for moment in _MOMENTS}


def save_full_of(path: Path, base: Path, out: Path, dtype: torch.dtype) -> None:
    """Write what is kept of a checkpoint of all weights as a Hugging Face folder, one weight in memory at a time."""
    weights = path / "weights.safetensors"
    stored = dict(read_safetensors(weights))  # views
    names = {hf_name(name): kept for name, kept in kept_names(stored).items()}
    described = {name: (dtype, stored[kept].shape) for name, kept in names.items()}
    order = in_file_order(described)
    del stored

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in order:
            ((_, tensor),) = read_parts(weights, {}, [names[name]])
            yield name, tensor.to(dtype)

    copy_settings(base, out)
    write_tensors(out / SINGLE, {name: described[name] for name in order}, tensors())


def load_weights(decoder: Decoder, path: Path, lora: LoraConfig | None) -> None:
    """Give a base model the weights of a checkpoint, frozen: an adapter, or with `lora` None all of them. Raises
    UserError for a checkpoint that is damaged or of another model."""
    weights = dict(decoder.named_parameters()) if lora is None else add_lora(decoder, lora)
    try:
        load_checkpoint(path, weights)
    except UserError as error:
        raise UserError(f"the checkpoint {path} cannot be used: {error}") from None
    decoder.requires_grad_(False)


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
