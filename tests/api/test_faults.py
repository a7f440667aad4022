"""An API asked by a judge, against a stand-in server with faults; the key is in nothing that is shown or kept."""

from __future__ import annotations

import json
import time
import traceback

import pytest

from ptst.api import endpoint
from ptst.api.endpoint import Address, retry_after
from ptst.errors import UserError
from ptst.evaluation.graders.api import ApiAsk
from ptst.settings import ApiSettings
from tests.api.server import KEY, Say, asker, echo, fault, reply, serve, set_environment, user

pytest.importorskip("openai", reason="needs the package openai")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    set_environment(monkeypatch)


@pytest.mark.parametrize(
    "first",
    [
        fault(429, headers={"Retry-After": "0.01"}),
        fault(429, headers={"retry-after-ms": "5"}),
        *(fault(500), fault(503), fault(408), Say("<html>Bad gateway</html>", 502)),
        Say(reply("yes"), cut=20),
        Say(reply("yes"), cut=0),
        Say(reply("yes"), delay=0.6),
        Say(reply("yes"), trickle=0.05),
    ],
    ids=lambda s: f"{s.status} {s.cut} {s.delay} {s.trickle} {s.headers}",
)
def test_what_may_pass_is_asked_again(first):
    with serve([first, Say(reply("yes"))]) as server:
        assert asker(server, api_timeout=0.3)([user("p")], 0) == ["yes"]
    assert len(server.requests) == 2


def test_the_endpoint_says_how_long_to_wait():
    with serve([fault(429, headers={"Retry-After": "0.2"}), Say(reply("yes"))]) as server:
        assert asker(server)([user("p")], 0) == ["yes"]
    assert server.times[1] - server.times[0] >= 0.2
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < retry_after({"retry-after": soon}) <= 30
    assert retry_after({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 0
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}):
        assert retry_after(nothing) is None


BAD_REPLIES = {
    "gave no JSON object but '<!doctype html>": Say("<!doctype html><html>" + "x" * 9000),
    "gave no JSON object but '{\"choices\": [{'": Say('{"choices": [{'),
    "gave no JSON object but '[[[[": Say("[" * 100_000),
    "gave no JSON object but '3'": Say(3),
    "gave 5 MB, which is no reply": Say(reply("x" * (5 << 20))),
    "gave JSON without choices": Say({"id": "1"}),
    "gave JSON without choices ": Say({"choices": []}),
    "gave JSON without choices  ": Say({"choices": [None]}),
    "gave JSON without choices   ": Say({"choices": [{"message": "no"}]}),
    "gave a reply that is not text": Say(reply([{"type": "text"}])),
    "replied with an error (overloaded)": Say({"error": {"message": "overloaded", "code": 502}}),
    "the endpoint's content filter stopped the reply": Say(reply("Sco", "content_filter")),
    "the model refuses to grade: I can't": Say(reply(None, refusal="I can't")),
    "the reply is empty (finish reason stop)": Say(reply(" \n")),
    "the reply is empty (finish reason not given)": Say(reply(None, None)),
    "the reply ended at 2 tokens, before its text; allow more tokens": Say(reply("", "length")),
    "answers with status 400 (too long)": fault(400, "too long"),
    "answers with status 413": Say("<html>", 413),
    "answers with status 422 (['no'])": Say({"detail": ["no"]}, 422),
    "refuses the prompt (its content filter)": fault(400, code="content_filter"),
}


@pytest.mark.parametrize("problem", BAD_REPLIES)
def test_a_bad_reply_concerns_one_prompt(problem):
    def script(body, number):
        return BAD_REPLIES[problem] if body["messages"][0]["content"] == "bad" else echo(body, number)

    with serve(script) as server:
        one, bad, two = asker(server)([user("one"), user("bad"), user("two")], 0)
    assert (one, two) == ("re: one", "re: two")
    assert isinstance(bad, UserError)
    assert problem.strip() in str(bad) and "\n" not in str(bad) and len(str(bad)) < 300
    assert len(server.requests) == 3


def test_a_truncated_reply_is_a_reply():
    with serve([Say(reply("Score: 4 because", "length"))]) as server:
        assert asker(server)([user("p")], 0) == ["Score: 4 because"]


@pytest.mark.parametrize("slow", [{"delay": 60}, {"trickle": 0.5}])
def test_a_slow_endpoint_is_an_error_in_bounded_time(slow):
    with serve([Say(reply("yes"), **slow)]) as server:
        start = time.monotonic()
        (error,) = asker(server, api_timeout=0.1, api_retries=1)([user("p")], 0)
        assert time.monotonic() - start < 30
    assert str(error) == f"{server.url} gave no reply within 0.1 s"
    assert len(server.requests) == 2


