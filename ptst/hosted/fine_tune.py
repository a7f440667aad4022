"""Fine-tuning at an endpoint, in a run folder: from settings to a finished record, found again where it was left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst.api.endpoint import Address, Trouble, check_client, model_address
from ptst.consent import ask_consent
from ptst.errors import Setting, UserError
from ptst.hosted.checks import check_hosted
from ptst.hosted.client import JobsClient, Json
from ptst.hosted.job import ENDED, STATE, JobFinder, JobState, attempt_of, read_state
from ptst.hosted.plan import HostedPlan, plan_hosted
from ptst.hosted.record import HostedRecord, job_record, settings_of_run
from ptst.hosted.watch import Watch
from ptst.progress import console, say
from ptst.records import find_record, read_record
from ptst.runs import check_finished, check_out, check_same, claim
from ptst.storage import write_atomically
from ptst.training.config import TrainConfig

TRAINING_FILE, VALIDATION_FILE = "train.jsonl", "validation.jsonl"


@dataclass(frozen=True)
class HostedRun:
    """A finished job."""

    folder: Path
    record: HostedRecord


def fine_tune_hosted(config: TrainConfig) -> HostedRun:
    """Fine-tune the model openai:NAME by a job at its endpoint, and wait for it. The same settings find the same job
    again, in their run folder or in the endpoint's list, and never start a second one. Nothing is sent before `yes`,
    or a person at a terminal, agrees.

    Raises UserError for a user's mistakes, for what the endpoint refuses, and for a job that failed or was cancelled.
    """
    check_client()
    if config.resume:
        config = settings_of_run(config)
    out = config.resume or config.out
    check_hosted(config)
    address = model_address(config.base_url, read_record(out, HostedRecord).endpoint if out and config.resume else None)
    if (done := _finished(config, address)) is not None:
        return done
    check_out(out, HostedRecord)
    plan = plan_hosted(config)
    record = plan.record(address.url)
    if out is not None and (old := find_record(out, HostedRecord)) is not None:
        check_same(out, old, record)
    with JobsClient(address) as client:
        finder = JobFinder(client, plan)
        _agree(finder, _known_state(out, plan))
        with claim(out, record, reuse=True) as run:
            if run.resumed:
                say(f"{run.folder} holds an unfinished run of these settings: it is resumed")
                if run.before is not None and run.before.job is not None:
                    run.record.job = run.before.job
            _write_files(run.folder, plan)
            state = _choose_attempt(finder, read_state(run.folder, plan.mark), run.folder)
            job = finder.ensure_job(state, run.folder)
            run.record.job = job_record(job)
            run.record.write(run.folder)
            with (
                _told_of_interruption(run.folder, str(job["id"]), address.url),
                Watch(client, job, run.folder) as watch,
            ):
                job = watch.to_end()
                run.record.job = job_record(job)
                run.record.write(run.folder)
                _check_succeeded(job, run.folder)
                rows = watch.finish()
            return HostedRun(run.folder, run.finish(**_outcome(job, rows, run.record, plan, run.folder)))


def cancel_hosted(config: TrainConfig) -> dict[str, Any]:
    """End the job of the run in `resume`; returns its record. Raises UserError where there is none, and where it has
    ended."""
    check_client()
    if (folder := config.resume or config.out) is None:
        raise UserError((Setting("cancel"), " needs the run"), ("give its folder as ", Setting("resume")))
    record = read_record(folder, HostedRecord)
    state = read_state(folder, record.mark)
    with JobsClient(model_address(record.settings.get("base_url"), record.endpoint)) as client:
        job = client.job(state.job) if state.job else None
        if job is None:
            config = settings_of_run(replace(config, resume=folder))
            job = JobFinder(client, plan_hosted(config)).find(state.attempt)
        if job is None:
            raise UserError(f"{folder} has no job at {client.address.url}", "none was started")
        if job.get("status") in ENDED:
            raise UserError(f"{job['id']} {_past(str(job['status']))} already", "there is nothing to cancel")
        outcome = client.cancel(str(job["id"]))
        if isinstance(outcome, Trouble):
            raise client.error(outcome, f"{job['id']} goes on")
    say(f"{job['id']} is cancelled")
    return {"run": str(folder), "job": str(job["id"]), "status": str(outcome.get("status"))}


def _finished(config: TrainConfig, address: Address) -> HostedRun | None:
    """The run in the folder, where it has finished."""
    out = config.resume or config.out
    old = find_record(out, HostedRecord)
    if out is None or old is None or old.status != "finished":
        return None
    if config.resume:
        check_finished(out, old, config)
    else:
        check_same(out, old, plan_hosted(config).record(address.url))
    say(f"{out} has finished already: the model is {old.tuned_model}")
    return HostedRun(out, old)


def _known_state(out: Path | None, plan: HostedPlan) -> JobState | None:
    """The state in the folder that was named."""
    return read_state(out, plan.mark) if out is not None and (out / STATE).exists() else None


def _agree(finder: JobFinder, state: JobState | None) -> None:
    """Raise UserError unless somebody agreed to start a job, or there is nothing to start."""
    plan, config = finder.plan, finder.plan.config
    if config.yes:
        console.print(plan.table())
        return
    if state is not None and state.job is not None and not config.new_job:
        return
    job = finder.find(None if state is None else state.attempt)
    if job is not None and not (config.new_job and job.get("status") in ("failed", "cancelled")):
        return
    console.print(plan.table())
    url = finder.client.address.url
    question = f"Send the file to {url} and start this job?"
    ask_consent(f"a job at {url} costs money", "the plan", question, "nothing was sent, and no job was started")


def _write_files(folder: Path, plan: HostedPlan) -> None:
    """Keep what the endpoint gets."""
    for name, content in ((TRAINING_FILE, plan.content), (VALIDATION_FILE, plan.validation_content)):
        if content is not None and not (folder / name).exists():
            write_atomically(folder / name, content)


def _choose_attempt(finder: JobFinder, state: JobState, folder: Path) -> JobState:
    """Another attempt where the last one has failed or was cancelled, and another is asked for."""
    if state.job is None and state.asked_at is None and (latest := finder.find()) is not None:
        state.attempt, state.job = attempt_of(latest), str(latest["id"])
        say(f"{latest['id']} is a job of the same settings ({latest.get('status')}): it is taken, and none is started")
    if finder.plan.config.new_job and state.job is not None:
        job = finder.client.job(state.job)
        if job is None or job.get("status") in ("failed", "cancelled"):
            state.attempt, state.job = state.attempt + 1, None
        else:
            say(
                f"note: {state.job} has neither failed nor been cancelled ({job.get('status')}), so no other is started"
            )
    elif state.job is not None:
        finder.known_job(state.job, folder)
    state.write(folder)
    return state


@contextmanager
def _told_of_interruption(folder: Path, job: str, url: str) -> Iterator[None]:
    """Say what goes on where this process does not."""
    again = f"python -m ptst.train --resume {folder}"
    try:
        yield
    except KeyboardInterrupt:
        say(f"{job} goes on at {url}; wait for it with: {again}; end it with: {again} --cancel")
        raise
    except UserError as error:
        if not error.remedy:
            error.remedy = f"{job} may go on; look again with {again}"
        raise


def _check_succeeded(job: Json, folder: Path) -> None:
    """Raise UserError, with the endpoint's reason, for a job that has ended otherwise."""
    if job.get("status") == "succeeded" and isinstance(job.get("fine_tuned_model"), str):
        return
    if job.get("status") == "succeeded":
        raise UserError(f"{job['id']} has succeeded, but names no model", f"{folder} keeps its file and events")
    error = job.get("error") if isinstance(job.get("error"), dict) else {}
    code, message = ((error or {}).get(key) for key in ("code", "message"))
    why = " ".join(str(part) for part in (code and f"({code})", message) if part)
    cause = f"{job['id']} {_past(str(job.get('status')))}" + (f": {why.rstrip('.')[:400]}" if why else "")
    remedy = f"{folder} keeps its file and events; start another job with "
    raise UserError(cause, (remedy, Setting("new_job")))


def _past(status: str) -> str:
    """What a job did, by its last state."""
    return "was cancelled" if status == "cancelled" else f"has {status}"


def _outcome(job: Json, rows: list[Json], record: HostedRecord, plan: HostedPlan, folder: Path) -> dict[str, Any]:
    """What the finished record has of a job."""
    described = job_record(job)
    tokens = job.get("trained_tokens")
    tokens = tokens if type(tokens) is int else None
    price = plan.config.api_price_train
    cost = tokens * price / 1e6 if tokens is not None and price is not None else None
    tuned = str(job["fine_tuned_model"])
    main, *mixed = (rows.record.result() for rows in plan.sources)
    losses = [row for row in rows if "validation_loss" in row]
    used = {name: getattr(described, name) for name in ("n_epochs", "batch_size", "lr_multiplier")}
    result = {
        "run": str(folder),
        "model": tuned,
        "job": {"id": described.id, **used, "trained_tokens": tokens, "cost": cost},
        "steps": rows[-1]["step"] if rows else None,
        "validation_loss": losses[-1]["validation_loss"] if losses else None,
        **main,
        "mix": mixed,
    }
    return {"result": result, "job": described, "tuned_model": tuned, "trained_tokens": tokens, "cost": cost}
