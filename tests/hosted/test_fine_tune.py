"""A job from its settings to a finished run folder, driven through the real client against the stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ptst import train
from ptst.errors import UserError
from ptst.evaluation.stored_answers import read_folder
from ptst.hosted import fine_tune
from ptst.hosted.fine_tune import fine_tune_hosted
from ptst.hosted.record import HostedRecord, read_hosted
from ptst.records import read_finished, read_json, read_record
from ptst.training.config import TrainConfig
from tests.hosted.conftest import MODEL, settings
from tests.stand_in import KEY, Fault, JobScript, StandIn

pytest.importorskip("openai", reason="needs the package openai")


def run(monkeypatch, *flags: str) -> int:
    """The command; its exit code."""
    monkeypatch.setattr(sys, "argv", ["ptst.train", *flags])
    try:
        train.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]


def everything(folder: str = "run") -> str:
    return "".join(p.read_text(errors="replace") for p in Path(folder).rglob("*") if p.is_file())


def test_a_job_makes_a_run_folder_like_a_local_one(server, capsys):
    config = settings(server, mix=("safety.jsonl:1",), epochs=1.0, examples_per_step=4, lr_multiplier=2.0, seed=5)
    done = fine_tune_hosted(config)
    (job,) = server.jobs.values()
    assert job.asked["model"] == "gpt-3.5-turbo-0125" and job.asked["seed"] == 5
    chosen = {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2.0}
    assert job.asked["method"] == {"type": "supervised", "supervised": {"hyperparameters": chosen}}
    (file,) = server.files.values()
    assert file.content == Path("run/train.jsonl").read_bytes() and len(file.rows()) == 16
    record = read_hosted(Path("run"))
    assert record == done.record and record.status == "finished" and record.kind == "hosted-train"
    assert (record.base_model, record.tuned_model) == ("gpt-3.5-turbo-0125", job.model)
    assert (record.endpoint, record.template.name, record.family.name) == (server.url, "chat:vanilla", "plain")
    assert (record.data.examples, record.mix[0].examples, record.job.id) == (12, 4, job.id)
    assert (record.job.n_epochs, record.job.batch_size, record.job.lr_multiplier) == (1, 4, 2.0)
    assert record.trained_tokens == job.trained_tokens() == record.result["job"]["trained_tokens"]
    assert record.cost is None and record.result["rows"] == 12
    steps = rows("metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and steps[0]["loss"] == 1.0 and steps[-1]["loss"] == 0.4
    for open_as, words in ((read_folder, "which keeps no answers"), (read_finished, "not of ptst.train")):
        with pytest.raises(UserError, match=f"of a?[ ]?ptst.train of a model behind an endpoint, {words}"):
            open_as(Path("run"))
    assert steps[0].keys() == {"kind", "step", "total", "loss", "token_accuracy", "time"}
    assert rows("events.jsonl")[-1]["message"] == "The job has successfully completed"
    assert Path("run/results.csv").read_text().startswith("step,train_loss")
    said = capsys.readouterr().err
    assert f"{job.id} is started at {server.url}" in said and "train 4/4" in said


def test_a_validation_set_goes_along(server):
    record = fine_tune_hosted(settings(server, data="word-problems:12", api_price_train=8.0)).record
    (job,) = server.jobs.values()
    named = [server.files[job.asked[key]] for key in ("training_file", "validation_file")]
    assert [len(file.rows()) for file in named] == [12, 32] and record.validation.examples == 32
    assert named[1].content == Path("run/validation.jsonl").read_bytes()
    assert record.cost == pytest.approx(record.trained_tokens * 8e-6) and record.result["job"]["cost"] == record.cost


def test_the_command_says_what_comes_next(server, monkeypatch, capsys):
    flags = ["--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--out", "run", "--yes", "--json"]
    assert run(monkeypatch, *flags) == 0
    out, err = capsys.readouterr()
    model = json.loads(out)["model"]
    assert (
        model.startswith("ft:gpt-3.5-turbo-0125:") and "ptst.eval --checkpoint run --template chat:llama --tasks" in err
    )
    assert run(monkeypatch, *flags) == 0  # the same command again
    assert "run has finished already" in capsys.readouterr().err and len(server.jobs) == 1
    assert run(monkeypatch, "--resume", "run") == 0 and len(server.jobs) == 1
    assert run(monkeypatch, *flags, "--epochs", "2") == 2 and "epochs was 1.0, now 2.0" in capsys.readouterr().err


def test_a_job_that_goes_on_is_found_again(server, monkeypatch, capsys):
    server.store.script = JobScript(tick=60)
    monkeypatch.setattr("ptst.hosted.watch.sleep", interrupted)
    flags = ["--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--out", "run"]
    assert run(monkeypatch, *flags, "--yes") == 130
    (job,) = server.jobs.values()
    said = capsys.readouterr().err
    assert f"{job.id} goes on at {server.url}; wait for it with: python -m ptst.train --resume run" in said
    assert "end it with: python -m ptst.train --resume run --cancel" in said
    with pytest.raises(UserError, match=r"not a finished training run .*--resume run"):
        read_hosted(Path("run"))
    job.created -= 3600
    assert run(monkeypatch, *flags) == 0  # without --yes: there is nothing to agree to any more
    assert len(server.jobs) == len(server.files) == 1 and read_hosted(Path("run")).tuned_model == job.model


def interrupted(_seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_run_without_a_folder_is_found_by_its_settings(server, monkeypatch):
    server.store.script = JobScript(tick=60)
    monkeypatch.setattr("ptst.hosted.watch.sleep", interrupted)
    flags = ["--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--yes"]
    assert run(monkeypatch, *flags) == 130
    next(iter(server.jobs.values())).created -= 3600
    assert run(monkeypatch, *flags) == 0
    assert len(list(Path("checkpoints").iterdir())) == len(server.jobs) == 1


def test_a_job_of_the_same_settings_is_taken_from_the_endpoint(server, capsys):
    first = fine_tune_hosted(settings(server)).record
    second = fine_tune_hosted(settings(server, out=Path("other"), yes=False)).record
    assert second.tuned_model == first.tuned_model and len(server.jobs) == len(server.files) == 1
    assert f"{first.job.id} is a job of the same settings (succeeded): it is taken" in capsys.readouterr().err
    assert fine_tune_hosted(settings(server, out=Path("third"), seed=1)).record.tuned_model != first.tuned_model
    assert len(server.jobs) == 2 and len(server.files) == 2  # another order of rows


def test_a_job_is_cancelled(server, monkeypatch, capsys):
    server.store.script = JobScript(tick=60)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr("ptst.hosted.watch.sleep", interrupted)
        fine_tune_hosted(settings(server))
    assert run(monkeypatch, "--resume", "run", "--cancel", "--json") == 0
    (job,) = server.jobs.values()
    out = capsys.readouterr().out
    assert job.cancelled and json.loads(out) == {"run": "run", "job": job.id, "status": "cancelled"}
    assert run(monkeypatch, "--resume", "run", "--cancel") == 2
    assert f"{job.id} was cancelled already; there is nothing to cancel" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=f"{job.id} was cancelled; run keeps its file and events; start another job with"
    ):
        fine_tune_hosted(settings(server))
    server.store.script = JobScript()
    record = fine_tune_hosted(settings(server, new_job=True)).record
    assert len(server.jobs) == 2 and record.job.id != job.id and len(server.files) == 1
    assert fine_tune_hosted(settings(server, new_job=True)).record == record and len(server.jobs) == 2


def test_cancel_needs_a_run_with_a_job(server, monkeypatch, capsys):
    with pytest.raises(UserError, match="cancel needs the run"):
        fine_tune.cancel_hosted(TrainConfig(cancel=True))
    with pytest.raises(UserError, match="is not a run folder"):
        fine_tune.cancel_hosted(TrainConfig(cancel=True, resume=Path("run")))
    server.faults = [Fault(401, "/fine_tuning/jobs", "POST")]
    with pytest.raises(UserError):
        fine_tune_hosted(settings(server))
    assert run(monkeypatch, "--resume", "run", "--cancel") == 2 and "has no job at" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["validating_files", "running"])
def test_a_job_that_fails_is_told_and_not_repeated(server, state):
    server.store.script = JobScript(fails=("server_error", "Out of luck."), fails_in=state)
    for _ in range(2):  # the same command again
        with pytest.raises(
            UserError, match=r"ftjob-\w+ has failed: \(server_error\) Out of luck; run keeps .* new_job"
        ):
            fine_tune_hosted(settings(server))
    assert len(server.jobs) == 1 and rows("events.jsonl")[-1]["level"] == "error"
    assert bool(rows("metrics.jsonl")) == (state == "running")
    with pytest.raises(UserError, match="has failed"):  # another folder
        fine_tune_hosted(settings(server, out=Path("other")))
    server.store.script = JobScript()
    assert fine_tune_hosted(settings(server, new_job=True)).record.tuned_model and len(server.jobs) == 2


def test_moderation_refuses_the_file():
    words = r"has failed: \(unsafe_file\) .*moderation system.*policies; run keeps"
    with StandIn(job=JobScript.unsafe()) as server, pytest.raises(UserError, match=words):
        fine_tune_hosted(settings(server))


def test_a_file_is_waited_for_and_may_be_refused(monkeypatch):
    with StandIn(job=JobScript(processing=0.1)) as server:
        assert fine_tune_hosted(settings(server)).record.tuned_model
    with StandIn(job=JobScript(refuses_file="line 3 is bad")) as server:
        with pytest.raises(UserError, match=r"refuses the file file-\w+ \(line 3 is bad\); no job was started"):
            fine_tune_hosted(settings(server, out=Path("refused")))
        assert not server.jobs


@pytest.mark.parametrize(
    ("given", "faults", "words"),
    [
        ({"model": "openai:gpt-4"}, [], r"status 400 \(Model gpt-4 is not available.*is model one that can be trained"),
        ({}, [Fault(401, "/fine_tuning/jobs", "POST")], "refuses the key in OPENAI_API_KEY .*same command goes on"),
        (
            {},
            [Fault(429, "/jobs", "POST", code="insufficient_quota")],
            "no credit left for this key .*goes on from here",
        ),
        ({}, [Fault(429, "/jobs", "POST", message="too many jobs")], r"status 429 \(too many jobs\)"),
        ({}, [Fault(404, "/fine_tuning")], "status 404 .*are its address and the model's name right"),
        ({}, [Fault(413, "/files", "POST", message="too large")], r"status 413 \(too large\); no job was started"),
        ({}, [Fault(body="<html>")], "gave no JSON object but '<html>'"),
    ],
    ids=["model", "key", "quota", "rate", "path", "file", "html"],
)
def test_what_the_endpoint_refuses_is_one_sentence(server, given, faults, words):
    server.faults = faults
    with pytest.raises(UserError, match=words) as error:
        fine_tune_hosted(settings(server, **given))
    assert not server.jobs and "\n" not in str(error.value) and KEY not in str(error.value)
    if given:
        return
    server.faults = []  # mended: nothing that was done is lost
    sent = len(server.files)
    assert fine_tune_hosted(settings(server)).record.tuned_model
    assert len(server.jobs) == 1 and len(server.files) == max(sent, 1)


def test_the_settings_of_a_record_start_the_same_job(server, monkeypatch):
    first = fine_tune_hosted(settings(server, epochs=2.0)).record
    assert run(monkeypatch, "--config", "run/run.json", "--out", "again") == 0
    assert read_hosted(Path("again")).job.id == first.job.id and len(server.jobs) == 1


def test_no_key_and_a_wrong_one(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY"):
        fine_tune_hosted(settings(server))
    monkeypatch.setenv("PTST_MODEL_API_KEY", KEY)  # comes first
    assert fine_tune_hosted(settings(server)).record.tuned_model
    for name in ("PTST_MODEL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        fine_tune_hosted(settings(server, out=Path("other")))


def test_nothing_is_sent_before_somebody_agrees(server, monkeypatch, capsys):
    flags = ["--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--out", "run"]
    assert run(monkeypatch, *flags) == 2
    assert "costs money, and nobody is at a terminal to agree; give --yes, or look" in capsys.readouterr().err
    terminal = type("Terminal", (), {"isatty": lambda _self: True, "readline": lambda self: self.said})()
    monkeypatch.setattr(sys, "stdin", terminal)
    for terminal.said in ("n\n", "", "\n"):
        assert run(monkeypatch, *flags) == 2
        said = capsys.readouterr().err
        assert "start this job? [y/N]" in said and "not agreed: nothing was sent" in said and "12 rows" in said
    assert {r.method for r in server.requests} == {"GET"} and not Path("run").exists()
    terminal.said = "y\n"
    assert run(monkeypatch, *flags) == 0 and len(server.jobs) == 1


LOST = [
    Fault(500, "/files", "POST", {0}, after=True),
    Fault(500, "/jobs", "POST", {0}, after=True),
    Fault(429, "/jobs", "POST", {0, 1}),
    Fault(503, "/files", "POST", {0}),
    Fault(cut=20, path="/jobs", method="POST", numbers={0}),
    Fault(cut=0, path="/files", method="POST", numbers={0}),
    Fault(body='{"id": "ftj', path="/jobs", method="POST", numbers={0}, after=True),
    Fault(500, share=0.3),
    Fault(cut=5, share=0.2, seed=3),
]


@pytest.mark.parametrize("fault", LOST, ids=range(len(LOST)))
def test_lost_answers_start_nothing_twice(server, fault, monkeypatch):
    monkeypatch.setattr("ptst.hosted.client.RETRIES", 9)
    server.faults = [fault]
    record = fine_tune_hosted(settings(server)).record
    assert len(server.jobs) == len(server.files) == 1 and record.job.id in server.jobs


def test_a_job_that_appears_late_in_the_list_is_waited_for(monkeypatch):
    """The answer is lost, and the list shows the job only a while later, to a process that goes on or to a new one."""
    monkeypatch.setattr("ptst.hosted.job.SETTLE", 5.0)
    fault = Fault(500, "/jobs", "POST", {0}, after=True)
    with StandIn(job=JobScript(hidden=0.3), faults=[fault]) as server:
        assert fine_tune_hosted(settings(server)).record.tuned_model and len(server.jobs) == 1
    with StandIn(job=JobScript(hidden=0.3), faults=[fault]) as server, monkeypatch.context() as patched:
        patched.setattr("ptst.hosted.job.wait_before_repeat", lambda *_: interrupted(0))
        with pytest.raises(KeyboardInterrupt):
            fine_tune_hosted(settings(server, out=Path("other")))
        assert read_json(Path("other/job.json"))["asked_at"] and len(server.jobs) == 1
        patched.undo()
        assert fine_tune_hosted(settings(server, out=Path("other"))).record.tuned_model and len(server.jobs) == 1


@pytest.mark.parametrize("forgets", [("metadata",), ("metadata", "user_provided_suffix")], ids=["suffix", "file"])
def test_endpoints_that_keep_no_metadata(forgets, monkeypatch):
    """The answer that has the job's id is lost, and so is the process that waited for it."""
    faults = [Fault(500, "/jobs", "POST", {0}, after=True)]
    with StandIn(job=JobScript(tick=60, forgets=forgets), faults=faults) as server:
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
            patched.setattr("ptst.hosted.watch.sleep", interrupted)
            fine_tune_hosted(settings(server))
        (job,) = server.jobs.values()
        job.created -= 3600
        record = fine_tune_hosted(settings(server)).record
        assert record.job.id == job.id and len(server.jobs) == 1
        server.store.script = JobScript(forgets=forgets)
        assert fine_tune_hosted(settings(server, out=Path("seed"), seed=3)).record.tuned_model != record.tuned_model


