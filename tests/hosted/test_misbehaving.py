"""Endpoints that answer with status 200 and nonsense, lose what they had, or send requests elsewhere: one sentence, and
never a second job."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.hosted import job
from ptst.hosted.fine_tune import cancel_hosted, fine_tune_hosted
from ptst.hosted.job import JobFinder
from ptst.hosted.record import read_hosted
from ptst.records import read_json
from ptst.training.config import TrainConfig
from tests.hosted.conftest import settings
from tests.stand_in import KEY, Fault, JobScript, StandIn
from tests.stand_in.jobs import Job

pytest.importorskip("openai", reason="needs the package openai")

ERROR = json.dumps({"error": {"message": "Try later.", "code": 500}})


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def leave(server: StandIn, monkeypatch) -> None:
    """Start a job, and no longer wait for it."""
    server.store.script = JobScript(tick=60)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr("ptst.hosted.watch.sleep", interrupted)
        fine_tune_hosted(settings(server))


@pytest.mark.parametrize("body", [ERROR, "{}", '{"data": "x"}'], ids=["error", "empty", "text"])
def test_a_list_that_is_none_is_not_taken_for_an_empty_one(server, monkeypatch, body):
    """Or a job that was asked for would be started again."""
    server.faults = [Fault(500, "/jobs", "POST", {0}, after=True)]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr("ptst.hosted.job.wait_before_repeat", interrupted)
        fine_tune_hosted(settings(server))
    server.faults = [Fault(path="/fine_tuning/jobs", method="GET", body=body)]
    with pytest.raises(UserError) as error:
        fine_tune_hosted(settings(server))
    assert "\n" not in str(error.value) and server.url in str(error.value) and len(server.jobs) == 1
    server.faults = []
    assert fine_tune_hosted(settings(server)).record.tuned_model and len(server.jobs) == 1


@pytest.mark.parametrize("path", ["/files", "/fine_tuning/jobs"])
@pytest.mark.parametrize("body", [ERROR, "{}"], ids=["error", "empty"])
def test_what_was_started_must_have_an_id(server, path, body, monkeypatch):
    monkeypatch.setattr(job, "RETRIES", 1)
    monkeypatch.setattr(job, "SETTLE", 0.1)
    server.faults = [Fault(path=path, method="POST", body=body)]
    with pytest.raises(UserError) as error:
        fine_tune_hosted(settings(server))
    assert "\n" not in str(error.value) and server.url in str(error.value)
    assert ("Try later." in str(error.value)) == (body == ERROR)
    server.faults = [Fault(path=path, method="POST", body=body, after=True, numbers={0})]
    assert fine_tune_hosted(settings(server)).record.tuned_model
    assert len(server.jobs) == 1 and len(server.files) == 1


@pytest.mark.parametrize("body", [ERROR, "{}", '{"id": "other", "status": "running"}'], ids=["error", "empty", "other"])
def test_a_look_at_a_job_that_shows_none(server, monkeypatch, body):
    leave(server, monkeypatch)
    (started,) = server.jobs.values()
    server.faults = [Fault(path="/fine_tuning/jobs/ftjob", method="GET", body=body)]
    with pytest.raises(UserError) as error:
        fine_tune_hosted(settings(server))
    assert "\n" not in str(error.value) and len(server.jobs) == 1
    server.faults, started.created = [], started.created - 3600
    assert fine_tune_hosted(settings(server)).record.job.id == started.id and len(server.jobs) == 1


def test_a_job_that_is_lost_between_two_looks_is_not_started_again(server, monkeypatch):
    leave(server, monkeypatch)
    server.faults = [Fault(404, "/fine_tuning/jobs/ftjob", "GET", {1})]
    with pytest.raises(UserError, match=r"ftjob-\w+ is not at http"):
        fine_tune_hosted(settings(server))
    assert len(server.jobs) == 1


def test_a_job_that_disappears_is_told(server, monkeypatch):
    leave(server, monkeypatch)
    (id,) = server.jobs
    server.jobs.clear()
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{id} is not at {server.url}, where it was started; check base_url"):
            fine_tune_hosted(settings(server))
    assert not server.jobs
    server.store.script = JobScript()
    assert fine_tune_hosted(settings(server, new_job=True)).record.job.id in server.jobs


@pytest.mark.parametrize(
    "fault",
    [Fault(404, "/events"), Fault(500, "/events"), Fault(path="/events", body="<html>")],
    ids=[404, 500, "html"],
)
def test_a_job_is_waited_for_without_its_events(server, fault, capsys):
    server.faults = [fault]
    record = fine_tune_hosted(settings(server)).record
    assert record.tuned_model and Path("run/results.csv").exists() and record.result["steps"] == 2
    assert capsys.readouterr().err.count("events") == 1


def test_a_job_that_made_no_model(server, monkeypatch):
    whole = Job.to_json
    monkeypatch.setattr(Job, "to_json", lambda self, now: {**whole(self, now), "fine_tuned_model": None})
    with pytest.raises(UserError, match=r"ftjob-\w+ has succeeded, but names no model") as error:
        fine_tune_hosted(settings(server))
    assert "\n" not in str(error.value)


def test_an_unknown_state_is_told(server, monkeypatch, capsys):
    whole, states = Job.to_json, iter(["paused"] * 3)
    monkeypatch.setattr(Job, "to_json", lambda self, now: {**whole(self, now), "status": next(states, "succeeded")})
    server.store.script = JobScript(tick=0.0001)
    assert fine_tune_hosted(settings(server)).record.tuned_model
    assert "paused" in capsys.readouterr().err


def test_a_file_that_is_read_late_is_waited_for_after_an_end_too(monkeypatch):
    with StandIn(job=JobScript(processing=0.6)) as server:
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
            patched.setattr(JobFinder, "_wait_for_file", interrupted)
            fine_tune_hosted(settings(server))
        assert len(server.files) == 1 and not server.jobs
        assert fine_tune_hosted(settings(server)).record.tuned_model and len(server.files) == 1


def test_a_clock_that_was_put_back_is_no_reason_to_wait(server, monkeypatch):
    server.faults = [Fault(500, "/jobs", "POST", {0})]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr("ptst.hosted.job.wait_before_repeat", interrupted)
        fine_tune_hosted(settings(server))
    state = read_json(Path("run/job.json"))
    Path("run/job.json").write_text(json.dumps({**state, "asked_at": time.time() + 3600}))
    began = time.monotonic()
    monkeypatch.setattr("ptst.hosted.job.SETTLE", 0.2)
    real = time.sleep

    def sleep(seconds):
        assert time.monotonic() - began < 120, "waits for ever"
        real(seconds)

    monkeypatch.setattr("ptst.hosted.job.time.sleep", sleep)
    assert fine_tune_hosted(settings(server)).record.tuned_model


def test_a_cancel_whose_answer_is_lost_has_cancelled(server, monkeypatch, capsys):
    leave(server, monkeypatch)
    server.faults = [Fault(500, "/cancel", "POST", {0}, after=True)]
    found = cancel_hosted(TrainConfig(resume=Path("run"), cancel=True))
    (started,) = server.jobs.values()
    assert started.cancelled and found["status"] == "cancelled"


def test_a_job_that_somebody_else_cancels(server, monkeypatch):
    leave(server, monkeypatch)
    (started,) = server.jobs.values()
    server.store.cancel(started.id)
    with pytest.raises(UserError, match=f"{started.id} was cancelled; run keeps its file and events; start another"):
        fine_tune_hosted(settings(server))


def test_cancel_asks_the_endpoint_of_the_run(server, monkeypatch):
    """Whose address was in the environment then."""
    server.store.script = JobScript(tick=60)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr("ptst.hosted.watch.sleep", interrupted)
        patched.setenv("OPENAI_BASE_URL", server.url)
        fine_tune_hosted(settings(server, base_url=None))
    with StandIn() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        assert cancel_hosted(TrainConfig(resume=Path("run"), cancel=True))["status"] == "cancelled"
        assert not other.requests


def test_a_redirect_takes_neither_key_nor_file_elsewhere(server):
    with StandIn() as other:
        for status in (301, 302, 307, 308):
            for method in ("GET", "POST"):
                there = {"Location": f"{other.url}/files"}
                server.faults = [Fault(status, "/files", method, headers=there)]
                with pytest.raises(UserError, match="redirect") as error:
                    fine_tune_hosted(settings(server))
                assert "\n" not in str(error.value)
        assert not other.requests and not server.jobs


def test_the_key_in_a_results_file_in_base64(server, monkeypatch):
    content = base64.b64encode(f"step,train_loss\n1,{KEY}\n".encode())
    monkeypatch.setattr("tests.stand_in.jobs.Job.results", lambda _self: content)
    fine_tune_hosted(settings(server))
    found = Path("run/results.csv").read_text()
    assert KEY not in found and "[OPENAI_API_KEY]" in found


@pytest.mark.parametrize(
    "odd",
    [
        {"method": "x"},
        {"method": {"supervised": "x"}},
        {"method": {"supervised": {"hyperparameters": [1]}}},
        {"method": None, "hyperparameters": "auto"},
        {"created_at": "yesterday", "finished_at": None},
        {"result_files": "file-1"},
        {"result_files": {"a": 1}},
        {"result_files": 3},
        {"trained_tokens": "many"},
        {"user_provided_suffix": 4},
        {"error": "x"},
    ],
    ids=str,
)
def test_odd_fields_of_a_job_are_as_if_they_were_not_there(server, monkeypatch, odd):
    whole = Job.to_json
    monkeypatch.setattr(Job, "to_json", lambda self, now: {**whole(self, now), **odd})
    assert fine_tune_hosted(settings(server)).record.tuned_model and len(server.jobs) == 1
    assert read_hosted(Path("run"))


@pytest.mark.parametrize(
    "events",
    [
        '{"data": [{"id": null, "data": {"step": true, "total_steps": "x"}, "type": "metrics"}, 4]}',
        '{"data": [{"id": "a", "data": {"step": 1, "total_steps": 0, "train_loss": NaN}, "type": "metrics"}]}',
        '{"data": [{"id": "a", "data": {"step": 1, "total_steps": 2, "train_loss": "x"}, "type": "metrics"}], '
        '"has_more": true}',
        '{"data": [{"id": ["x"]}]}',
        '{"data": [{"id": {"x": 1}}], "has_more": true}',
    ],
    ids=range(5),
)
def test_odd_events(server, events):
    server.faults = [Fault(path="/events", body=events)]
    assert fine_tune_hosted(settings(server)).record.tuned_model
    text = Path("run/metrics.jsonl").read_text() + Path("run/run.json").read_text()
    assert "NaN" not in text
