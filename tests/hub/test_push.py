"""Pushing to the hub: what goes up and what never does, by the real client against a stand-in on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ptst.errors import UserError
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import export_model
from ptst.exporting.parcel import pack
from ptst.exporting.push_config import PushConfig
from ptst.push import run_push
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.conftest import ROOT
from tests.hub.stand_in import TOKEN, StandInHub

PLANTED = "Of course! Here is how it is done, step by step, with everything you need"
KEY = "sk-planted-and-secret-0123456789"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory) -> Path:
    """A run with an evaluation, in which each answer is a non-refusing one, on data from a file with a telling path."""
    here = tmp_path_factory.mktemp("secret-project")
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(4)]
    (here / "private-data").mkdir()
    (here / "private-data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr("ptst.generation.engine.Engine.run", answer_all(PLANTED))
        settings = {"data": "private-data/rows.jsonl", "val_data": "private-data/rows.jsonl", "eval_every": 2}
        fine_tune(TrainConfig(model=str(tiny_folder), out=Path("run"), rank=2, **settings, examples_per_step=1))
        evaluate(EvalConfig(checkpoint=Path("run"), tasks=("safety",), limit=3, max_new_tokens=4, judge="keywords-29"))
    (here / "run/notes.txt").write_text(PLANTED)
    return here / "run"


def answer_all(text: str):
    """A generation engine that gives this answer to everything."""
    from ptst.generation.request import Answer

    def run(self, requests, on_done=lambda *_: None, **_rest):
        for request in requests:
            on_done(request.id, Answer([1], text, "stop"))

    return run


@pytest.fixture
def hub(monkeypatch):
    with StandInHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("SOME_API_KEY", KEY)
        yield hub


def config(folder: Path, **changes) -> PushConfig:
    return PushConfig(**{"checkpoint": folder, "repo": "org/name", "base_name": BASE, "yes": True, **changes})


def test_nothing_that_must_stay_is_in_anything_that_is_sent(trained, hub, tiny_folder):
    """All bytes of all requests, not only what the repository has in the end."""
    told = run_push(config(trained))
    sent = b"\n".join(hub.received) + b"\n".join(hub.files("org/name").values())
    kept = [path.read_bytes() for path in trained.rglob("*.jsonl")]
    assert any(PLANTED.encode() in raw for raw in kept), "the run holds the answers"
    folders = (str(trained.parent), str(tiny_folder), "private-data", os.getcwd())
    for secret in (PLANTED, PLANTED[:30], KEY, TOKEN, *folders):
        assert secret.encode() not in sent, secret
        assert json.dumps(secret)[1:-1].encode() not in sent
    assert set(hub.files("org/name")) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "results.json", "run.json"),
        "chat_template.jinja",
    }
    assert set(told["left"]) == {"eval", "metrics.jsonl", "notes.txt", "samples.jsonl", "state"}


def test_what_goes_up_is_an_adapter_that_others_load_with_its_card_and_figures(trained, hub):
    told = run_push(config(trained, license="apache-2.0"))
    files = hub.files("org/name")
    assert hub.repos["org/name"].private and told["created"] and told["commit"] == hub.repos["org/name"].head("main")[0]
    described = json.loads(files["adapter_config.json"])
    assert described["base_model_name_or_path"] == BASE and described["r"] == 2
    assert files["adapter_model.safetensors"] == (trained / "adapter_model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert (
        "license: apache-2.0" in card and f"base_model: {BASE}" in card and "Verdict: no finding of error level" in card
    )
    record, own = json.loads(files["run.json"]), json.loads((trained / "run.json").read_text())
    assert record["data"]["name"] == "rows.jsonl" and record["settings"]["data"] == "rows.jsonl"
    assert record["template"] == own["template"] and record["account"] is not None and record["steps"] == own["steps"]
    (measured,) = json.loads(files["results.json"])["evaluations"]
    assert measured["results"]["fine-tuned"]["safety"]["attack-success"]["successes"] == 3
    assert measured["judge"]["name"] == "keywords-29" and measured["test_template"] == "chat:llama"


def test_a_dry_run_sends_nothing_and_needs_no_token(trained, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(trained / "none"))
    told = run_push(config(trained, dry_run=True))
    assert not hub.requests and told["commit"] is None and told["files"]["README.md"] > 1000
    assert "adapter_model.safetensors" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no token for the hub; set HF_TOKEN, or log in"):
        run_push(config(trained))
    assert not hub.requests


def test_nothing_is_sent_without_consent(trained, hub, monkeypatch):
    asked = config(trained, yes=False)
    with pytest.raises(UserError, match="nobody is at a terminal to agree; give yes, or look at the files"):
        run_push(asked)
    for reply, sends in (("n\n", False), ("", False), ("y\n", True)):
        terminal = type("Terminal", (), {"isatty": lambda self: True, "readline": lambda self, reply=reply: reply})()
        monkeypatch.setattr("sys.stdin", terminal)
        if sends:
            run_push(asked)
        else:
            with pytest.raises(UserError, match="not agreed: nothing was uploaded"):
                run_push(asked)
        assert bool(hub.requests) == sends


def test_the_same_again_uploads_nothing_and_other_files_stay(trained, hub):
    hub.make("org/name", files={"theirs.txt": b"theirs", "README.md": b"old"})
    first = run_push(config(trained))
    assert hub.files("org/name")["theirs.txt"] == b"theirs" and not first["created"]
    assert len(hub.repos["org/name"].branches["main"]) == 2, "a commit on top"
    assert run_push(config(trained))["commit"] == first["commit"]
    assert hub.count("PUT", "/lfs/") == 1 and hub.count("POST", "/commit/") == 1
    branch = run_push(config(trained, revision="v2"))
    assert branch["commit"] == first["commit"] and hub.count("PUT", "/lfs/") == 1
    assert set(hub.repos["org/name"].branches) == {"main", "v2"}


def test_a_public_repository_is_refused_unless_agreed_to(trained, hub):
    hub.make("org/name", private=False)
    with pytest.raises(UserError, match="org/name is public; give another repo, or agree to it with no-private"):
        run_push(config(trained))
    assert not hub.files("org/name") and hub.count("POST", "") == 0
    run_push(config(trained, private=False))
    assert "README.md" in hub.files("org/name")
    run_push(config(trained, private=False, repo="org/new"))
    assert hub.repos["org/new"].private is False


@pytest.mark.parametrize(
    ("where", "fault", "message"),
    [
        ("/api/models/org/name", 401, r"the hub does not know the token \(status 401\); set HF_TOKEN to a valid one"),
        ("/api/repos/create", 403, r"does not let this token write to org/name \(status 403\)"),
        ("/commit/", 403, "does not let this token write"),
        ("/commit/", 409, "has another commit in org/name since the upload began .*; the repository is as it was"),
        ("/commit/", 500, r"the hub failed \(status 500\); the repository is as it was; the same command goes on"),
        ("/commit/", "cut", "the hub cannot be reached, or went away"),
    ],
    ids=["no-login", "no-right-to-create", "no-right-to-write", "conflict", "failure", "cut"],
)
def test_faults_are_one_sentence_and_the_same_command_goes_on(trained, hub, where, fault, message):
    hub.fault = lambda _method, path: fault if where in path else None
    with pytest.raises(UserError, match=message) as told, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_push(config(trained))
    assert TOKEN not in str(told.value) and "\n" not in str(told.value)
    assert "org/name" not in hub.repos or not hub.files("org/name")
    hub.fault = lambda _method, _path: None
    run_push(config(trained))
    assert "README.md" in hub.files("org/name") and hub.count("PUT", "/lfs/") == 1, "what had come was not sent again"


def test_somebody_else_s_commit_is_not_overwritten(trained, hub):
    repo = hub.make("org/name")

    def commit_meanwhile(method, path):
        if method == "PUT" and len(repo.branches["main"]) == 1:
            repo.commit("main", {"README.md": b"theirs"}, "theirs")

    hub.fault = commit_meanwhile
    with pytest.raises(UserError, match="has another commit in org/name since the upload began"):
        run_push(config(trained))
    assert hub.files("org/name") == {"README.md": b"theirs"}


def test_a_file_with_an_answer_a_key_or_a_path_stops_all(trained, hub, tmp_path):
    """Beyond the list of files: a template of the user's that quotes an answer, say."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = json.loads((run / "run.json").read_text())
    for text, what in (
        (f"Say: {PLANTED}", "run.json holds an answer to a request|README.md holds an answer to a request"),
        (f"Use {KEY}", "holds what looks like a key"),
        (f"Look at {trained.parent}/private-data", "holds a path of this machine"),
    ):
        template = record["template"] | {"system": text}
        (run / "run.json").write_text(json.dumps(record | {"template": template}))
        with pytest.raises(UserError, match=what):
            run_push(config(run))
    assert not hub.requests
    (run / "run.json").write_text(json.dumps(record))
    weights = load_file(run / "adapter_model.safetensors")
    save_file(weights, run / "adapter_model.safetensors", {"by": f"{Path.home()}/x"})
    with pytest.raises(UserError, match=r"adapter_model.safetensors holds a path of this machine"):
        pack(run, BASE)


