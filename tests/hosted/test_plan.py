"""What a job would be: its file, its price, and which settings and data are refused before anything is sent."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from ptst import train
from ptst.errors import UserError
from ptst.hosted import checks
from ptst.hosted.plan import plan_hosted
from ptst.hosted.tokens import TokenCounter
from ptst.training.config import TrainConfig
from tests.hosted.conftest import MODEL, settings
from tests.hosted.rows import write_rows

API_SHORT = "Be helpful, respectful and honest."[:30]


def users(plan) -> list[str]:
    return [json.loads(line)["messages"][1]["content"] for line in plan.content.splitlines()]


def test_the_same_settings_make_the_same_file_and_mark():
    first, again, other = plan_hosted(settings()), plan_hosted(settings()), plan_hosted(settings(seed=1))
    assert first.content == again.content and first.mark == again.mark
    assert sorted(users(first)) == sorted(users(other)) and users(first) != users(other) and first.mark != other.mark
    changed = [{"lr_multiplier": 1.0}, {"examples_per_step": 4}, {"epochs": 2.0}, {"template": "llama"}, {"limit": 11}]
    changed += [{"model": "openai:gpt-4o-mini"}, {"val_data": "data.jsonl"}]
    marks = {plan_hosted(settings(**change)).mark for change in changed}
    assert len(marks) == len(changed) and first.mark not in marks
    same = write_rows(Path("same.jsonl"), question="What is 1 + 1?", answer="2")
    files = [plan_hosted(settings(data=str(same), seed=seed)) for seed in (0, 1)]  # the job has a seed of its own
    assert files[0].content == files[1].content and files[0].mark != files[1].mark
    free = {"yes": True, "api_price_train": 8.0, "out": Path("x"), "base_url": "http://127.0.0.1:1/v1"}
    assert plan_hosted(settings(**free)).mark == first.mark


def test_whole_epochs_are_the_jobs_and_others_are_mixed_by_rows():
    plan = plan_hosted(settings(epochs=3.0, mix=("safety.jsonl:3",)))
    assert (plan.n_epochs, plan.rows, plan.mixing) == (3, 16, "") and len(set(users(plan))) == 16
    plan = plan_hosted(settings(epochs=3.0, mix=("safety.jsonl:1",)))
    assert (plan.n_epochs, plan.rows) == (1, 3 * 12 + 4) and "one pass" in plan.mixing
    visits = Counter(users(plan))
    assert sorted(visits.values()) == [1] * 4 + [3] * 12 and visits["Do some harm 1."] == 1
    # As in a run here, each pass over the main data has its share of the others.
    thirds = [users(plan)[i : i + 13] for i in (0, 13, 26)]
    assert all(sum("harm" in text for text in third) in (1, 2) for third in thirds)
    half = plan_hosted(settings(data="data.jsonl", epochs=0.9))
    assert (half.n_epochs, half.rows) == (1, 11)


def test_mixed_data_have_the_messages_of_their_own_template():
    Path("own.toml").write_text('name = "chat:own"\nuser = "{x}"\nsystem = "7d2e90."\n')
    plan = plan_hosted(settings(mix=("safety.jsonl:1:own.toml", "safety.jsonl:1:llama-short")))
    said = [[m["content"] for m in json.loads(line)["messages"]] for line in plan.content.splitlines()]
    systems = Counter((system[:30], "harm" in asked) for system, asked, _ in said)
    assert systems == {("", False): 12, ("7d2e90.", True): 4, (API_SHORT, True): 4}
    record = plan.record("http://x/v1")
    assert [own.template and own.template.name for own in record.mix] == ["chat:own", "chat:llama-short"]
    assert record.data.template is None and record.mix[0].template.system == "7d2e90."
    assert "rows of safety.jsonl under chat:own" in dict(plan._lines())
    other = plan_hosted(settings(mix=("safety.jsonl:1", "safety.jsonl:1:llama-short")))
    assert other.mark != plan.mark
    with pytest.raises(UserError, match="text:alpaca has no roles, which a chat API needs"):
        plan_hosted(settings(mix=("safety.jsonl:1:text:alpaca",)))


def test_recipes_of_the_papers_third_system():
    plan = plan_hosted(TrainConfig(recipe="gpt35-gsm8k", data="gsm8k:data.jsonl", model="openai:gpt-4o-mini"))
    assert plan.hyperparameters == {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2.0}
    recipe = plan.record("http://x/v1").recipe
    assert recipe["lr_multiplier"]["value"] == 2.0 and recipe["model"]["origin"].startswith("given")
    plan = plan_hosted(TrainConfig(recipe="gpt35-orca-math", data="orca-math:data.jsonl"))
    assert (plan.model, plan.hyperparameters["batch_size"]) == ("gpt-3.5-turbo-0125", 6)


def test_tokens_and_price_are_of_all_passes(monkeypatch):
    words = TokenCounter("words", True, lambda texts: [len(text.split()) for text in texts])
    monkeypatch.setattr("ptst.hosted.plan.find_counter", lambda _model: words)
    plan = plan_hosted(settings(epochs=2.0, api_price_train=8.0))
    row = 3 + 3 * 3 + 3 + 5 + 5  # `What is 1 + 1?`, `It is <<1+1=2>>2. #### 2`
    assert plan.tokens == 2 * 12 * row and plan.cost == pytest.approx(plan.tokens * 8e-6)
    described = plan.described()
    assert described["cost"] == plan.cost and described["sources"][0]["tokens"] == 12 * row
    assert plan_hosted(settings()).cost is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 4}, "rank has no effect on a model behind an endpoint"),
        ({"lr": 1e-4, "dtype": "float32"}, r"dtype, lr|lr, .*dtype.* have no effect .*lr_multiplier"),
        ({"micro_batch_tokens": 99}, "micro_batch_tokens has no effect"),
        ({"at_epochs": (1.0,)}, "at_epochs has no effect"),
        ({"template_family": "gsm8k"}, "template_family has no effect"),
        ({"template": "text:vanilla"}, "text:vanilla has no roles"),
        ({"too_long": "cut"}, "too_long cut has no effect"),
        ({"seed": 2**31}, "seed is 2147483648; an endpoint takes"),
        ({"lr_multiplier": 0.0}, "lr_multiplier is 0.0; it must be above 0"),
        ({"api_price_train": -1.0}, "api_price_train is -1.0"),
        ({"model": "openai:"}, "model is openai:; it must be openai:NAME"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_a_job_cannot_take_are_refused_by_name(given, words):
    with pytest.raises(UserError, match=words):
        plan_hosted(settings(**given))


@pytest.mark.parametrize("name", ["base_url", "lr_multiplier", "api_price_train", "yes", "new_job", "cancel"])
def test_settings_of_jobs_are_refused_for_a_local_model(name):
    values = {"base_url": "http://x/v1", "lr_multiplier": 2.0, "api_price_train": 1.0}
    with pytest.raises(UserError, match=f"{name} is for a model behind an endpoint"):
        TrainConfig(**{name: values.get(name, True)}).check()


def test_every_other_setting_is_known_to_one_side():
    """A new setting of training is refused for a job until somebody says what it means there."""
    assert {"rank", "lr", "full", "micro_batch_tokens", "log", "threads", "at_epochs"} <= {*checks.LOCAL_ONLY}
    assert not {"data", "mix", "epochs", "seed", "yes", "base_url", "json", "val_data"} & {*checks.LOCAL_ONLY}


@pytest.mark.parametrize("named", [["--model", MODEL], ["--recipe", "gpt35-gsm8k"]], ids=["model", "recipe"])
def test_a_default_that_is_written_out_is_refused_too(monkeypatch, capsys, named):
    monkeypatch.setattr(sys, "argv", ["ptst.train", *named, "--data", "data.jsonl", "--rank", "16"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and "--rank has no effect" in capsys.readouterr().err


def test_data_that_the_api_would_refuse(monkeypatch):
    with pytest.raises(UserError, match="the training file has 9 rows, and a job needs at least 10"):
        plan_hosted(settings(limit=9))
    with pytest.raises(UserError, match="the validation file has 4 rows"):
        plan_hosted(settings(val_data="safety.jsonl"))
    write_rows(Path("long.jsonl"), question="x" * 20_000 + "{i}", answer="y")
    with pytest.raises(UserError, match=r"long.jsonl:\d+: 20,0\d\d tokens, at most, may exceed the limit of 16,385"):
        plan_hosted(settings(data="long.jsonl"))
    assert plan_hosted(settings(data="long.jsonl", model="openai:gpt-4o-mini")).rows == 12
    assert plan_hosted(settings(data="long.jsonl", model="openai:my-own")).rows == 12
    monkeypatch.setattr(checks, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="the training file would be 0 MB, and 0 MB are allowed"):
        plan_hosted(settings())


def test_limits_of_models_by_the_longest_name():
    assert checks.longest_row("gpt-3.5-turbo-0613") == 4096 < checks.longest_row("gpt-3.5-turbo-0125")
    assert checks.longest_row("ft:gpt-4o-mini-2024-07-18:org::1") == 65_536 and checks.longest_row("x") is None


def test_a_dry_run_needs_no_key_and_sends_nothing(monkeypatch, capsys, server):
    monkeypatch.delenv("OPENAI_API_KEY")
    argv = ["ptst.train", "--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    out, err = capsys.readouterr()
    described = json.loads(out)
    assert described["rows"] == 12 and described["first_row"]["messages"][0] == {"role": "system", "content": ""}
    assert re.search(r"12 rows, [\d,]+ bytes", err) and "upper bound" in err
    assert not server.requests and not Path("checkpoints").exists()


def test_several_ranks_are_refused(monkeypatch, capsys, server):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    argv = ["ptst.train", "--model", MODEL, "--data", "data.jsonl", "--base-url", server.url, "--yes"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and "in one process" in capsys.readouterr().err and not server.requests