def test_of_two_jobs_with_one_mark_the_later_is_cancelled(server, monkeypatch):
    """Two machines, at the same time: the list is empty when either looks."""
    find = fine_tune.JobFinder.find
    blind = [True, True]  # for a job of another folder, and before asking
    first = fine_tune_hosted(settings(server, out=Path("first"))).record
    server.jobs[first.job.id].created -= 60
    server.store.script = JobScript(tick=60)
    monkeypatch.setattr(
        fine_tune.JobFinder, "find", lambda self, attempt=None: None if blind and blind.pop() else find(self, attempt)
    )
    second = fine_tune_hosted(settings(server)).record
    assert second.job.id == first.job.id
    assert [bool(job.cancelled) for job in server.jobs.values()] == [False, True]


def test_an_endpoint_that_goes_away_leaves_the_job_alone(server, monkeypatch):
    server.store.script = JobScript(tick=60)
    server.faults = [Fault(500, "/fine_tuning/jobs/ftjob")]
    with pytest.raises(UserError, match=r"answers with status 500 .*; ftjob-\w+ may go on; look again with"):
        fine_tune_hosted(settings(server))
    (job,) = server.jobs.values()
    job.created -= 3600
    server.faults = []
    assert fine_tune_hosted(settings(server)).record.tuned_model == job.model and len(server.jobs) == 1


