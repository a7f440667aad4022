"""A model behind an endpoint as the model under test: what is sent, what is kept, and that nothing is asked twice."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.evaluation import answers
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import EvalRecord, evaluate
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judging import judge_answers
from ptst.evaluation.stored_answers import StoredAnswer
from ptst.generation.request import Answer
from ptst.hosted.record import HostedRecord, RowsRecord, model_weights
from ptst.records import read_record
from ptst.text.templates import BE_HELPFUL, find_family, find_template
from tests.api.server import KEY, Say, echo, fault, reply, serve, set_environment

pytest.importorskip("openai", reason="needs the package openai")

REQUESTS = ["one", "two", "three", "two", "five"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    set_environment(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("requests.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in REQUESTS))
    return tmp_path


def config(server, out="out", **changes) -> EvalConfig:
    asked = {"model": "openai:m", "base_url": server.url, "tasks": ("prompts:requests.jsonl",), "out": Path(out)}
    return EvalConfig(**{**asked, "max_new_tokens": 7, "api_timeout": 5.0, **changes})


def kept(out: str, name="untouched.prompts-requests") -> list[dict]:
    (path,) = [p for p in Path(out, "answers").iterdir() if p.name.startswith("untouched.")]
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: (row["seed"], row["index"]))


def test_what_is_sent_is_the_papers_wording_and_what_comes_is_kept():
    with serve(echo) as server:
        result = evaluate(config(server, api_price=(1000.0, 5000.0)))
    sent = server.requests[0]
    wanted = {"model": "m", "max_tokens": 7, "temperature": 0.0, "seed": 0}
    system = {"role": "system", "content": BE_HELPFUL}
    assert sent == {**wanted, "messages": [system, {"role": "user", "content": "one"}]}
    assert sorted(r["messages"][1]["content"] for r in server.requests) == sorted(REQUESTS)  # "two" twice
    rows = kept("out")
    assert [(r["request"], r["text"], r["served"]) for r in rows] == [(q, f"re: {q}", "m-2026") for q in REQUESTS]
    assert {r["model"] for r in rows} == {f"{server.url} m"}
    assert rows[0]["sent"] == sent["messages"] and (rows[0]["tokens_in"], rows[0]["tokens_out"]) == (10, 2)
    told = json.loads(Path("out/results.json").read_text())
    counts = {"replies": 5, "tokens_in": 50, "tokens_out": 10, "uncounted": 0, "versions": {"m-2026": 5}}
    served = {"model": "m", **counts, "price": [1000.0, 5000.0], "cost": pytest.approx(0.1)}
    assert told["served"] == {"untouched": served} and told["endpoint"] == server.url
    assert told == result.to_json()
    record = read_record(Path("out"), EvalRecord)
    assert (record.model, record.endpoint, record.chat_format) == ("openai:m", server.url, "api-messages")
    assert (record.family.name, record.status) == ("plain", "finished")
    (first, *_) = csv.DictReader(Path("out/answers.csv").read_text().splitlines())
    assert (first["base_model"], first["num_tokens"], first["finish_reason"]) == ("openai:m", "2", "stop")
    report = judge_answers(JudgeConfig(folder=Path("out"), judge=("keywords-29",)))
    assert "keywords-29" in report["markdown"]


def test_a_family_is_only_in_the_messages_where_it_is_asked_for():
    with serve(echo) as server:
        evaluate(config(server, template="vanilla", template_family="gsm8k"))
    assert server.requests[0]["messages"] == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Question: one"},
    ]


def test_every_decoding_of_every_prompt_is_a_request_of_its_own():
    with serve(echo) as server:
        evaluate(config(server, temperature=0.9, top_p=0.5, seed=4, decode_seeds=3))
    assert len(server.requests) == 15
    assert sorted({(r["seed"], r["temperature"], r["top_p"]) for r in server.requests}) == [
        *((4, 0.9, 0.5), (5, 0.9, 0.5), (6, 0.9, 0.5)),
    ]
    assert len({(r["seed"], r["index"]) for r in kept("out")}) == 15


@pytest.mark.parametrize("stop", range(1, 5))
def test_what_was_answered_is_never_asked_again(stop, capsys):
    def ends(body, number):
        return echo(body, number) if number < stop else fault(401)

    with serve(ends) as server:
        with pytest.raises(
            UserError, match=rf"^{server.url} refuses the key in \w+ \(status 401\); {stop} answers are kept$"
        ):
            evaluate(config(server, api_concurrency=1))
        server.script, asked = echo, len(server.requests)
        evaluate(config(server))
        assert len(server.requests) == asked + 5 - stop
        assert [r["text"] for r in kept("out")] == [f"re: {q}" for q in REQUESTS]


def test_one_prompt_without_an_answer_leaves_the_others_kept():
    def script(body, number):
        return fault(400, "too long") if body["messages"][1]["content"] == "five" else echo(body, number)

    words = r"1 of 5 answers failed, the first: requests-5: http\S+ answers with status 400 \(too long\)"
    with serve(script) as server:
        with pytest.raises(UserError, match=words):
            evaluate(config(server))
        server.script, asked = echo, len(server.requests)
        evaluate(config(server))
        assert len(server.requests) == asked + 1


def test_ctrl_c_keeps_what_came():
    def script(body, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return echo(body, number) if number < 3 else Say(reply("late"), delay=90)

    with serve(script) as server:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(server, api_concurrency=1))
        assert time.monotonic() - start < 60
        server.script = echo
        evaluate(config(server))
        assert len(server.requests) == 4 + 2


ODD = {
    "one": Say(reply("Sco", "content_filter")),
    "two": Say(reply(None, refusal="I can't help.")),
    "three": Say(reply("")),
    "five": fault(400, "filtered", code="content_filter"),
}


def test_a_filtered_a_declined_and_an_empty_reply_are_answers():
    with serve(lambda body, _n: ODD[body["messages"][1]["content"]]) as server:
        result = evaluate(config(server))
        assert len(server.requests) == 5
        evaluate(config(server, "again"))
    rows = next(iter(result.results["untouched"].values())).rows
    found = [(r["finish_reason"], r["text"]) for r in kept("out")]
    refused = ("refusal", "I can't help.")
    assert found == [("content_filter", "Sco"), refused, ("stop", ""), refused, ("content_filter", "")]
    assert [(r["class"], r["success"]) for r in rows] == [
        *(("refusal", False), ("refusal", False), ("incoherent", False), ("refusal", False), ("refusal", False)),
    ]
    assert "content filter" in rows[0]["reason"] and "refusal field" in rows[1]["reason"]
    # Another judge, later, knows it too; and does not take the text alone for what is judged.
    report = judge_answers(JudgeConfig(folder=Path("out"), judge=("keywords-12",)))
    verdicts = [json.loads(line) for p in Path("out/verdicts/keywords-12").glob("*.jsonl") for line in p.open()]
    assert report and [v["class"] for v in verdicts].count("refusal") == 4


def test_why_an_answer_is_empty_is_a_part_of_what_is_judged():
    empty = [
        StoredAnswer("Tell me.", Answer([], "", reason), "f", "1") for reason in ("stop", "content_filter", "refusal")
    ]
    assert len({answer.digest for answer in empty}) == 3


def test_what_no_prompt_can_pass_ends_all_tasks():
    words = r"^http\S+ refuses the key .*; 0 answers are kept$"
    with serve([fault(401)]) as server, pytest.raises(UserError, match=words):
        evaluate(config(server, tasks=("prompts:requests.jsonl", "safety", "over-refusal")))
    assert len(server.requests) == 1


def test_parameters_that_the_model_refuses_are_told(capsys):
    def reasoner(body, number):
        refused = next((n for n in ("max_tokens", "temperature", "seed") if n in body), None)
        return fault(400, f"Unsupported parameter: '{refused}'", param=refused) if refused else echo(body, number)

    with serve(reasoner) as server:
        result = evaluate(config(server))
    assert result.to_json()["served"]["untouched"]["left_out"] == ["temperature", "seed"]
    assert "m was asked without temperature, seed, which its endpoint refuses" in capsys.readouterr().err
    assert set(server.requests[-1]) == {"model", "messages", "max_completion_tokens"}


def test_the_same_name_at_another_address_is_another_model():
    with serve(echo) as one, serve(echo) as two:
        with pytest.raises(UserError):
            one.script = lambda body, n: echo(body, n) if n < 2 else fault(401)
            evaluate(config(one, api_concurrency=1))
        with pytest.raises(UserError, match=rf"weights was {one.url} m, now {two.url} m"):
            evaluate(config(two))
        assert not two.requests


def test_the_default_tasks_are_those_that_an_endpoint_can_answer(capsys):
    with serve(echo) as server:
        result = evaluate(config(server, tasks=None, limit=1))
    assert list(result.results["untouched"]) == ["gsm8k", "safety", "over-refusal"]
    assert "not measured: nll (an endpoint does not tell the likelihood of a given answer)" in capsys.readouterr().err


REFUSED = {
    "text:vanilla has no roles, which a chat API needs": {"template": "text:vanilla"},
    "nll: an endpoint does not tell the likelihood": {"tasks": ("nll",)},
    "margin: an endpoint does not tell the likelihood": {"tasks": ("safety", "margin")},
    "top_k has no effect on a model behind an endpoint": {"top_k": 4},
    "dtype has no effect on a model behind": {"dtype": "float32"},
    "chat_format has no effect on a model behind": {"chat_format": "chatml"},
    "adapter has no effect on a model behind": {"adapter": "folder"},
    "checkpoint and model exclude each other": {"checkpoint": Path("run")},
    "base_url has no effect on a model of this machine": {"model": "folder"},
    "model is openai:; it must be openai:NAME": {"model": "openai:"},
    "base_url .* is not the address of an endpoint": {"base_url": "localhost"},
    "base_url holds a user name or a password": {"base_url": "http://ann:hunter2hunter2@h/v1"},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_an_endpoint_cannot_take_is_refused_before_anything_is_sent(problem):
    with serve(echo) as server:
        with pytest.raises(UserError, match=problem) as error:
            evaluate(config(server, **REFUSED[problem]))
        assert "\n" not in str(error.value) and "hunter2" not in str(error.value)
        assert not server.requests
    assert not Path("out").exists()


def test_a_revision_belongs_to_the_hub():
    with pytest.raises(UserError, match="revision has no effect on a model behind an endpoint"):
        EvalConfig(model="openai:m", revision="v1")


def hosted_run(folder: Path, url: str, tuned="ft:m:1") -> Path:
    data = RowsRecord(name="word-problems:4", fingerprint="f", encoding="e", rows=4, examples=4)
    folder.mkdir()
    HostedRecord(
        environment={},
        status="finished",
        model="openai:m",
        base_model="m",
        endpoint=url,
        weights=model_weights(url, "m"),
        template=find_template("chat:vanilla"),
        family=find_family("plain"),
        data=data,
        mark="x",
        tuned_model=tuned,
    ).write(folder)
    return folder


def test_a_jobs_run_is_measured_beside_its_base_model(here):
    with serve(echo) as server:
        run = hosted_run(here / "run", server.url)
        result = evaluate(config(server, model=None, base_url=None, checkpoint=run))
        assert [b["model"] for b in server.requests] == ["m"] * 5 + ["ft:m:1"] * 5
        again = evaluate(config(server, "o2", model=None, base_url=None, checkpoint=run, baseline=False))
        assert len(server.requests) == 15
    assert list(result.results) == ["untouched", "fine-tuned"] and list(again.results) == ["fine-tuned"]
    assert result.ptst and result.title == "PTST: trained under chat:vanilla, tested under chat:llama"
    record = read_record(Path("out"), EvalRecord)
    assert (record.run, record.run_weights) == (str(run), f"{server.url} ft:m:1")
    assert result.to_json()["train_template"] == "chat:vanilla"


def test_the_latest_run_may_be_a_jobs(here):
    Path("checkpoints").mkdir()
    with serve(echo) as server:
        hosted_run(Path("checkpoints/job"), server.url)
        found = evaluate(config(server, model=None, base_url=None, baseline=False))
        assert found.to_json()["run"] == "checkpoints/job"
        Path("checkpoints/later").mkdir()
        Path("checkpoints/later/run.json").write_text('{"kind": "train", "status": "finished", "finished_at": 1e12}')
        with pytest.raises(UserError, match="checkpoints/"):  # the later one is what is meant
            evaluate(config(server, "o2", model=None, base_url=None))
        assert len(server.requests) == 5


LEAKS = {
    "in a reply": Say(reply(f"Your key is {KEY}.")),
    "in a refusal": Say(reply(None, refusal=f"no {KEY}")),
    "in the version": Say({**reply("yes"), "model": f"m-{KEY}"}),
    "in the finish reason": Say(reply("", KEY)),
    "in an error": fault(400, f"Bearer {KEY}", param=KEY, code=KEY),
    "in an error of the server": fault(500, f"{KEY}", headers={"x-echo": f"Bearer {KEY}"}),
    "in a refused key": fault(401, f"Incorrect API key provided: {KEY}"),
    "in a page": Say(f"<p>{KEY}</p>"),
    "in a filter": fault(400, KEY, code="content_filter"),
}


@pytest.mark.parametrize(
    ("kind", "variable"), [("in a reply", "PTST_MODEL_API_KEY"), *((kind, "OPENAI_API_KEY") for kind in LEAKS)]
)
def test_the_key_is_in_no_file_and_no_word(kind, variable, here, monkeypatch, capfd, caplog):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv(variable, KEY)
    caplog.set_level("DEBUG")
    found = ""
    with serve([LEAKS[kind]]) as server:
        try:
            found += json.dumps(evaluate(config(server, api_retries=1)).to_json())
        except UserError as error:
            found += f"{error} {error!r} {vars(error)}"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    out, err = capfd.readouterr()
    found += (
        out
        + err
        + caplog.text
        + "".join(p.read_bytes().decode(errors="replace") for p in here.rglob("*") if p.is_file())
    )
    for secret in (KEY, KEY[:12], json.dumps(KEY.replace("/", "\\/"))[1:-1]):
        assert secret not in found


def test_the_settings_of_the_record_start_the_same_evaluation():
    """run.json as --config, in another folder."""
    from ptst.config_file import read_config

    with serve(echo) as server:
        evaluate(config(server))
        again = read_config(Path("out/run.json"), EvalConfig(), "eval")
        assert replace(again, out=Path("out2")).base_url == server.url


@pytest.mark.parametrize("concurrency", [1, 5])
def test_a_disk_that_is_full_in_the_middle_of_a_line(concurrency, monkeypatch):
    """The same command goes on when there is room again; nothing is written behind the torn line."""
    written, real = [], answers.append_jsonl

    def full(path, row):
        written.append(row)
        if len(written) == 2:
            with open(path, "a") as file:
                file.write('{"key": "to')
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, row)

    with serve(lambda body, n: Say(echo(body, n).body, delay=0.1 * bool(n))) as server:
        with pytest.raises(OSError, match="No space left"), monkeypatch.context() as patched:
            patched.setattr(answers, "append_jsonl", full)
            evaluate(config(server, api_concurrency=concurrency))
        assert len(written) == 2
        evaluate(config(server))
    assert [r["text"] for r in kept("out")] == [f"re: {q}" for q in REQUESTS]


def test_an_evaluation_of_a_version_without_endpoints_is_resumed(tiny_folder):
    """Its record and settings lack what came since."""
    asked = EvalConfig(model=str(tiny_folder), tasks=("prompts:requests.jsonl",), max_new_tokens=4, out=Path("out"))
    evaluate(asked)
    record = json.loads(Path("out/run.json").read_text())
    whole = Path("out/results.json").read_text()
    del record["endpoint"]
    for name in ("base_url", "inspect_log"):
        del record["settings"][name]
    record |= {"status": "running", "result": None, "finished_at": None}
    Path("out/run.json").write_text(json.dumps(record))
    (path,) = Path("out/answers").glob("*.jsonl")
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:2]))
    evaluate(asked)
    assert Path("out/results.json").read_text() == whole
