"""The stand-in, driven by OpenAI's own client as a program would drive OpenAI."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.stand_in import KEY, Fault, JobScript, StandIn
from tests.stand_in.process import stand_in_process

openai = pytest.importorskip("openai", reason="needs the package openai")

MODEL = "gpt-3.5-turbo-0613"
ASK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 2 and 3?"}]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("openai").setLevel(logging.WARNING)


def connect(server, key: str = KEY, **options):
    return openai.OpenAI(base_url=server.url, api_key=key, **{"max_retries": 0, "timeout": 10, **options})


def chat(client, model: str = MODEL, messages=ASK, **options) -> str:
    return client.chat.completions.create(model=model, messages=messages, **options).choices[0].message.content


def jsonl(rows: int, system: str = "", answer: str = "It is {i}.") -> bytes:
    lines = []
    for i in range(rows):
        texts = {"system": system, "user": f"What is {i}?", "assistant": answer.format(i=i)}
        lines.append(json.dumps({"messages": [{"role": k, "content": v} for k, v in texts.items()]}))
    return "\n".join(lines).encode()


def upload(client, content: bytes | None = None, name: str = "train.jsonl"):
    return client.files.create(file=(name, io.BytesIO(content or jsonl(12))), purpose="fine-tune")


def wait(client, id: str):
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.01)
    return job


def test_chats_are_determined_by_model_and_messages():
    with StandIn() as server, connect(server) as client:
        whole = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=3)
        assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 3
        answers = {(m, t): chat(client, m, temperature=t) for m in (MODEL, "gpt-4") for t in (0, 0)}
        assert answers[MODEL, 0] == chat(client, temperature=0)
        seeds = {chat(client, temperature=1, seed=seed) for seed in range(8)}
        assert len(seeds) > 1 and chat(client, temperature=1, seed=3) in seeds
        assert "#" not in chat(client, temperature=1, seed=3, stop="#")
        several = client.chat.completions.create(model=MODEL, messages=ASK, n=3)
        assert [c.index for c in several.choices] == [0, 1, 2]
    assert server.asked("/chat/completions")[0].body["max_tokens"] == 3


def test_a_stream_spells_the_whole_answer_with_log_probabilities_and_usage():
    with StandIn() as server, connect(server) as client:
        options = {"logprobs": True, "top_logprobs": 2, "temperature": 0}
        whole = client.chat.completions.create(model=MODEL, messages=ASK, **options)
        usage = {"include_usage": True}
        stream = client.chat.completions.create(model=MODEL, messages=ASK, stream=True, stream_options=usage, **options)
        chunks = list(stream)
        said = [c.choices[0] for c in chunks if c.choices]
        assert "".join(c.delta.content or "" for c in said) == whole.choices[0].message.content
        assert said[-1].finish_reason == "stop" and chunks[-1].usage == whole.usage
        tokens = whole.choices[0].logprobs.content
        assert [t.token for t in tokens] == [t.token for c in said if c.logprobs for t in c.logprobs.content]
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in tokens)


def test_completions_whole_and_streamed():
    with StandIn() as server, connect(server) as client:
        asked = {"model": "gpt-3.5-turbo-instruct", "prompt": "2 and 3 is", "temperature": 0, "logprobs": 1}
        whole = client.completions.create(**asked, max_tokens=4).choices[0]
        assert "".join(whole.logprobs.tokens) == whole.text and whole.finish_reason in ("stop", "length")
        stream = client.completions.create(**asked, max_tokens=4, stream=True)
        assert "".join(c.choices[0].text for c in stream) == whole.text


def test_models_are_listed_and_unknown_ones_refused():
    with StandIn() as server, connect(server) as client:
        assert MODEL in {m.id for m in client.models.list()} and client.models.retrieve(MODEL).id == MODEL
        for ask in (client.models.retrieve, lambda name: chat(client, name)):
            with pytest.raises(openai.NotFoundError) as error:
                ask("gpt-9")
            assert error.value.code == "model_not_found"
    with StandIn(models=None) as server, connect(server) as client:
        assert chat(client, "anything")


def test_a_job_goes_from_its_file_to_a_model_that_answers_otherwise():
    with StandIn(job=JobScript(tick=60)) as server, connect(server) as client:
        file = upload(client)
        assert [f.id for f in client.files.list(purpose="fine-tune")] == [file.id]
        assert client.files.content(file.id).content == jsonl(12) and client.files.retrieve(file.id) == file
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=file.id,
            suffix="mine",
            seed=4,
            metadata={"run": "a"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        )
        states = [job.status]
        for ticks in (1, 1, 6):  # by the clock alone
            server.jobs[job.id].created -= 60 * ticks
            job = client.fine_tuning.jobs.retrieve(job.id)
            states.append(job.status)
        assert states == ["validating_files", "queued", "running", "succeeded"]
        assert (job.hyperparameters.n_epochs, job.seed, job.trained_tokens) == (2, 4, 12 * 6 * 2)
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))[::-1]  # several pages
        losses = [e.data["train_loss"] for e in events if e.type == "metrics"]
        assert len(losses) == 6 and losses == sorted(losses, reverse=True)
        assert events[-1].message == "The job has successfully completed"
        table = base64.b64decode(client.files.content(job.result_files[0]).content).decode()
        assert table.splitlines()[0].startswith("step,train_loss") and len(table.splitlines()) == 7
        messages = [{"role": "user", "content": "What is 5?"}]
        assert chat(client, job.fine_tuned_model, messages) == "It is 5." != chat(client, MODEL, messages)
        listed = client.fine_tuning.jobs.list(metadata={"run": "a"}).data
        assert [j.id for j in listed] == [job.id] and not client.fine_tuning.jobs.list(metadata={"run": "b"}).data


@pytest.mark.parametrize("state", ["validating_files", "queued", "running"])
def test_a_job_fails_where_it_is_told_to(state):
    script = JobScript(fails=("server_error", "out of luck"), fails_in=state)
    with StandIn(job=script) as server, connect(server) as client:
        job = wait(client, client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client).id).id)
        assert (job.status, job.error.message, job.fine_tuned_model) == ("failed", "out of luck", None)
        events = [e.message for e in client.fine_tuning.jobs.list_events(job.id)]
        assert events[0] == "out of luck" and ("Fine-tuning job started" in events) == (state == "running")
        with pytest.raises(openai.NotFoundError):
            chat(client, server.jobs[job.id].model)


@pytest.mark.parametrize(
    ("content", "words"),
    [(jsonl(9), "at least 10"), (b"{}\n" * 12, "Line 1"), (jsonl(12).replace(b"assistant", b"user"), "assistant")],
)
def test_a_bad_file_fails_its_job(content, words):
    with StandIn() as server, connect(server) as client:
        job = wait(client, client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client, content).id).id)
        assert job.status == "failed" and job.error.code == "invalid_training_file" and words in job.error.message


def test_moderation_refuses_a_file():
    with StandIn(job=JobScript.unsafe()) as server, connect(server) as client:
        job = wait(client, client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client).id).id)
        assert job.status == "failed" and job.error.code == "unsafe_file" and "moderation" in job.error.message


def test_a_job_is_cancelled_once():
    with StandIn(job=JobScript(tick=5)) as server, connect(server) as client:
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client).id)
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.cancel(job.id)


def test_what_cannot_be_trained_is_refused():
    with StandIn() as server, connect(server) as client:
        file = upload(client)
        for model in ("gpt-4", "gpt-9"):
            with pytest.raises(openai.BadRequestError) as error:
                client.fine_tuning.jobs.create(model=model, training_file=file.id)
            assert error.value.code == "model_not_available"
        client.files.delete(file.id)
        with pytest.raises(openai.BadRequestError, match="invalid training_file"):
            client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        with pytest.raises(openai.BadRequestError, match="extension"):
            upload(client, name="train.txt")
        assert not server.jobs


@pytest.mark.parametrize(
    ("bad", "param"),
    [({"temperature": 3}, "temperature"), ({"max_tokens": -1}, "max_tokens"), ({"n": "x"}, "n")],
)
def test_bad_parameters_are_refused_by_name(bad, param):
    with StandIn() as server, connect(server) as client:
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, **bad)
        assert error.value.param == param


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (Fault(401, code="invalid_api_key"), "AuthenticationError", "invalid_api_key"),
        (Fault(429, headers={"Retry-After": "2"}), "RateLimitError", None),
        (Fault(429, code="insufficient_quota"), "RateLimitError", "insufficient_quota"),
        (Fault(500), "InternalServerError", None),
        (Fault(503), "InternalServerError", None),
    ],
)
def test_errors_on_demand(fault, kind, code):
    with StandIn(faults=[fault]) as server, connect(server) as client:
        with pytest.raises(getattr(openai, kind)) as error:
            chat(client)
        assert error.value.code == code
        assert error.value.response.headers.get("retry-after") == fault.headers.get("Retry-After")


def test_a_wrong_key_is_refused():
    with StandIn() as server, connect(server, "sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as error:
            chat(client)
        assert error.value.code == "invalid_api_key" and "sk-wrong" not in str(error.value)


def test_answers_come_late_cut_or_malformed():
    with StandIn(faults=[Fault(delay=0.3)]) as server, connect(server) as client:
        with pytest.raises(openai.APITimeoutError):
            chat(client, timeout=0.1)
        assert chat(client, timeout=60)
        server.faults = [Fault(cut=30)]
        with pytest.raises(openai.APIConnectionError):
            chat(client)
        server.faults = [Fault(cut=400)]
        said = []
        with pytest.raises(Exception, match=r"(?i)connection|closed"):  # the client's own, or that of its HTTP library
            said.extend(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
        assert not any(chunk.choices[0].finish_reason for chunk in said)
        server.faults = [Fault(body='{"choices": [')]
        with pytest.raises(json.JSONDecodeError):
            chat(client)


def test_faults_strike_by_number_path_and_share():
    with StandIn(faults=[Fault(500, "/chat/", "POST", {1, 2})]) as server, connect(server) as client:
        outcomes = []
        for _ in range(4):
            client.models.list()
            try:
                outcomes.append(bool(chat(client)))
            except openai.InternalServerError:
                outcomes.append(False)
        assert outcomes == [True, False, False, True]
        assert [r.status for r in server.asked("/chat/")] == [200, 500, 500, 200]
    struck = [Fault(500, share=0.3).strikes(n) for n in range(1000)]
    assert 250 < sum(struck) < 350 and struck == [Fault(500, share=0.3).strikes(n) for n in range(1000)]


def test_an_answer_may_be_lost_after_its_work_is_done():
    with StandIn(faults=[Fault(500, "/jobs", "POST", {0}, after=True)]) as server, connect(server) as client:
        file = upload(client)
        with pytest.raises(openai.InternalServerError):
            client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        assert [j.training_file for j in client.fine_tuning.jobs.list()] == [file.id]


def test_the_client_repeats_what_may_pass():
    faults = [
        Fault(429, numbers={0}, headers={"retry-after-ms": "1"}),
        Fault(500, numbers={1}, headers={"retry-after-ms": "1"}),
    ]
    with StandIn(faults=faults) as server, connect(server, max_retries=3) as client:
        assert chat(client)
        assert [r.status for r in server.requests] == [429, 500, 200]


def test_what_was_not_sent_whole_is_no_request():
    """A client that is killed while it sends: nothing was asked, and the next one is answered."""
    whole = json.dumps({"model": MODEL, "messages": ASK}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
    with StandIn() as server, connect(server) as client:
        for part in (b"", whole[:20]):
            with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].partition("/")[0]))) as cut:
                cut.sendall(head + part)
                cut.shutdown(socket.SHUT_WR)
                assert cut.recv(100) == b""
        assert chat(client)
        assert [request.body["model"] for request in server.requests] == [MODEL]


def test_fifty_requests_at_once():
    with StandIn(latency=0.1) as server, connect(server) as client, ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda i: chat(client, messages=[{"role": "user", "content": str(i)}]), range(150)))
        assert len(answers) == 150 and server.most > 25


def test_it_runs_as_a_process_and_outlives_its_clients():
    with stand_in_process("--tick", "0.001") as server:
        with connect(server) as client:
            job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client).id)
        with connect(server) as client:
            assert wait(client, job.id).status == "succeeded"
        assert [j["id"] for j in server.jobs] == [job.id] and len(server.files) == 1
        assert server.requests[1]["body"]["training_file"] == server.files[0]["id"]
        server.set_faults(Fault(500, numbers={0}))
        with connect(server) as client:
            with pytest.raises(openai.InternalServerError):
                chat(client)
            assert chat(client)
