"""Folders of runs: a new one or the one to resume, held by one process or shared by several.

`claim` takes a folder for a run and writes its record; `share` does so for a folder on which several processes work.
Two runs are the same where `differences` finds nothing.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from ptst import energy
from ptst.errors import Setting, UserError
from ptst.fingerprints import Fingerprint
from ptst.records import CHECKPOINTS, ERROR, FILE, Record, RunRecord, command_of, find_record, plain, recorded
from ptst.settings import CommandSettings, to_json
from ptst.storage import (
    CLAIM,
    LOCK,
    LOCKS,
    exclusive_lock,
    lock,
    refuse_links,
    remove_partial_files,
    remove_partial_files_of,
    sync,
    write_json,
)


def differences(old: RunRecord, new: RunRecord) -> list[tuple[str, ...]]:
    """What makes two runs different, each in words for a UserError. `new` is this process's own, with its `config`."""
    found: list[tuple[str, ...]] = []
    differing = set()
    for f in dataclasses.fields(new):
        was, now = getattr(old, f.name), getattr(new, f.name)
        if f.metadata.get("identity") == "growing":
            was, now = was or {}, now or {}
            was, now = ({k: v for k, v in d.items() if k in was and k in now} for d in (was, now))
        elif f.metadata.get("identity") == "known":
            was = now if was is None else was
        elif f.metadata.get("identity") != "same":
            continue
        if isinstance(now, Fingerprint) and now.matches(was):
            continue
        if leaves := _leaves(f.name, was, now):
            found += [(leaf,) for leaf in leaves]
            differing.add(f.name)
    fields = {f.name for f in dataclasses.fields(new)}
    for name, effect, of, change in _changed(new.config, old.settings, new.settings):
        by_content = effect == "content" and of in fields
        if effect == "" or (of in differing if by_content else effect == "content"):
            found.append((Setting(name), change))
    return found


def check_finished(folder: Path, old: RunRecord, config: CommandSettings) -> None:
    """Raise UserError where a finished run is to be resumed with other settings, so that it cannot go on."""
    changed = _changed(config, old.settings, recorded(config))
    if found := [(Setting(name), change) for name, effect, _, change in changed if effect in ("", "content")]:
        what = f"{folder} has finished, with other settings: "
        remedy = ("leave those out, or train anew, in another ", Setting("out"))
        raise UserError((what, *_listed(found)), remedy)


def setting_changes(old: RunRecord, config: CommandSettings) -> list[tuple[str, ...]]:
    """The settings, beyond names of content, in which a record differs from `config`, each in words for a UserError."""
    changed = _changed(config, old.settings, recorded(config))
    return [(Setting(name), change) for name, effect, _, change in changed if effect == ""]


def rounding(old: RunRecord, new: RunRecord) -> list[str]:
    """What differs between two runs of the same settings and may change the last digits of the result, in words."""
    changed = _changed(new.config, old.settings, new.settings)
    found = [f"{name}{change}" for name, effect, _, change in changed if effect == "rounding"]
    for name in ("versions", "threads", "device", "ranks"):
        found += _leaves(name, old.environment.get(name), new.environment.get(name))
    return found


def check_same(folder: Path, old: RunRecord, new: RunRecord) -> None:
    """Raise UserError with the differences where two records are not of the same run."""
    _refuse(folder, old, differences(old, new))


def check_settings(folder: Path, old: RunRecord, config: CommandSettings) -> None:
    """The same for the settings alone, beyond names of content: known before anything is read."""
    _refuse(folder, old, setting_changes(old, config))


def _refuse(folder: Path, old: RunRecord, found: Sequence[tuple[str, ...]]) -> None:
    if found:
        words = _listed(found)
        what = f"{folder} holds a{'n unfinished' if old.status == 'running' else ''} {command_of(old.kind)} run of "
        # What no setting names is the content of files.
        named = any(isinstance(part, Setting) for part in words)
        remedy = "give those, or another " if named else "put those back, or give another "
        raise UserError((what, "other settings: ", *words), (remedy, Setting("out")))


def _listed(found: Sequence[tuple[str, ...]]) -> list[str]:
    """Differences in one sentence; with the reason, where the length of a run is among them."""
    words = [part for difference in found for part in ("; ", *difference)][1:]
    if {"max_steps", "epochs"} & {difference[0] for difference in found}:
        words.append(" (a run is as long as it was begun: the learning rate of each step follows from their number)")
    return words


