"""Ranks that train together must have the same run folder, settings, data and weights; otherwise the sum of their
gradients is that of no run. Compared by hashes; where they differ, every rank ends with the same sentence."""

import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptst.data.steps import Steps
from ptst.errors import Setting, UserError
from ptst.fingerprints import code_fingerprint
from ptst.records import TrainRecord, plain
from ptst.settings import CommandSettings, to_dict
from ptst.training.config import TrainConfig
from ptst.training.heartbeat import named
from ptst.training.parallel import World

# What ranks may have of their own: where things lie on a node, and threads.
_FREE = {"out", "resume", "threads", "log", *(f.name for f in dataclasses.fields(CommandSettings))}
SAMPLE = 1024  # elements of a weight that are compared
PATIENCE = 3.0  # seconds that a network file system may take to show a new file
REMEDIES = {
    "settings": "give every rank the same flags and configuration",
    "versions": "give every rank the same versions of ptst and torch",
    "kernels": "set PTST_KERNELS to the same for every rank",
    "data": "give every rank the same files and the same version of ptst",
    "weights": "give every rank the same model folder",
}


def check_start(config: TrainConfig, folder: Path | None, world: World) -> None:
    """Before anything is read: whether all ranks have the same code and settings and see the run folder (None: there is
    none). All must call. Raises UserError, the same on every rank."""
    if world.size == 1:
        return
    content = {f.name for f in dataclasses.fields(config) if f.metadata.get("effect") == "content"}
    settings = {k: v for k, v in to_dict(config).items() if k not in _FREE | content}
    versions = torch.__version__, code_fingerprint("data", "model", "text", "training")
    same = {"versions": versions, "kernels": os.environ.get("PTST_KERNELS") or None}
    check_same({"settings": {**settings, "in a folder": folder is not None}, **same}, world)
    _check_folder(folder, world)


def check_data(record: TrainRecord, world: World) -> None:
    """Before the run begins: whether all ranks have the same template, data and model folder. All must call. Raises
    UserError, the same on every rank."""
    names = ("template", "family", "chat_format", "dtype", "micro_batch_tokens")
    validation = [record.validation] if record.validation else []
    data = [dataclasses.replace(d, name="") for d in (record.data, *record.mix, *validation)]
    settings = {name: getattr(record, name) for name in names}
    check_same({"settings": settings, "data": data, "weights": record.weights}, world)


def check_weights(steps: Steps, parameters: Mapping[str, Tensor], world: World, own: Collection[str] = ()) -> None:
    """Before the first step: whether all ranks have planned the same steps and have the same weights to train. `own`:
    names of those of which each rank has a part of its own. All must call. Raises UserError, the same on every rank."""
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for name, tensor in parameters.items():
        if name in own:
            continue
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLE)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    check_same({"data": steps.fingerprint, "weights": digest.hexdigest()}, world)


def check_same(values: Mapping[str, Any], world: World) -> None:
    """Compare values, as JSON has them, with those of rank 0. All must call. Raises UserError, the same on every rank,
    with the ranks and what differs."""
    if world.size == 1:
        return
    texts = [json.dumps(plain(value), sort_keys=True) for value in values.values()]
    rows = world.gather(b"".join(hashlib.sha256(text.encode()).digest() for text in texts))
    for i, what in enumerate(values):
        part = slice(32 * i, 32 * i + 32)
        if others := [rank for rank, row in enumerate(rows) if row[part] != rows[0][part]]:
            raise UserError(
                f"{named(others)} {'has' if len(others) == 1 else 'have'} other {what} than rank 0", REMEDIES[what]
            )


def first_seen(*paths: Path) -> Path | None:
    """Which of these names a file that another rank has made has here; None if it is not seen within the time that a
    network file system may take."""
    until = time.monotonic() + PATIENCE
    while (found := next((path for path in paths if path.exists()), None)) is None and time.monotonic() < until:
        time.sleep(0.1)
        for path in paths:
            with suppress(OSError):
                os.listdir(path.parent)  # network file systems then ask the server
    return found


def _check_folder(folder: Path | None, world: World) -> None:
    """Rank 0 puts a file of a random name there, or above where the folder is to be; all must see it."""
    # Named as what a kill may leave of a record (ptst.runs).
    name = f".ranks.json.{world.gather(secrets.token_bytes(8))[0].hex()}.partial"
    places = [folder.absolute(), *folder.absolute().parents] if folder else []
    level = next((i for i, place in enumerate(places) if place.is_dir()), 0) if world.is_main_process else 0
    level = int(world.sum(level))
    here = places[level] / name if level < len(places) else None
    if world.is_main_process and here:
        here.touch()
    try:
        world.barrier()
        seen = folder is None or (here is not None and first_seen(here) is not None)
        blind = [rank for rank, row in enumerate(world.gather(bytes([seen]))) if not row[0]]
    finally:
        if world.is_main_process and here:
            here.unlink(missing_ok=True)
    if blind:
        verb = "does" if len(blind) == 1 else "do"
        cause = f"{named(blind)} {verb} not see the run folder of rank 0 (it is {folder and places[0]} for this rank)"
        remedy = ("give all ranks the same ", Setting("out"), " by its absolute path, on a file system that they share")
        raise UserError(cause, remedy)