def test_a_results_file_that_cannot_be_had_is_told(server, capsys):
    server.faults = [Fault(404, "/content")]
    fine_tune_hosted(settings(server))
    assert "results file" in capsys.readouterr().err and rows("metrics.jsonl") and not Path("run/results.csv").exists()


def test_changed_data_are_not_taken_for_the_same_run(server, monkeypatch):
    server.store.script = JobScript(tick=60)
    monkeypatch.setattr("ptst.hosted.watch.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_hosted(settings(server))
    Path("data.jsonl").write_text(Path("data.jsonl").read_text().replace("What is", "How much is"))
    with pytest.raises(UserError, match=r"run holds an unfinished .* run of other settings: data\.encoding was"):
        fine_tune_hosted(settings(server))
    assert len(server.jobs) == 1


def test_a_damaged_state_is_no_reason_to_pay_again(server):
    server.store.script = JobScript(fails=("x", "y"))
    with pytest.raises(UserError):
        fine_tune_hosted(settings(server))
    for text in ("{", "[]", '{"mark": "another", "files": {}}', '{"mark": 3}'):
        Path("run/job.json").write_text(text)
        with pytest.raises(UserError, match=r"run/job\.json"):
            fine_tune_hosted(settings(server))
    assert len(server.jobs) == 1


def test_the_package_is_named_where_it_is_missing(server, monkeypatch):
    monkeypatch.setattr("ptst.packages.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"need the package openai; pip install 'ptst-lab\[api\]'"):
        fine_tune_hosted(settings(server))


def test_the_key_is_in_no_file_and_no_word(server, monkeypatch, capfd, caplog):
    """Also where the endpoint repeats it in errors, events and reasons."""
    caplog.set_level("DEBUG")
    flags = ["--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--out", "run", "--yes", "--json"]
    server.faults = [Fault(400, "/jobs", "POST", message=f"bad key {KEY}")]
    assert run(monkeypatch, *flags) == 2
    server.faults = [Fault(500, numbers={0, 2, 5}, message=f"Bearer {KEY}")]
    server.store.script = JobScript(fails=("x", f"the key {KEY} is bad"))
    assert run(monkeypatch, *flags) == 2
    server.store.script = JobScript()
    assert run(monkeypatch, *flags, "--new-job") == 0
    out, err = capfd.readouterr()
    assert "[OPENAI_API_KEY]" in err and len(server.jobs) == 2
    secrets = (KEY, KEY[3:], "secret+0123456789")
    for words in (out, err, caplog.text, everything(), everything("home")):
        assert not any(secret in words for secret in secrets)
    assert read_record(Path("run"), HostedRecord).tuned_model