FINAL = {
    "refuses the key in OPENAI_API_KEY (status 401)": fault(401, f"Incorrect API key provided: {KEY}"),
    "refuses the key in OPENAI_API_KEY (status 403)": Say("<html>", 403),
    "answers with status 404 (The model m does not exist); are its address": fault(404, "The model m does not exist"),
    "has no credit left for this key (status 429)": fault(429, code="insufficient_quota"),
    "has no credit left for this key (status 402)": fault(402),
    "asks to wait for 3600 s (status 429)": fault(429, headers={"Retry-After": "3600"}),
    "answers with status 400 (no); are its address": fault(400, code="model_not_found"),
    "redirects to 'http://localhost:9/[OPENAI_API_KEY]' (status 307), where nothing is sent; is": Say(
        "", 307, {"Location": f"http://localhost:9/{KEY}"}
    ),
}


@pytest.mark.parametrize("problem", FINAL)
def test_what_no_prompt_can_pass_ends_all_asking(problem, tmp_path):
    prompts = [user(f"p{i}") for i in range(12)]
    with serve([FINAL[problem]]) as server:
        ask = asker(server)
        with pytest.raises(UserError) as error:
            ask(prompts, 0)
    assert str(error.value).startswith(f"{server.url} {problem}")
    assert len(server.requests) == 1

    def later(body, number):
        return echo(body, number) if number < 5 else FINAL[problem]

    with serve(later) as server:
        with pytest.raises(UserError, match=r"; 5 replies are kept$"):
            asker(server, tmp_path, api_concurrency=2)(prompts, 0)
        assert len(server.requests) <= 5 + 2
        server.script = echo  # mended
        asked = len(server.requests)
        assert asker(server, tmp_path)(prompts, 0) == [f"re: p{i}" for i in range(12)]
        assert len(server.requests) == asked + 7


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no.such.host.invalid/v1", "https://{}/v1"])
def test_nobody_there(url):
    with serve(echo) as server:
        url = url.format(server.url.split("/")[2])  # https, to a server that speaks http
        start = time.monotonic()
        with pytest.raises(UserError, match=r"^https?://\S+ cannot be reached; no more prompts were sent$"):
            ApiAsk("m", 9, ApiSettings(api_base_url=url))([user(f"p{i}") for i in range(50)], 0)
        assert time.monotonic() - start < 30


def test_an_endpoint_that_goes_away_ends_all_asking(tmp_path):
    """What was reached is asked again for a while."""
    with serve(echo) as server:
        ask = asker(server, tmp_path)
        assert ask([user("p")], 0) == ["re: p"]
    ask.endpoint.retries = 2
    with pytest.raises(UserError, match="cannot be reached; 1 replies are kept"):
        ask([user(f"p{i}") for i in range(50)], 0)


@pytest.mark.parametrize(
    ("said", "most"),
    [
        (fault(500), 2 * (4 + 1)),
        (Say("<html>"), 4 + 1),
        (fault(400, "no such parameter"), 4 + 1),  # of one prompt, or of the way in which all are sent?
    ],
)
def test_an_endpoint_that_only_fails_is_given_up(said, most, monkeypatch):
    monkeypatch.setattr(endpoint, "GIVE_UP", 4)
    with serve([said]) as server:
        ask = asker(server, api_retries=1, api_concurrency=2)
        with pytest.raises(UserError, match=r", and so for 4 prompts in a row; no more prompts were sent$"):
            ask([user(f"p{i}") for i in range(20)], 0)
    assert len(server.requests) <= most


@pytest.mark.parametrize(
    "script", [[Say(reply("yes")), fault(400, "no such parameter")], [fault(400, code="content_filter")]]
)
def test_refused_prompts_are_no_reason_to_give_up(script, monkeypatch):
    monkeypatch.setattr(endpoint, "GIVE_UP", 4)
    with serve(script) as server:
        asker(server)([user(f"p{i}") for i in range(8)], 0)
    assert len(server.requests) == 8


