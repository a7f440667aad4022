"""Files and fine-tuning jobs. A job goes on by the clock alone: what it is by now follows from when it was created."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

from tests.stand_in.faults import ApiError

ROLES = ("system", "user", "assistant", "developer", "tool", "function")
TUNABLE = ("gpt-3.5-turbo-0613", "gpt-3.5-turbo-1106", "gpt-3.5-turbo-0125", "gpt-3.5-turbo", "gpt-4o-mini")
UNSAFE = (
    "The job failed due to an unsafe training file. This training file was blocked by our moderation system because it "
    "contains too many examples that violate the usage policies."
)
# Where each state begins, in ticks after a job was created; `running` lasts as many ticks as there are steps.
_QUEUED, _RUNNING = 1, 2


@dataclass(frozen=True)
class JobScript:
    """How jobs go. `tick`: seconds that a job stays in each state before `running`, and takes for a step. `steps`: of
    a job, at most. `fails`: the error (`code`, `message`) of a job, and `fails_in` the state in which it comes.
    `hidden`: seconds before a new job is in the list. `processing`: seconds that a file takes to be read, and
    `refuses_file`: why it is then refused. `forgets`: keys that a job is shown without."""

    tick: float = 0.01
    steps: int = 8
    fails: tuple[str, str] | None = None
    fails_in: str = "running"
    hidden: float = 0.0
    processing: float = 0.0
    refuses_file: str = ""
    forgets: tuple[str, ...] = ()

    @classmethod
    def unsafe(cls) -> JobScript:
        """Jobs whose files moderation refuses."""
        return cls(fails=("unsafe_file", UNSAFE), fails_in="validating_files")


@dataclass
class Upload:
    id: str
    name: str
    purpose: str
    content: bytes
    created: float
    script: JobScript

    @property
    def status(self) -> str:
        if time.time() - self.created < self.script.processing:
            return "uploaded"
        return "error" if self.script.refuses_file else "processed"

    def to_json(self) -> dict[str, Any]:
        fields = {"id": self.id, "object": "file", "bytes": len(self.content), "created_at": int(self.created)}
        why = self.script.refuses_file if self.status == "error" else None
        return fields | {"filename": self.name, "purpose": self.purpose, "status": self.status, "status_details": why}

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.content.splitlines() if line.strip()]


@dataclass
class Job:
    """`asked`: the body of the request that made it. `rows`, `tokens`: of its training file."""

    id: str
    asked: dict[str, Any]
    script: JobScript
    rows: list[dict[str, Any]]
    created: float
    cancelled: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Hyperparameters as given: in today's form, or in the older one."""
        method = self.asked.get("method") or {}
        return method.get("supervised", {}).get("hyperparameters") or self.asked.get("hyperparameters") or {}

    def hyperparameters(self) -> dict[str, Any]:
        auto = {"n_epochs": 3, "batch_size": max(1, len(self.rows) // 500), "learning_rate_multiplier": 2.0}
        return {k: self.given[k] if self.given.get(k, "auto") != "auto" else auto[k] for k in auto}

    @property
    def steps(self) -> int:
        chosen = self.hyperparameters()
        return max(1, min(self.script.steps, chosen["n_epochs"] * -(-len(self.rows) // chosen["batch_size"])))

    def ticks(self, now: float) -> int:
        return int((min(now, self.cancelled or now) - self.created) / self.script.tick)

    def status(self, now: float) -> str:
        ticks = self.ticks(now)
        ends = _RUNNING + self.steps
        state = "validating_files" if ticks < _QUEUED else "queued" if ticks < _RUNNING else "running"
        failed = {"validating_files": _QUEUED, "queued": _RUNNING, "running": _RUNNING + self.steps // 2}
        if self.script.fails and ticks >= failed[self.script.fails_in]:
            return "failed"
        if self.cancelled is not None:
            return "cancelled"
        return "succeeded" if ticks >= ends else state

    @property
    def model(self) -> str:
        middle = f"stand-in:{self.asked.get('suffix') or ''}"
        return f"ft:{self.asked['model']}:{middle}:{self.id[-8:]}"

    def trained_tokens(self) -> int:
        """Words of a row's messages, once for each epoch."""
        words = sum(len(m.get("content", "").split()) for row in self.rows for m in row["messages"])
        return words * self.hyperparameters()["n_epochs"]

    def to_json(self, now: float) -> dict[str, Any]:
        status = self.status(now)
        done = status == "succeeded"
        ended = int(now) if status in ("succeeded", "failed", "cancelled") else None
        code, message = self.script.fails if status == "failed" and self.script.fails else ("", "")
        error = {"code": code, "message": message, "param": "training_file"} if code else {}
        chosen = self.hyperparameters()
        shown = {
            "id": self.id,
            "object": "fine_tuning.job",
            "model": self.asked["model"],
            "created_at": int(self.created),
            "finished_at": ended,
            "status": status,
            "error": error or None,
            "fine_tuned_model": self.model if done else None,
            "organization_id": "org-stand-in",
            "training_file": self.asked["training_file"],
            "validation_file": self.asked.get("validation_file"),
            "hyperparameters": chosen,
            "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
            "trained_tokens": self.trained_tokens() if done else None,
            "seed": self.asked.get("seed", 7),
            "result_files": [f"file-results-{self.id[-8:]}"] if done else [],
            "estimated_finish": None,
            "integrations": [],
            "metadata": self.asked.get("metadata"),
            "user_provided_suffix": self.asked.get("suffix"),
        }
        return {k: v for k, v in shown.items() if k not in self.script.forgets}

    def events(self, now: float) -> list[dict[str, Any]]:
        """From the first to the last, as far as the job is by now."""
        found: list[tuple[str, str, dict[str, Any] | None]] = []
        status, ticks, ends = self.status(now), self.ticks(now), _RUNNING + self.steps
        found.append((f"Created fine-tuning job: {self.id}", "info", None))
        found.append((f"Validating training file: {self.asked['training_file']}", "info", None))
        if ticks >= _QUEUED and status != "failed":
            found.append(("Files validated, moving job to queued state", "info", None))
        if ticks >= _RUNNING and (status != "failed" or self.script.fails_in == "running"):
            found.append(("Fine-tuning job started", "info", None))
            last = self.steps // 2 if status == "failed" else self.steps
            for step in range(1, min(ticks - _RUNNING, last) + 1):
                found.append((*self._metrics(step),))
        if status == "succeeded" and ticks >= ends:
            found.append((f"New fine-tuned model created: {self.model}", "info", None))
            found.append(("The job has successfully completed", "info", None))
        if status == "failed" and self.script.fails:
            found.append((self.script.fails[1], "error", None))
        if status == "cancelled":
            found.append(("The job was cancelled", "info", None))
        return [self._event(number, *event) for number, event in enumerate(found)]

    def _metrics(self, step: int) -> tuple[str, str, dict[str, Any]]:
        loss, accuracy = round(2 / (1 + step), 4), round(1 - 1 / (1 + step), 4)
        data = {"step": step, "total_steps": self.steps, "train_loss": loss, "train_mean_token_accuracy": accuracy}
        return f"Step {step}/{self.steps}: training loss={loss:.2f}", "info", data

    def _event(self, number: int, message: str, level: str, data: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{self.id[-8:]}-{number:04d}",
            "created_at": int(self.created),
            "level": level,
            "message": message,
            "type": "metrics" if data else "message",
            "data": data or {},
        }

    def results(self) -> bytes:
        """The results file: CSV in base64, as the API has it."""
        lines = ["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"]
        for step in range(1, self.steps + 1):
            _, _, data = self._metrics(step)
            lines.append(f"{step},{data['train_loss']},{data['train_mean_token_accuracy']},,")
        return base64.b64encode("\n".join(lines).encode())


@dataclass
class Store:
    """All files and jobs, in the order in which they came."""

    script: JobScript = field(default_factory=JobScript)
    tunable: tuple[str, ...] = TUNABLE
    files: dict[str, Upload] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def upload(self, name: str, purpose: str, content: bytes) -> dict[str, Any]:
        if purpose != "fine-tune":
            raise ApiError(400, f"'{purpose}' is not one of ['fine-tune']", "invalid_value", "purpose")
        if not name.endswith(".jsonl"):
            raise ApiError(400, f"Invalid extension of {name}. Supported formats: jsonl", "invalid_file", "file")
        file = Upload(f"file-{_tag(len(self.files), name)}", name, purpose, content, time.time(), self.script)
        self.files[file.id] = file
        return file.to_json()

    def file(self, id: str) -> Upload:
        if id not in self.files:
            raise ApiError(404, f"No such File object: {id}", None, "id")
        return self.files[id]

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        model, file = asked.get("model"), asked.get("training_file")
        if model not in self.tunable and not str(model).startswith("ft:"):
            message = f"Model {model} is not available for fine-tuning or does not exist."
            raise ApiError(400, message, "model_not_available", "model")
        if file not in self.files:
            raise ApiError(400, f"invalid training_file: {file}", "invalid_training_file", "training_file")
        if (status := self.files[file].status) != "processed":
            message = f"File '{file}' is not ready to be used for fine-tuning ({status})."
            raise ApiError(400, message, "invalid_training_file", "training_file")
        rows, problem = read_rows(self.files[file].content)
        fails = {"fails": ("invalid_training_file", problem), "fails_in": "validating_files"}
        script = replace(self.script, **fails) if problem else self.script
        job = Job(f"ftjob-{_tag(len(self.jobs), str(file))}", asked, script, rows, time.time())
        self.jobs[job.id] = job
        return job.to_json(job.created)

    def job(self, id: str) -> Job:
        if id not in self.jobs:
            raise ApiError(404, f"Could not find fine tune: {id}", "fine_tune_not_found", "fine_tuning_job_id")
        return self.jobs[id]

    def cancel(self, id: str) -> dict[str, Any]:
        job, now = self.job(id), time.time()
        if job.status(now) in ("succeeded", "failed", "cancelled"):
            message = f"Job has already {job.status(now)} and cannot be cancelled."
            raise ApiError(400, message, "invalid_request", "fine_tuning_job_id")
        job.cancelled = now
        return job.to_json(now)

    def listed(self) -> list[dict[str, Any]]:
        """The jobs, newest first."""
        now = time.time()
        return [job.to_json(now) for job in reversed(self.jobs.values()) if now - job.created >= job.script.hidden]

    def tuned(self, model: str) -> Job | None:
        """The finished job that made a model."""
        made = (job for job in self.jobs.values() if job.model == model)
        return next((job for job in made if job.status(time.time()) == "succeeded"), None)

    def delete_file(self, id: str) -> dict[str, Any]:
        del self.files[self.file(id).id]
        return {"id": id, "object": "file", "deleted": True}

    def content(self, id: str) -> bytes:
        results = {f"file-results-{job.id[-8:]}": job for job in self.jobs.values()}
        return results[id].results() if id in results else self.file(id).content


def read_rows(content: bytes) -> tuple[list[dict[str, Any]], str]:
    """The rows of a training file, or what a job would find wrong with them."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            messages = row["messages"]
            roles = [message["role"] for message in messages]
            texts = [message["content"] for message in messages]
        except (ValueError, KeyError, TypeError):
            return [], f"Invalid file format. Line {number}: not an object with messages"
        if not set(roles) <= set(ROLES) or roles[-1:] != ["assistant"] or not all(isinstance(t, str) for t in texts):
            return [], f"Invalid file format. Line {number}: the last message must be from the assistant"
        rows.append(row)
    if len(rows) < 10:
        return [], f"Training file has {len(rows)} example(s), but must have at least 10 examples"
    return rows, ""


def _tag(number: int, name: str) -> str:
    return hashlib.sha256(f"{number} {name}".encode()).hexdigest()[:16]
