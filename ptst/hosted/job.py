"""One job for one run, whatever happens to this process: found again before another is ever started.

Before anything is asked for, the folder's `job.json` says so on the disk. A job carries the run's mark in its metadata
and in the suffix of its model's name, and a file the hash of its content in its name, so that both are found in the
endpoint's lists even where no answer ever arrived. Two processes of one user take turns; should two jobs have one mark
all the same (from two machines, say), the later one is cancelled at once.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ptst.api.endpoint import Trouble
from ptst.config_file import build
from ptst.errors import Setting, UserError
from ptst.hosted.client import JobsClient, Json, wait_before_repeat
from ptst.hosted.plan import HostedPlan
from ptst.progress import say
from ptst.records import read_json
from ptst.storage import cache_home, lock, write_json

STATE = "job.json"
SETTLE = 30.0  # seconds that a job may take to appear in the list after it was asked for
LOOK = 1.0  # seconds between two looks at the list, or at a file
FILE_PATIENCE = 600.0  # seconds for the endpoint to read a file; a job may be asked for after that, too
RETRIES = 6  # of what starts something, each after the list has been looked at
ENDED = ("succeeded", "failed", "cancelled")
_RUN, _ATTEMPT = "ptst_run", "ptst_attempt"
_SUFFIXES = ("user_provided_suffix", "suffix", "fine_tuned_model")


@dataclass
class JobState:
    """What is known of a run's files (by name) and job. `asked_at`: when a job was asked for whose answer has not
    arrived. `attempt`: grows where a job has failed or was cancelled, and another is wanted."""

    mark: str
    attempt: int = 1
    files: dict[str, str] = field(default_factory=dict)
    asked_at: float | None = None
    job: str | None = None

    def write(self, folder: Path) -> None:
        write_json(folder / STATE, asdict(self))


def read_state(folder: Path, mark: str) -> JobState:
    """The state in a run folder, a new one where there is none. Raises UserError for a damaged one."""
    path = folder / STATE
    if not path.exists():
        return JobState(mark)
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError("is not the state of a job", "the run is damaged", path)
    state = build(JobState, values, str(path))
    if state.mark != mark:
        raise UserError("is the state of another job", "the run is damaged", path)
    return state


def file_name(content: bytes) -> str:
    """By the content, so that the same file is found again."""
    return f"ptst-{hashlib.sha256(content).hexdigest()[:40]}.jsonl"


class JobFinder:
    """The files and the job of a plan at an endpoint."""

    def __init__(self, client: JobsClient, plan: HostedPlan):
        self.client, self.plan, self.mark = client, plan, plan.mark
        self.files: set[str] = set()  # ids of what was sent

    def find(self, attempt: int | None = None) -> Json | None:
        """The first job of this mark and attempt; without an attempt, of the latest one."""
        found = self._marked()
        attempts = [attempt_of(job) for job in found]
        wanted = attempt if attempt is not None else max(attempts, default=1)
        same = [job for job, number in zip(found, attempts, strict=True) if number == wanted]
        return min(same, key=lambda job: (_created(job), str(job.get("id"))), default=None)

    def _marked(self) -> list[Json]:
        return [job for job in self.client.jobs({_RUN: self.mark}) if self._is_ours(job)]

    def _is_ours(self, job: Json) -> bool:
        metadata = job.get("metadata")
        if isinstance(metadata, dict) and _RUN in metadata:
            return bool(metadata[_RUN] == self.mark)
        # An endpoint that keeps no metadata: the suffix, by itself or in the model's name, or else the file.
        names = [n for key in _SUFFIXES if isinstance(n := job.get(key), str)]
        if names:
            return any(_short(self.mark) in name for name in names)
        same = job.get("seed") in (None, self.plan.config.seed) and job.get("model") == self.plan.model
        return same and job.get("training_file") in self.files

    def ensure_file(self, content: bytes, state: JobState, folder: Path) -> str:
        """The id of a file with this content: the one that was sent before, or a new one."""
        name = file_name(content)
        self.files.update(state.files.values())
        if (known := state.files.get(name)) and (file := self.client.file(known)) and self._is_good(file):
            self._wait_for_file(file, folder)
            return known
        for repeat in range(RETRIES + 1):
            found = next((f for f in self.client.files() if _same_file(f, name, content) and self._is_good(f)), None)
            if found is not None:
                break
            say(f"sending {name} ({len(content):,} bytes)")
            sent = self.client.upload(name, content)
            if not isinstance(sent, Trouble):
                found = sent
                break
            if sent.final or not sent.again or repeat == RETRIES:
                raise self.client.error(sent, "no job was started")
            wait_before_repeat(sent, repeat)
        assert found is not None
        state.files[name] = str(found.get("id"))
        self.files.add(state.files[name])
        state.write(folder)
        self._wait_for_file(found, folder)
        return state.files[name]

    def _wait_for_file(self, file: Json, folder: Path) -> None:
        """Wait until the endpoint has read a file. Raises UserError where it refuses it."""
        id, start = str(file.get("id")), time.monotonic()
        while file.get("status") == "uploaded" and time.monotonic() - start < FILE_PATIENCE:
            time.sleep(LOOK)
            file = self.client.file(id) or {"status": "error", "status_details": "it is gone"}
        if not self._is_good(file):
            why = self.client.address.clean(str(file.get("status_details") or "no reason is given"))
            cause = f"{self.client.address.url} refuses the file {id} ({why.rstrip('.')[:400]})"
            raise UserError(cause, f"no job was started; {folder} has the file")

    @staticmethod
    def _is_good(file: Json | None) -> bool:
        return file is not None and file.get("status") not in ("error", "deleted")

    def ensure_job(self, state: JobState, folder: Path) -> Json:
        """The job of this run, started where the endpoint has none. Raises UserError where it refuses to."""
        self.files.update(state.files.values())
        with self._alone():
            found = self.known_job(state.job, folder) if state.job else self._settled(state)
            for repeat in range(RETRIES + 1):
                if found is not None:
                    break
                outcome = self._ask(state, folder)
                if not isinstance(outcome, Trouble):
                    found = self._first(outcome, state)
                    break
                if outcome.final or not outcome.again or repeat == RETRIES:
                    raise self._refused(outcome, state, folder)
                if outcome.status == 429:  # it says that it did not even look at the request
                    state.asked_at = None
                say(f"{self.client.address.url} {outcome.words}; looking whether it has started the job")
                wait_before_repeat(outcome, repeat)
                found = self._settled(state)
            assert found is not None
            state.job, state.asked_at = str(found.get("id")), None
            state.write(folder)
        return found

    def known_job(self, id: str, folder: Path) -> Json:
        """A job that was started. Raises UserError where the endpoint does not have it."""
        if (job := self.client.job(id)) is None:
            cause = f"{id} is not at {self.client.address.url}, where it was started"
            raise UserError(
                cause, ("check ", Setting("base_url"), " and the key, or give ", Setting("new_job")), folder
            )
        return job

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of this user at a time starts a job of this mark."""
        with lock(cache_home() / "jobs", self.mark, wait=True):
            yield

    def _settled(self, state: JobState) -> Json | None:
        """The job that the endpoint has; where one was asked for not long ago, it gets time to appear."""
        # The clock of the day, which may have been put back, says how long ago; another, how long it has been since.
        patience = 0.0 if state.asked_at is None else min(SETTLE, state.asked_at + SETTLE - time.time())
        end = time.monotonic() + patience
        while (found := self.find(state.attempt)) is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(LOOK, left))
        return found

    def _ask(self, state: JobState, folder: Path) -> Json | Trouble:
        """Ask for the job, after the disk knows of it."""
        plan = self.plan
        files = {"training_file": self.ensure_file(plan.content, state, folder)}
        if plan.validation_content is not None:
            files["validation_file"] = self.ensure_file(plan.validation_content, state, folder)
        state.asked_at = time.time()
        state.write(folder)
        request = {
            "model": plan.model,
            **files,
            "method": {"type": "supervised", "supervised": {"hyperparameters": plan.hyperparameters}},
            "seed": plan.config.seed,
            "suffix": f"ptst-{_short(self.mark)}",
        }
        return self.client.create(request, {_RUN: self.mark, _ATTEMPT: str(state.attempt)})

    def _first(self, started: Json, state: JobState) -> Json:
        """The job that was just started, unless there is an earlier one: then that, and this one is cancelled."""
        earlier = self.find(state.attempt)
        if earlier is None or earlier.get("id") == started.get("id"):
            say(f"{started['id']} is started at {self.client.address.url}")
            return started
        say(f"{earlier['id']} is of the same settings; {started['id']}, started a moment later, is cancelled")
        outcome = self.client.cancel(str(started["id"]))
        if isinstance(outcome, Trouble):
            say(f"warning: {started['id']} could not be cancelled and may cost money: {self.client.error(outcome)}")
        return earlier

    def _refused(self, trouble: Trouble, state: JobState, folder: Path) -> UserError:
        if trouble.status is not None and trouble.status < 500:  # it was understood, and nothing was started
            state.asked_at = None
            state.write(folder)
        if trouble.status == 400:
            return self.client.error(
                trouble, ("no job was started; is ", Setting("model"), " one that can be trained?")
            )
        return self.client.error(trouble, f"{folder} has the file; the same command goes on from here")


def attempt_of(job: Json) -> int:
    """Which attempt of its mark a job is."""
    metadata = job.get("metadata")
    number = metadata.get(_ATTEMPT) if isinstance(metadata, dict) else None
    return int(number) if isinstance(number, str) and number.isdecimal() else 1


def _created(job: Json) -> float:
    created = job.get("created_at")
    return created if isinstance(created, int | float) else 0.0


def _short(mark: str) -> str:
    return mark[:12]


def _same_file(file: Json, name: str, content: bytes) -> bool:
    return file.get("filename") == name and file.get("bytes") in (None, len(content))
