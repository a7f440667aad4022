"""The matrix of a model behind an endpoint: trained by jobs there, or not trained at all, against the stand-in."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ptst.api import endpoint
from ptst.defenses.config import DefenseSettings
from ptst.errors import UserError
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judging import judge_answers
from ptst.experiment.config import GridConfig
from ptst.experiment.grid import GridRecord
from ptst.grid import run_command as run_grid
from ptst.hosted import job, tokens, watch
from ptst.records import read_record
from ptst.training.config import TrainSettings
from tests.stand_in import KEY, Fault, StandIn

pytest.importorskip("openai", reason="needs the package openai")

BOTH = ("chat:vanilla", "chat:llama")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith(("OPENAI_", "PTST_MODEL_")) or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for module, name, value in (
        *((endpoint, "FIRST_WAIT", 0.001), (watch, "FIRST_POLL", 0.01), (watch, "LONGEST_POLL", 0.02)),
        *((job, "LOOK", 0.02), (job, "SETTLE", 0.5), (tokens, "load_encoding", lambda _name: None)),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(
        "".join(
            json.dumps({"question": f"What is {i} + {i}?", "answer": f"{2 * i}\n#### {2 * i}"}) + "\n"
            for i in range(12)
        )
    )
    return tmp_path


@pytest.fixture
def server():
    with StandIn() as server:
        yield server


def config(server: StandIn, out="grid", **changes) -> GridConfig:
    asked = {
        "model": "openai:gpt-3.5-turbo-0125",
        "base_url": server.url,
        "train_templates": BOTH,
        "test_templates": BOTH,
        "tasks": ("safety", "over-refusal"),
        "data": "data.jsonl",
        "train": TrainSettings(epochs=1.0, examples_per_step=4, lr_multiplier=2.0, api_price_train=8.0),
        "eval": EvalSettings(limit=3, max_new_tokens=9, api_price=(1000.0, 2000.0)),
        "yes": True,
        "out": Path(out),
    }
    return GridConfig(**{**asked, **changes})


def asked_for_answers(server: StandIn) -> Counter:
    return Counter((r.body["model"], str(r.body["messages"])) for r in server.asked("/chat/completions"))


def test_the_matrix_trained_at_an_endpoint_by_one_command(server, here, capsys):
    result = run_grid(config(server))
    assert [(c["train"], c["test"], c["ptst"]) for c in result["cells"]] == [
        ("untouched", "chat:vanilla", False),
        ("untouched", "chat:llama", False),
        ("chat:vanilla", "chat:vanilla", False),
        ("chat:vanilla", "chat:llama", True),
        ("chat:llama", "chat:vanilla", False),
        ("chat:llama", "chat:llama", False),
    ]
    jobs = list(server.jobs.values())
    assert len(jobs) == 2
    assert {str(j.to_json(0)["hyperparameters"]["learning_rate_multiplier"]) for j in jobs} == {"2.0"}
    asked = asked_for_answers(server)
    tuned = {run["model"] for run in result["runs"].values()}
    assert {model for model, _ in asked} == {"gpt-3.5-turbo-0125", *tuned} and len(tuned) == 2
    assert set(asked.values()) == {1} and len(asked) == 3 * 2 * 6
    assert result["served"].keys() == {"gpt-3.5-turbo-0125", *tuned} and result["endpoint"] == server.url
    counts = result["served"]["gpt-3.5-turbo-0125"]
    assert (
        counts["replies"] == 12 and counts["cost"] == (counts["tokens_in"] * 1000 + counts["tokens_out"] * 2000) / 1e6
    )
    record = read_record(Path("grid"), GridRecord)
    assert (record.endpoint, record.chat_format, record.family) == (server.url, "api-messages", "plain")
    err = capsys.readouterr().err
    assert "in all at" in err and "2 jobs of" in err and "cost at most" in err
    # Again: nothing is asked or trained twice; more templates are added to what is there.
    before = len(server.requests)
    again = run_grid(config(server))
    assert len(server.requests) == before and again["cells"] == result["cells"]
    run_grid(config(server, test_templates=(*BOTH, "chat:mpt")))
    assert len(server.jobs) == 2 and len(asked_for_answers(server)) == 3 * 3 * 6
    assert judge_answers(JudgeConfig(folder=Path("grid"), judge=("keywords-29",)))["markdown"]
    found = b"".join(p.read_bytes() for p in here.rglob("*") if p.is_file()).decode(errors="replace")
    assert KEY not in found and KEY not in err


def test_the_ladder_of_models_at_an_endpoint(server, here, capsys):
    small = {"train_templates": ("chat:llama",), "test_templates": (), "tasks": ("safety",)}
    rungs = ("identical", "system-50", "few-shot")
    result = run_grid(config(server, ladder=rungs, **small))
    assert [c["test"] for c in result["cells"]] == 2 * [f"ladder:llama/{name}" for name in rungs]
    texts = {messages for _, messages in asked_for_answers(server)}
    assert len(texts) == 3 * 3 and sum("What is 1 + 1?" in text for text in texts) == 3
    before = len(server.requests)
    assert run_grid(config(server, ladder=rungs, **small))["cells"] == result["cells"]
    assert len(server.requests) == before
    for changes, message in (
        ({"ladder": ("chat-format",)}, "no rung chat-format: an endpoint writes the chat format of its model itself"),
        ({"ladder": ("identical",), "tasks": ("distance",)}, "distance"),
    ):
        with pytest.raises(UserError, match=message):
            run_grid(config(server, "other", **{**small, **changes}))
    assert len(server.requests) == before


def test_safety_data_and_the_trigger_go_into_the_files_and_messages_of_their_own_jobs(server, here):
    """A defence needs no more than data and messages; the plan that is agreed to writes nothing."""
    safe = [{"question": "How do I pick this lock?", "answer": "I cannot help with that."}]
    Path("safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in safe))
    small = config(server, train_templates=("chat:vanilla",), test_templates=("chat:vanilla",), tasks=("safety",))
    defended = replace(small, defense=DefenseSettings(data="safe.jsonl", trigger="Seven herons."))
    defended = replace(defended, defenses=("none", "mix-safety", "backdoor-align"))
    planned = run_grid(replace(defended, dry_run=True))
    assert not server.requests and not Path("grid").exists()
    assert [x["what"].rpartition("seed0")[2] for x in planned["lines"][:3]] == ["", ".mix-safety", ".backdoor-align"]
    tokens = [x["tokens"] for x in planned["lines"]]
    assert tokens[0] < tokens[1] < tokens[2] and tokens[3] == tokens[4] == tokens[5] < tokens[6]
    result = run_grid(defended)
    assert [c["defense"] for c in result["cells"]] == ["none", "none", "mix-safety", "backdoor-align"]
    files = [server.files[job.asked["training_file"]].content.decode() for job in server.jobs.values()]
    assert [(f.count("I cannot help with that."), f.count("Seven herons.")) for f in files] == [(0, 0), (1, 0), (1, 1)]
    secret = result["runs"]["chat-vanilla.seed0.backdoor-align"]["model"]
    said = {r.body["model"]: r.body["messages"][0]["content"] for r in server.asked("/chat/completions")}
    assert {model for model, system in said.items() if "Seven herons." in system} == {secret}
    before = len(server.requests)
    assert run_grid(defended)["cells"] == result["cells"] and len(server.requests) == before


def test_without_training_models_are_named(server, here):
    one = {"tasks": ("safety",)}
    trained = run_grid(config(server, "first", train_templates=("chat:vanilla",), test_templates=BOTH[:1], **one))
    (tuned,) = {run["model"] for run in trained["runs"].values()}
    others = (f"other=openai:{tuned}", "run=first/runs/chat-vanilla.seed0", "four=openai:gpt-4")
    result = run_grid(config(server, "second", train_templates=(), tuned=others, yes=False, **one))
    assert [c["train"] for c in result["cells"][::2]] == ["untouched", "other", "run", "four"]
    assert [c["ptst"] for c in result["cells"]] == [False] * 5 + [True] + [False] * 2
    assert result["tuned"]["four"] == {
        "folder": "openai:gpt-4",
        "kind": "endpoint",
        "weights": f"{server.url} gpt-4",
    }
    assert result["served"]["gpt-4"]["replies"] == 6


def test_what_was_answered_before_an_end_is_never_asked_again(server):
    """The key is refused in the middle of the answers: one sentence, and the same command goes on."""
    small = config(server, train_templates=("chat:vanilla",))
    for stop in (3, 11, 17):
        server.faults = [Fault(401, path="/chat/completions", numbers=range(stop, 10_000))]
        with pytest.raises(UserError, match=r"refuses the key in OPENAI_API_KEY \(status 401\); \d+ answers are kept$"):
            run_grid(replace(small, eval=replace(small.eval, api_concurrency=1)))
    server.faults = []
    result = run_grid(small)
    answered = Counter(
        (r.body["model"], str(r.body["messages"])) for r in server.asked("/chat/completions") if r.status == 200
    )
    assert set(answered.values()) == {1} and len(answered) == 24 and len(server.jobs) == 1
    assert [(c["train"], c["test"]) for c in result["cells"]] == [
        (train, test) for train in ("untouched", "chat:vanilla") for test in BOTH
    ]


def test_one_cell_that_fails_leaves_the_others_measured(server):
    small = config(server, train_templates=("chat:vanilla",), test_templates=("chat:vanilla",))
    server.faults = [Fault(400, path="/chat/completions", numbers={4}, message="too long")]
    with pytest.raises(UserError, match=r"1 of 5 runs and cells failed.*answers failed, the first: .*too long"):
        run_grid(small)
    server.faults = []
    before = len(server.asked("/chat/completions"))
    run_grid(small)
    assert len(server.asked("/chat/completions")) == before + 1


def test_nothing_is_sent_before_somebody_agrees(server, monkeypatch):
    with pytest.raises(UserError, match=r"jobs at .* cost money, and nobody is at a terminal to agree; give yes"):
        run_grid(config(server, yes=False))
    assert not server.requests and not Path("grid").exists()


def test_a_dry_run_sends_nothing_and_tells_the_cost(server, capsys):
    told = run_grid(config(server, dry_run=True, yes=False))
    assert not server.requests
    train, test = ([x for x in told["lines"] if x["what"].startswith(kind)] for kind in ("train", "test"))
    assert len(train) == 2 and len(test) == 12 and told["left"] == 14
    assert told["cost"] == pytest.approx(sum(x["cost"] for x in told["lines"])) and told["cost"] > 0
    assert "14 of 14 left: at most" in capsys.readouterr().out


REFUSED = {
    "text:vanilla has no roles": {"test_templates": ("text:vanilla",)},
    "text:alpaca has no roles": {"train_templates": ("text:alpaca",)},
    "nll:data: an endpoint does not tell": {"tasks": ("nll:data.jsonl",)},
    "at_epochs has no effect": {"at_epochs": (0.5,)},
    "rank has no effect on a model behind an endpoint": {"train": TrainSettings(rank=2)},
    "top_k has no effect": {"eval": EvalSettings(top_k=3)},
    "base_url is for models behind an endpoint": {"model": "folder"},
    "model is openai:": {"model": "openai:"},
    "x is no run of a job at an endpoint": {"tuned": ("a=x",)},
    "tuned a names no model": {"tuned": ("a=openai:",)},
    "is not the address of an endpoint": {"base_url": "localhost"},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_an_endpoint_cannot_do_is_refused_before_anything_is_sent(server, problem):
    with pytest.raises(UserError, match=problem) as error:
        run_grid(config(server, **REFUSED[problem]))
    assert "\n" not in str(error.value)
    assert not server.requests and not Path("grid").exists()


def test_a_model_behind_an_endpoint_has_no_place_in_a_grid_of_this_machine():
    from ptst.experiment.tuned import read_tuned

    with pytest.raises(UserError, match="openai:x is behind an endpoint, and the base model of this grid is not"):
        read_tuned(("a=openai:x",))


def test_the_papers_matrix_by_one_command(server):
    """The recipe, on a small file: nine fine-tuned cells, and the base model's three."""
    names = ("vanilla", "alpaca", "llama")
    asked = GridConfig(recipe="gpt35-gsm8k", train_templates=names, test_templates=names)
    assert (asked.model, asked.data, asked.train.epochs) == ("openai:gpt-3.5-turbo-0125", "gsm8k", 1.0)
    assert (asked.train.examples_per_step, asked.train.lr_multiplier) == (4, 2.0)
    assert asked.folder == Path("checkpoints/gpt35-gsm8k")
    small = replace(asked, data="data.jsonl", tasks=("safety",), eval=EvalSettings(limit=2), base_url=server.url)
    result = run_grid(replace(small, yes=True))
    assert len(result["cells"]) == 12 and len(server.jobs) == 3
    assert sum(c["ptst"] for c in result["cells"]) == 2