def _changed(config: Any, old: Mapping, new: Mapping, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, effect, record's field, change in words) of every setting that differs, those of groups as `train.lr`. The
    name of what is in a group is all that the record knows of its content. A setting that the old record lacks did not
    exist then: it had today's default."""
    own = {f.name for f in dataclasses.fields(CommandSettings)}
    for f in dataclasses.fields(config) if config is not None else ():
        was, now = (values.get(f.name, _default(f)) for values in (old, new))
        effect = f.metadata.get("effect", "")
        group = getattr(config, f.name)
        if dataclasses.is_dataclass(group) and effect == "none":
            continue
        if dataclasses.is_dataclass(group) and (was is None or isinstance(was, Mapping)):
            yield from _changed(group, was or {}, now or {}, f"{f.name}.")
        elif was != now and (f.name not in own or prefix):
            change = f" was {was}, now {now}"
            yield f"{prefix}{f.name}", effect, "" if prefix else f.metadata.get("of", ""), change


def _default(f: dataclasses.Field) -> Any:
    """A setting's default, as a record has it."""
    value = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    if dataclasses.is_dataclass(value) or value is dataclasses.MISSING:
        return None
    return to_json(value)


def _leaves(name: str, was: Any, now: Any) -> list[str]:
    """Where two values differ, down to the keys of dicts and fields of dataclasses."""
    if dataclasses.is_dataclass(was) and type(was) is type(now):
        free = {f.name for f in dataclasses.fields(was) if f.metadata.get("identity") == "free"}
        was, now = ({k: v for k, v in plain(x).items() if k not in free} for x in (was, now))
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted({*was, *now})
        return [leaf for key in keys for leaf in _leaves(f"{name}.{key}", was.get(key), now.get(key))]
    if isinstance(was, (tuple, list)) and isinstance(now, (tuple, list)) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True), 1)
        return [leaf for i, (a, b) in pairs for leaf in _leaves(f"{name}.{i}", a, b)]
    if was == now:
        return []
    shown = [str(v) if len(str(v)) <= 60 else f"{str(v)[:57]}..." for v in map(plain, (was, now))]
    return [f"{name} was {shown[0]}, now {shown[1]}"]


@dataclass
class Run(Generic[Record]):
    """A run's folder, held by this process. `resumed`: an earlier process began the run."""

    folder: Path
    record: Record
    resumed: bool = False
    before: Record | None = None  # of the process that began what is resumed
    shared: bool = False
    began: float = field(default_factory=time.monotonic)
    joules: energy.Joules = field(default_factory=energy.joules)

    def finish(self, result: dict[str, Any] | None = None, **changes: Any) -> Record:
        """Write the finished record, after everything else in the folder. `changes`: more fields of the record."""
        with lock(self.folder / LOCKS, "record", wait=True) if self.shared else nullcontext():
            if self.shared:
                self.record = merged(self.folder, self.record)
            spent = {"seconds": time.monotonic() - self.began, **energy.spent(self.joules)}
            changes = {"result": result, "time": spent, "finished_at": time.time()} | changes
            self.record = dataclasses.replace(self.record, status="finished", **changes)
            self.record.write(self.folder)
            sync(self.folder)
        return self.record


@contextmanager
def claim(
    out: Path | None, record: Record, parent: Path = CHECKPOINTS, *, reuse: bool = False
) -> Iterator[Run[Record]]:
    """Hold the folder of a run and write its record into it: `out` if it is empty or holds an unfinished run of the
    same settings; without `out` a new `parent`/<kind>-<date>-<time>, or with `reuse` the newest there that holds an
    unfinished run of the same settings.

    Raises UserError, with the differences, for an unfinished run of other settings, for a folder with anything else in
    it, for a symbolic link in it, where another process holds the folder, and where locks do not work.
    """
    with ExitStack() as held:
        folder = _unfinished(parent, record, held) if out is None and reuse else None
        resumed = folder is not None
        if folder is None:
            old = find_record(out, type(record))
            if out is not None and old is not None and old.status == "running":
                check_same(out, old, record)
                folder, resumed = out, True
            else:
                folder = new_folder(out, parent, record.kind)
            held.enter_context(exclusive_lock(folder))
            if find_record(folder, type(record)) != (old if resumed else None):  # read before the folder was held
                raise UserError(f"another process was at work in {folder} just now", "start again")
        remove_partial_files(folder)
        refuse_links(folder)
        before = find_record(folder, type(record)) if resumed else None
        record.write(folder)
        (folder / ERROR).unlink(missing_ok=True)
        with _error_kept(folder):
            yield Run(folder, record, resumed, before)


