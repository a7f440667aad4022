"""The record of a fine-tuning job at an endpoint: `run.json`, as other runs have it."""

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ptst.config_file import read_config
from ptst.errors import UserError
from ptst.records import (
    CHECKPOINTS,
    FILE,
    HOSTED_TRAIN,
    SAME,
    DataRecord,
    RunRecord,
    TrainRecord,
    read_json,
    read_record,
)
from ptst.text.templates import Family, Template
from ptst.training.config import TrainConfig

_FREE = {"identity": "free"}


@dataclass(frozen=True, kw_only=True)
class RowsRecord(DataRecord):
    """One source of rows. `encoding`: sha256 over its rows as they were sent. `tokens`: of each row once, counted or an
    upper bound as the run's `token_count` says, so that it makes no two runs different. `duplicates`: rows that repeat
    an earlier one."""

    duplicates: int = 0
    dropped: int = 0
    cut: int = 0
    untrained: int = 0
    token_boundaries: int = 0
    lossy: int = 0
    tokens: int = field(default=0, metadata=_FREE)
    trained_tokens: int = field(default=0, metadata=_FREE)


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The job as the endpoint describes it. `n_epochs`, `batch_size` and `lr_multiplier`: those that it used; None
    where it does not tell. `created_at` and `finished_at`: its clock, in seconds."""

    id: str
    status: str
    training_file: str
    validation_file: str | None = None
    n_epochs: int | None = None
    batch_size: int | None = None
    lr_multiplier: float | None = None
    time: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class HostedRecord(RunRecord):
    """A fine-tuning job. `model`: as it was named (openai:NAME); `base_model`: NAME; `tuned_model`: the endpoint's name
    of what the job made, once it has succeeded. `weights`: stands for the base model's. `family`: how a question is
    worded in the messages. `mark`: by it the job is found again at the endpoint. `token_count`: how tokens were
    counted. `cost`: in the unit of the price that was given; None without one."""

    kind: ClassVar[str] = HOSTED_TRAIN
    model: str
    base_model: str
    endpoint: str
    weights: str = field(metadata=SAME)
    template: Template = field(metadata=SAME)
    family: Family = field(metadata=SAME)
    data: RowsRecord = field(metadata=SAME)
    mix: tuple[RowsRecord, ...] = field(default=(), metadata=SAME)
    validation: RowsRecord | None = field(default=None, metadata=SAME)
    mark: str
    token_count: str = ""
    recipe: dict[str, Any] | None = None
    job: JobRecord | None = None
    tuned_model: str | None = None
    trained_tokens: int | None = None
    cost: float | None = None


def model_weights(endpoint: str, model: str) -> str:
    """In place of a fingerprint of weights that cannot be read: where the model is, and its name there."""
    return f"{endpoint} {model}"


def read_hosted(folder: Path) -> HostedRecord:
    """The record of a finished job's run, with `tuned_model`. Raises UserError as `read_record`, and where the run has
    not finished."""
    record = read_record(folder, HostedRecord)
    if record.status != "finished" or record.tuned_model is None:
        remedy = f"wait for it with ptst train --resume {folder}"
        raise UserError(f"{folder} is not a finished training run (status {record.status!r})", remedy)
    return record


def settings_of_run(config: TrainConfig) -> TrainConfig:
    """The settings of the run to resume, with what was given of how to go on. Raises UserError as
    `read_record`."""
    assert config.resume is not None
    read_record(config.resume, HostedRecord)  # says what is wrong with it
    given = {name: getattr(config, name) for name in ("yes", "new_job", "cancel", "json", "debug")}
    if config.model == TrainConfig().model:  # the folder alone was named
        config = read_config(config.resume / FILE, TrainConfig(), "train")
    return replace(config, resume=config.resume or None, **given)


def latest_hosted(checkpoints: Path = CHECKPOINTS) -> Path | None:
    """The run of the job that finished last; None where a run on this machine finished later, or there is none."""
    found = []
    for path in checkpoints.glob(f"*/{FILE}"):
        with suppress(UserError):  # damaged, or of another version
            values = read_json(path)
            if isinstance(values, dict) and values.get("status") == "finished":
                found.append((float(values.get("finished_at") or 0.0), str(values.get("kind")), path.parent))
    runs = [run for run in found if run[1] in (HostedRecord.kind, TrainRecord.kind)]
    newest = max(runs, default=None)
    return newest[2] if newest and newest[1] == HostedRecord.kind else None


def job_record(job: dict[str, Any]) -> JobRecord:
    """Of a job as the endpoint describes it."""
    supervised = _object(_object(job, "method"), "supervised")
    chosen = _object(supervised, "hyperparameters") or _object(job, "hyperparameters")
    whole = {name: n if type(n := chosen.get(name)) is int else None for name in ("n_epochs", "batch_size")}
    multiplier = chosen.get("learning_rate_multiplier")
    rate = float(multiplier) if isinstance(multiplier, int | float) else None
    times = {k: job[k] for k in ("created_at", "finished_at") if isinstance(job.get(k), int | float)}
    files = {k: None if job.get(k) is None else str(job[k]) for k in ("training_file", "validation_file")}
    return JobRecord(
        id=str(job.get("id")),
        status=str(job.get("status")),
        training_file=files["training_file"] or "",
        validation_file=files["validation_file"],
        lr_multiplier=rate,
        time={**times, "seen_at": time.time()},
        **whole,
    )


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The object in a field; {} for anything else."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}
