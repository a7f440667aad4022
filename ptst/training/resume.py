"""Is this the same run? What must agree before a run goes on, what may differ, and who may write into its folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.model.config import read_json

# Flags that say where and what is written, and nothing of what is trained.
_FREE = frozenset({"out", "resume", "json", "save_every", "keep", "eval_every", "tensorboard", "dry_run"})
# Flags that change the order of floating-point sums, and nothing else.
_ROUNDING = frozenset({"micro_batch_tokens", "activation_checkpointing"})
# Of the rest, what makes a run (or an evaluation, of a run; or a grid) what it is.
_IDENTITY = ("model", "weights", "template", "family", "chat_format", "data", "mix", "validation", "dtype", "full")
_IDENTITY += ("run", "run_weights", "templates", "sources")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: frozenset[str] = _FREE | _ROUNDING) -> list[str]:
    """Settings of two run.json (or evaluations) that give two different results, in words. `free` flags may differ."""
    new = json.loads(json.dumps(new))
    found = []
    # Where the same weights lie makes no difference.
    where = {"model"} if old.get("weights") and old["weights"] == new.get("weights") else set()
    for key in _IDENTITY:
        if key not in where and old.get(key) != new.get(key):
            found += _leaves(key, old.get(key), new.get(key))
    flags = {**old["flags"], **new["flags"]}
    told = " ".join(found)
    for key in sorted(flags.keys() - free - where):
        was, now = old["flags"].get(key), new["flags"].get(key)
        if was != now and not (key in _IDENTITY and key in told):
            found.append(f"--{key.replace('_', '-')} was {was}, now {now}")
    return found


def _leaves(name: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            x
            for k in sorted({*was, *now})
            if was.get(k) != now.get(k)
            for x in _leaves(f"{name}.{k}", was.get(k), now.get(k))
        ]
    shown = [str(v) if len(str(v)) <= 60 else f"{str(v)[:57]}..." for v in (was, now)]
    return [f"{name} was {shown[0]}, now {shown[1]}"]


def rounding(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two run.json that may change the last digits of the result, in words."""
    new = json.loads(json.dumps(new))
    found = [
        f"--{k.replace('_', '-')} was {old['flags'].get(k)}, now {new['flags'].get(k)}"
        for k in sorted(_ROUNDING)
        if old["flags"].get(k) != new["flags"].get(k)
    ]
    for key in ("versions", "threads", "device", "ranks"):
        was, now = old["environment"].get(key), new["environment"].get(key)
        if was != now:
            found += _leaves(key, was, now)
    return found


def find(out: Path | None, run: Path | None) -> dict[str, Any] | None:
    """run.json of the run to go on with: the one in `run`, finished or not, or an unfinished one in `out`; else None.

    Raises UserError when `run` holds none.
    """
    folder = run or out
    record = read_json(folder / "run.json") if folder and (folder / "run.json").exists() else {}
    if record.get("kind") == "train" and (run or record.get("status") == "running"):
        return record
    if run:
        raise UserError(
            f"{run} holds no training run (no run.json), so there is nothing to go on with; start one with --out"
        )
    return None


@contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """Hold the run folder. Raises UserError where another process does; a killed one lets go by itself."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another process; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(handle)


def weights_fingerprint(folder: Path) -> str:
    """sha256 over the model's files: names, sizes, and 4 KiB of every MiB. Cheap for any size, and other weights of the
    same shapes have another one."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(4096):
                digest.update(block)
                file.seek(2**20 - len(block), os.SEEK_CUR)
    return digest.hexdigest()