@contextmanager
def _error_kept(folder: Path) -> Iterator[None]:
    """Write why a run stopped into its folder, for `ptst status`; a process that is killed cannot."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a full disk, say, may be the error
            told = " ".join(str(error).split()) or type(error).__name__
            write_json(folder / ERROR, {"error": told, "at": time.time()})
        raise


@contextmanager
def share(out: Path, record: Record) -> Iterator[Run[Record]]:
    """As `claim`, for a folder on which several processes work at once, finished or not: the record in it gets what is
    new in the GROWING fields. Work is divided by `lock`."""
    merged(out, record)  # before anything is written there
    with lock(out / LOCKS, "record", wait=True):
        resumed = (out / FILE).exists()
        record = merged(out, record)
        remove_partial_files_of(out / FILE)
        record.write(out)
    yield Run(out, record, resumed, shared=True)


def merged(out: Path, record: Record) -> Record:
    """`record` with what the one in `out` has in the GROWING fields. Raises UserError where that is of other settings,
    and where the folder holds something else."""
    if (old := find_shared(out, type(record))) is None:
        return record
    check_same(out, old, record)
    growing = [f.name for f in dataclasses.fields(record) if f.metadata.get("identity") == "growing"]
    both: dict[str, Any] = {name: (getattr(old, name) or {}) | (getattr(record, name) or {}) for name in growing}
    return dataclasses.replace(record, **both)


def find_shared(out: Path, record: type[Record]) -> Record | None:
    """The record in a shared folder, if there is one. Raises UserError where the folder holds something else."""
    # Listed before the record is read: another process may write that first of all in between.
    names = [p.name for p in out.iterdir()] if out.exists() else []
    old = find_record(out, record)
    if old is None and any(name not in (LOCK, CLAIM, LOCKS) and not name.startswith(f".{FILE}.") for name in names):
        cause = f"{out} is not a {command_of(record.kind)} folder and not empty"
        raise UserError(cause, ("choose another ", Setting("out")))
    return old


def check_out(out: Path | None, record: type[RunRecord], parent: Path = CHECKPOINTS, *, again: bool = False) -> None:
    """Before a command reads anything: raise UserError where nothing can be written in `out` (None: in `parent`), and
    where `out` has something else in it than an unfinished run of this kind, or with `again` any such run."""
    check_writable(out or parent)
    if out is not None:
        old = find_record(out, record)
        if old is None or (old.status == "finished" and not again):
            _check_empty(out)


def check_writable(folder: Path) -> None:
    """Raise UserError where no file can be written in a folder, or above where it is to be. It is tried, with a file
    that has no name."""
    above = (folder, *folder.absolute().parents)
    there = next(path for path in above if os.path.lexists(path))
    remedy, result = ("choose another ", Setting("out")), f", so {folder} cannot be made" * (there != folder)
    if not there.is_dir():
        raise UserError(f"{there} is not a folder{result}", remedy)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written in {there} ({error.strerror}){result}", remedy) from None


def _check_empty(out: Path) -> None:
    # A lock, and what a kill left of the very first file, are not an earlier run.
    left = (LOCK, CLAIM, ".*.json.*.partial")
    if out.exists() and (not out.is_dir() or any(not any(map(p.match, left)) for p in out.iterdir())):
        remedy = ("choose another ", Setting("out"), ", so that no earlier run is overwritten")
        raise UserError(f"{out} is not an empty folder", remedy)


def new_folder(out: Path | None, parent: Path, kind: str) -> Path:
    """Make a new empty folder: `out`, or `parent`/<kind>-<date>-<time>. Raises UserError when `out` is in use."""
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = [f"{kind}-{stamp}", *(f"{kind}-{stamp}-{n}" for n in range(2, 100))]
        out = next(p for p in (parent / n for n in names) if not p.exists())
    _check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _unfinished(parent: Path, record: RunRecord, held: ExitStack) -> Path | None:
    """The newest unfinished run of these settings in `parent` that no other process holds; locked."""
    for folder in sorted(parent.glob(f"{record.kind}-*"), reverse=True):
        try:
            old = find_record(folder, type(record))
            if old is None or old.status == "finished" or differences(old, record):
                continue
            held.enter_context(exclusive_lock(folder))
        except (UserError, OSError):  # damaged, another process's, or another user's
            continue
        return folder
    return None