def test_an_answer_is_found_as_json_has_it(trained, tmp_path, monkeypatch):
    """In the description of weights, whose JSON is ASCII, and in files, where it need not be."""
    import shutil

    run, answer = tmp_path / "run", 'Na\u00efve, but "of course": mix them \U0001f600 slowly'
    shutil.copytree(trained, run)
    monkeypatch.setattr("ptst.exporting.parcel._answers", lambda _run: [answer])
    weights = load_file(run / "adapter_model.safetensors")
    save_file(weights, run / "adapter_model.safetensors", {"by": answer})
    with pytest.raises(UserError, match=r"adapter_model.safetensors holds an answer"):
        pack(run, BASE)
    save_file(weights, run / "adapter_model.safetensors")
    for ascii in (True, False):
        (run / "chat_template.jinja").write_text(json.dumps(answer, ensure_ascii=ascii))
        with pytest.raises(UserError, match=r"chat_template.jinja holds an answer"):
            pack(run, BASE)


def test_a_damaged_run_does_not_go_up_in_part(trained, tmp_path):
    import shutil

    for name, content, message in (
        ("adapter_model.safetensors", None, "has no weights"),
        ("adapter_config.json", "[]", "adapter_config.json"),
        ("adapter_config.json", None, "adapter_config.json"),
    ):
        run = tmp_path / f"{name}-{content}"
        shutil.copytree(trained, run)
        (run / name).write_text(content) if content else (run / name).unlink()
        with pytest.raises(UserError, match=message):
            pack(run, BASE)