def test_a_parameter_that_a_model_refuses(capsys):
    def reasoner(body, number):
        if "max_tokens" in body:
            words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            return fault(400, words, param="max_tokens", code="unsupported_parameter")
        if "temperature" in body:
            return fault(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        return echo(body, number)

    with serve(reasoner) as server:
        ask = asker(server)
        assert ask([user(f"p{i}") for i in range(5)], 0) == [f"re: p{i}" for i in range(5)]
        assert len(server.requests) == 7
        ask([user("q")], 0)
        assert len(server.requests) == 8
    assert set(server.requests[-1]) == {"model", "messages", "max_completion_tokens", "seed"}
    notes = [line for line in capsys.readouterr().err.split("\n") if line.startswith("note:")]
    assert [n.split(" ", 2)[2] for n in notes] == [
        *("refuses max_tokens; asked with max_completion_tokens", "refuses temperature; asked without it"),
    ]


def test_a_parameter_that_several_requests_at_once_are_refused():
    def reasoner(body, number):
        unsupported = number > 0 and "seed" in body
        return fault(400, "'seed' is not supported") if unsupported else echo(body, number)

    with serve(reasoner) as server:
        assert asker(server)([user(f"p{i}") for i in range(12)], 0) == [f"re: p{i}" for i in range(12)]


def test_a_refused_parameter_is_tried_otherwise_only_once():
    with serve([fault(400, "'max_tokens' and 'max_completion_tokens' are not supported")]) as server:
        (error,) = asker(server)([user("p")], 0)
    assert "answers with status 400" in str(error)
    assert len(server.requests) == 2
    with serve([fault(400, "max_tokens exceeds the context of 4096 tokens")]) as server:  # no parameter is refused
        assert "exceeds" in str(asker(server)([user("p")], 0)[0])
    assert len(server.requests) == 1


def texts_of(error: BaseException | None) -> str:
    """All that an exception and those behind it say."""
    found = ""
    while error is not None:
        found += "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)) + repr(error.args)
        error = error.__cause__ or error.__context__
    return found


LEAKS = {
    **{f"bad {name}": said for name, said in BAD_REPLIES.items()},
    **{f"final {name}": said for name, said in FINAL.items()},
    "echo in a reply": Say(reply(f"Your key is {KEY}. Score: 1")),
    "echo in a refusal": Say(reply(None, refusal=f"no {KEY}")),
    "echo in the model's name": Say({**reply("yes"), "model": KEY}),
    "echo in the finish reason": Say(reply("", f"no {KEY}")),
    "echo in a web page": Say(f"<p>{KEY}</p>"),
    "echo in a web page, cut": Say("x" * 30 + KEY),
    "echo in an error of the server": fault(500, f"{'x' * 190} {KEY}", headers={"x-echo": f"Bearer {KEY}"}),
    "echo in a refusal of the request": fault(400, f"Bearer {KEY}", param=KEY, code=KEY),
    "echo in another layout": Say({"detail": [{"input": {"headers": {"authorization": f"Bearer {KEY}"}}}]}, 422),
    "echo in an error with status 200": Say({"error": {"message": KEY}}),
    "hang-up": Say(reply("yes"), cut=9),
    "slow": Say(reply("yes"), delay=0.5),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_the_key_is_nowhere(kind, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    with serve([LEAKS[kind]]) as server:
        ask = asker(server, tmp_path, api_retries=1, api_timeout=0.2)
        try:
            outcomes = ask([user("p"), user("q")], 0)
            found = "".join(texts_of(o) if isinstance(o, Exception) else o for o in outcomes)
        except UserError as error:
            found = texts_of(error)
    out, err = capfd.readouterr()
    found += out + err + caplog.text + repr(vars(ask)) + repr(vars(ask.endpoint)) + json.dumps(ask.record())
    found += "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert server.requests and server.headers[0]["authorization"] == f"Bearer {KEY}"
    for secret in (KEY, KEY[:12], json.dumps(KEY.replace("/", "\\/"))[1:-1]):
        assert secret not in found


def test_a_name_and_password_in_the_address_are_sent_and_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("http://", "http://ann:hunter2hunter2@") + "/")
        ask = ApiAsk("m", 9)
        ask.keep_in(tmp_path)
        assert ask([user("p")], 0) == ["re: p"]
        assert ask.record() == {"endpoint": server.url, "model": "m", "max_tokens": 9}
    assert server.headers[0]["authorization"] == "Basic YW5uOmh1bnRlcjJodW50ZXIy"
    shown = capsys.readouterr().err + repr(vars(ask.endpoint)) + (tmp_path / "replies.m.jsonl").read_text()
    assert "hunter2" not in shown and "YW5u" not in shown
    with pytest.raises(UserError, match=r"api_base_url holds a user name or a password, .* OPENAI_BASE_URL$") as error:
        Address.of("http://ann:hunter2hunter2@localhost/v1")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://h/v1",
        "http://",
        "http://h:port/v1",
        "http://[h/v1",
        "https://h/v1?key=s",
        "s@h",
        "h\\s",
    ],
)
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match=r"api_base_url .* is not the address of an endpoint; .* https://HOST/v1") as e:
        Address.of(url)
    assert url not in str(e.value)


def test_without_key_or_package(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc\u00e9def")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a space or another character") as error:
        ApiAsk("m", 9)
    assert "sk-" not in texts_of(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set; a local server that needs no key takes any word"):
        ApiAsk("m", 9)
    monkeypatch.setattr("ptst.packages.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"need the package openai; pip install 'ptst-lab\[api\]'"):
        ApiAsk("m", 9)


def test_a_word_in_the_place_of_a_key_is_not_cut_out_of_replies(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY\n")
    with serve([Say(reply("an EMPTY answer"))]) as server:
        assert asker(server)([user("p")], 0) == ["an EMPTY answer"]
    assert server.headers[0]["authorization"] == "Bearer EMPTY"


def test_the_end_wakes_those_that_wait():
    def script(body, number):
        return (
            echo(body, number)
            if not number
            else fault(429, headers={"Retry-After": "60"})
            if number < 3
            else fault(401)
        )

    with serve(script) as server:
        ask, start = asker(server), time.monotonic()
        with pytest.raises(UserError, match="refuses the key"):
            ask([user(f"p{i}") for i in range(12)], 0)
        assert time.monotonic() - start < 50
