"""The run record, `run.json`: what was run, what came of it, and whether it is whole.

Training, evaluation, grid and alignment each have a record class with their own fields. A record is written first with
status "running" and last with "finished", so that only a whole run is ever picked up. Which fields make two runs the
same is declared on them (SAME, GROWING), as on the settings (`ptst.settings`: NO_EFFECT, ROUNDING, content).
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ptst import __version__
from ptst.config_file import build
from ptst.data.mix_part import TOML, split_mix
from ptst.errors import Setting, UserError
from ptst.reading import parse_json, read_text
from ptst.settings import CommandSettings, to_dict
from ptst.storage import write_json
from ptst.text.templates import Family, Template

VERSION = 2  # of the format; 1 had no number
FILE = "run.json"
HOSTED_TRAIN = "hosted-train"  # the kind of the record of a job at an endpoint (ptst/hosted/record.py)
ERROR = "stopped.json"  # in a run folder: why the last process on an unfinished run stopped
EXPORT = "export.json"  # in a folder of ptst.export, in the place of the run's record
CHECKPOINTS = Path("checkpoints")
SAME = {"identity": "same"}  # two runs that differ in this field are different runs
KNOWN = {"identity": "known"}  # the same, but earlier versions did not record it (None)
GROWING = {"identity": "growing"}  # a dict to which later commands may add, and whose entries stay as they are
_OLD = "evaluate it with that version, or train again"
_PACKAGES = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Versions, git commit, threads and device of this process."""
    import torch

    versions = {name: next((d.version for d in distributions(name=name)), None) for name in _PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": {"ptst": __version__, **versions},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from."""
    here = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@dataclass(kw_only=True)
class RunRecord:
    """What all records have. `settings` are filled from `config`, paths of existing files made absolute, so that they
    hold from another working directory."""

    kind: ClassVar[str]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any]
    status: Literal["running", "finished"] = "running"
    finished_at: float | None = None
    result: dict[str, Any] | None = None
    time: dict[str, Any] | None = None
    config: CommandSettings | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.config is not None:
            self.settings = recorded(self.config)

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        return {"version": VERSION, "kind": self.kind, **plain(values)}

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, self.to_json())


Record = TypeVar("Record", bound=RunRecord)


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """One source of training or validation examples: fingerprints of the conversations and of the examples
    (`encoding`), and what became of the rows. `template`: that of a source mixed in under one of its own; None: the
    run's. `revision`: the commit of a data set on the hub. `unused`: number of rows
    by column that was not read. `untrained`: without a trained token, left out. `token_boundaries`:
    answers encoded as a continuation of their prompt. `lossy`: text that the tokenizer cannot represent, with the first
    place. `partial`: these are the first rows of the data, all that the run's steps take; others were not read."""

    name: str = field(metadata={"identity": "free"})
    fingerprint: str | None = None
    encoding: str
    template: Template | None = None
    epochs: float | None = None
    holdout: float = 0.0
    rows: int
    partial: bool = False
    examples: int
    dropped: int
    cut: int
    untrained: int
    token_boundaries: int
    lossy: int
    first_lossy: str = field(default="", metadata={"identity": "free"})
    revision: str = field(default="", metadata={"identity": "free"})
    unused: dict[str, int] = field(default_factory=dict, metadata={"identity": "free"})
    tokens: int
    trained_tokens: int

    def result(self) -> dict[str, Any]:
        """What the result of a run has of it."""
        names = ["name", "epochs", "fingerprint", "rows", "dropped", "cut", "untrained", "token_boundaries", "lossy"]
        names += [name for name in ("partial", "first_lossy", "revision", "unused") if getattr(self, name)]
        names += ["encoding", "examples", "tokens", "trained_tokens"]
        own = {} if self.template is None else {"template": self.template.name}
        return {name: getattr(self, name) for name in names} | own


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """Validation losses of a run, in nats per trained token; None where there is no validation set."""

    before: float | None
    after: float | None
    examples: int
    best: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedRecord:
    """What the steps of a run were taken on, all sources together: examples as often as they were seen, their tokens,
    and those of them that count in the loss."""

    examples: int
    tokens: int
    trained_tokens: int


@dataclass(kw_only=True)
class TrainRecord(RunRecord):
    """A training run. `model` is as it was named, `model_folder` where its weights were. `account`: for each source,
    how often its examples were in a batch, and in which steps; None in records of earlier versions. `reference`: the
    fingerprint of the model that a token constraint names."""

    kind: ClassVar[str] = "train"
    model: str
    model_folder: str
    weights: str = field(metadata=SAME)
    tokenizer: str | None = field(default=None, metadata=KNOWN)
    template: Template = field(metadata=SAME)
    family: Family = field(metadata=SAME)
    chat_format: str = field(metadata=SAME)
    data: DataRecord = field(metadata=SAME)
    mix: tuple[DataRecord, ...] = field(default=(), metadata=SAME)
    validation: DataRecord | None = field(default=None, metadata=SAME)
    dtype: str = field(metadata=SAME)
    full: bool = field(metadata=SAME)
    reference: str | None = field(default=None, metadata=SAME)
    micro_batch_tokens: int
    recipe: dict[str, Any] | None = None
    steps: int | None = None
    trained: TrainedRecord | None = None
    account: list[dict[str, Any]] | None = None
    validation_loss: LossRecord | None = None

    @property
    def quantize(self) -> str:
        """How the frozen projections were kept in training: none (in `dtype`), nf4 or int8."""
        return self.settings.get("quantize", "none")