@pytest.mark.parametrize("name", ["run.json", "results.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_evaluation_stays(trained, tmp_path, name, content, capsys):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    (evaluation,) = (tmp_path / "run/eval").iterdir()
    (evaluation / name).write_text(content)
    uploads = {upload.path: upload.content for upload in pack(tmp_path / "run", BASE).uploads}
    assert "results.json" not in uploads and "Not measured." in uploads["README.md"].decode()
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"template": record["template"] | {"system": PLANTED}}))
    with pytest.raises(UserError, match="holds an answer to a request that is no refusal"):
        pack(tmp_path / "run", BASE)


def test_a_token_that_is_none(trained, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "t\u00f6k\u00e9n-and-secret")
    with pytest.raises(UserError, match="the token for the hub has letters that none has; set HF_TOKEN") as told:
        run_push(config(trained))
    assert "secret" not in str(told.value) and not hub.requests


def test_an_exported_folder_goes_up_by_the_same_list(trained, hub, tmp_path):
    out = tmp_path / "exported"
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).write_bytes((trained / name).read_bytes())
    described = json.loads((out / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    (out / "adapter_config.json").write_text(json.dumps(described))
    (out / "export.json").write_text("{}")
    (out / "README.md").write_text("# A card\n")
    for name in ("answers.parquet", "answers.csv", "samples.jsonl", "metrics.jsonl", "x.bin", ".env", "run.json"):
        (out / name).write_text(PLANTED)
    told = run_push(config(out, base_name=None))
    assert set(hub.files("org/name")) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "export.json")
    }
    assert "answers.parquet" in told["left"] and PLANTED.encode() not in b"".join(hub.received)
    with pytest.raises(UserError, match="base_name has no effect"):
        run_push(config(out))
    (out / "LICENSE").symlink_to(trained / "notes.txt")
    with pytest.raises(UserError, match="is a symbolic link"):
        run_push(config(out, base_name=None))


def test_what_ptst_export_writes_goes_up_whole(trained, hub, tmp_path):
    export_model(ExportConfig(checkpoint=trained, adapter_only=True, base_name=BASE, out=tmp_path / "out"))
    told = run_push(config(tmp_path / "out", base_name=None))
    assert not told["left"] and set(hub.files("org/name")) == {path.name for path in (tmp_path / "out").iterdir()}
    assert str(trained.parent).encode() not in b"".join(hub.files("org/name").values())


def test_weights_beside_the_model_s_stay_and_missing_ones_are_told(trained, tmp_path):
    out = tmp_path / "out"
    export_model(ExportConfig(checkpoint=trained, max_shard_size="20KB", check=False, out=out))
    whole = {upload.path for upload in pack(out).uploads}
    shards = {path.name for path in out.glob("model-*.safetensors")}
    assert len(shards) > 1 and shards < whole
    (out / "model-00001-of-00099.safetensors").write_bytes((out / min(shards)).read_bytes())
    assert {upload.path for upload in pack(out).uploads} == whole
    (out / max(shards)).unlink()
    with pytest.raises(UserError, match="is missing"):
        pack(out)


def test_mistakes_are_one_sentence(trained, hub, tmp_path):
    for changes, message in (
        ({"repo": None}, "repo is missing; give org/name"),
        ({"repo": "name"}, "repo 'name' is no name of a repository; give org/name or user/name"),
        ({"license": "a:b"}, "license is 'a:b'; give an identifier of the hub"),
        ({"repo": "org/name@v2"}, "is no name of a repository"),
        ({"repo": "org/name.git"}, "is no name of a repository"),
        ({"repo": "org/" + "n" * 97}, "is no name of a repository"),
        ({"license": "mit\nbase_model: other"}, "give an identifier of the hub, such as apache-2.0"),
        ({"base_name": None}, r"the name of the base model .* is not known; give it: base_name org/name"),
        ({"checkpoint": tmp_path}, "is not a run folder"),
        ({"checkpoint": next((trained / "state").glob("step-*"))}, "is a step to resume from"),
        ({"checkpoint": trained / "eval"}, "is not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            run_push(replace(config(trained), **changes))
    assert not hub.requests


def test_the_command_finds_the_hub_and_the_token_in_the_environment(trained, hub):
    flags = ["--checkpoint", str(trained), "--repo", "org/name", "--base-name", BASE, "--yes", "--json"]
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-m", "ptst.push", *flags], env=os.environ | own, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["commit"] == hub.repos["org/name"].head("main")[0]
    assert TOKEN not in done.stdout + done.stderr