def command_of(kind: str) -> str:
    """The command that makes records of a kind, for messages."""
    return "ptst.train of a model behind an endpoint" if kind == HOSTED_TRAIN else f"ptst.{kind}"


def read_record(folder: Path, kind: type[Record]) -> Record:
    """The record in a folder. Raises UserError, naming file and key, where it is absent, damaged or incomplete, of
    another kind, or of another version of the format."""
    path = Path(folder) / FILE
    if not path.exists():
        raise UserError(f"{folder} is not a run folder (it has no {FILE})", f"give one made by {command_of(kind.kind)}")
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise UserError("is not the record of a run", f"give a folder made by {command_of(kind.kind)}", path)
    if values["kind"] != kind.kind:
        raise UserError(f"is the record of {command_of(values['kind'])}, not of {command_of(kind.kind)}", where=path)
    if (found := values.get("version", 1)) != VERSION:
        age = "a later" if isinstance(found, int) and found > VERSION else "an earlier"
        raise UserError(f"was made by {age} version of ptst (format {found}, not {VERSION})", _OLD, path)
    return build(kind, values, str(path))


def find_record(folder: Path | None, kind: type[Record]) -> Record | None:
    """The record in a folder; None where there is none, or one of another kind. Raises UserError as `read_record`."""
    return read_record(folder, kind) if folder is not None and record_kind(folder) == kind.kind else None


def record_kind(folder: Path) -> str | None:
    """Of which command the record in a folder is; None where there is none. Raises UserError as `read_json`."""
    values = read_json(folder / FILE) if (folder / FILE).exists() else None
    return str(values.get("kind")) if isinstance(values, dict) else None


def read_json(path: Path, remedy: str = "the run is damaged") -> Any:
    """The value in a JSON file of a run. Raises UserError for one that is damaged or cannot be read."""
    try:
        return parse_json(read_text(path))
    except UserError:
        raise
    except ValueError as error:  # also of bytes that are no UTF-8
        raise UserError(f"is not valid JSON ({error})", remedy, path) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", "check the file", path) from None


def read_finished(folder: Path) -> TrainRecord:
    """The record of a finished training run. Raises UserError as `read_record`, and when the run did not finish."""
    record = read_record(folder, TrainRecord)
    if record.status != "finished":
        raise UserError(f"{folder} is not a finished training run (status {record.status!r})", "resume it first")
    return record


def latest_run(checkpoints: Path = CHECKPOINTS) -> Path:
    """The training run that finished last. Raises UserError when there is none."""
    found, other = [], ""
    for path in checkpoints.glob(f"*/{FILE}"):
        try:
            if record_kind(path.parent) == TrainRecord.kind:
                found.append((read_finished(path.parent).finished_at or 0.0, path.parent))
        except UserError as error:  # damaged, unfinished, or of another version
            other = f" ({error})"
    if not found:
        remedy = ("train first, or evaluate a model as it is with ", Setting("model"))
        raise UserError(f"no finished training run in {checkpoints}/{other}", remedy)
    return max(found)[1]


def recorded(config: Any) -> dict[str, Any]:
    """All settings as JSON values; those that name existing files name them absolutely."""
    values = to_dict(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            values[f.name] = recorded(value)
        elif isinstance(value, Path):
            values[f.name] = str(value.absolute())
        elif f.metadata.get("effect") == "content" and value is not None:
            values[f.name] = [absolute(v) for v in value] if isinstance(value, tuple) else absolute(value)
    return values


def absolute(name: str) -> str:
    """A name of data or of a model, in which a relative path that exists is made absolute: FILE, NAME:FILE,
    FILE:EPOCHS, FILE:EPOCHS:TEMPLATE, a model folder, or files, folders (with a slash) and patterns of files, with
    commas between them."""
    if (mixed := split_mix(name)) is not None and not Path(name).is_file():
        data, *rest = (part for part in mixed if part is not None)
        if rest[-1].endswith(TOML) and Path(rest[-1]).is_file():
            rest[-1] = str(Path(rest[-1]).absolute())
        return ":".join([absolute(data), *rest])
    for part in (name, *name.split(":", 1), *name.rsplit(":", 1)):
        files = [part] if Path(part).exists() else [file.strip() for file in part.split(",")]
        if part and all(_is_path(file) for file in files):
            return name.replace(part, ",".join(str(Path(file).absolute()) for file in files), 1)
    return name


def _is_path(name: str) -> bool:
    """Whether a name is a file, a model folder, or spelled as a folder or pattern of files."""
    path = Path(name)
    folder = path.is_dir() and ("/" in name or (path / "config.json").is_file())
    return path.is_file() or folder or (any(sign in name for sign in "*?[") and ":" not in name)


def bare(name: str) -> str:
    """The same names without the folders of this machine, for others to read: of an absolute path the last part."""
    return re.sub(r"(?<![^,:])/(?!/)[^,:]*", lambda path: Path(path[0]).name, name)


def without_folders(value: Any) -> Any:
    """Settings as JSON has them with `bare` names, for others to read."""
    if isinstance(value, dict):
        return {name: without_folders(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(each) for each in value]
    return bare(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))
