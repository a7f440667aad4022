"""Run records and folders: what is read back, what makes two runs the same, and who may work in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ptst import records, runs, storage
from ptst.config_file import read_config
from ptst.errors import UserError
from ptst.records import DataRecord, LossRecord, RunRecord, TrainRecord, find_record, read_record
from ptst.settings import NO_EFFECT, CommandSettings
from ptst.text.templates import find_family, find_template
from ptst.training.config import TrainConfig


def data(name: str = "word-problems", **changes: Any) -> DataRecord:
    counts = dict.fromkeys(("rows", "examples", "dropped", "cut", "untrained", "token_boundaries", "lossy"), 0)
    values: dict[str, Any] = {"encoding": "ids", "tokens": 5, "trained_tokens": 3, **counts, **changes}
    return DataRecord(name=records.absolute(name), **values)


def a_record(config: TrainConfig | None = None, **changes: Any) -> TrainRecord:
    values: dict[str, Any] = {
        "model": "smollm2",
        "model_folder": "/models/smollm2",
        "weights": "w",
        "template": find_template("chat:llama"),
        "family": find_family("gsm8k"),
        "chat_format": "chatml",
        "data": data(),
        "dtype": "float32",
        "full": False,
        "micro_batch_tokens": 2048,
        "environment": {"threads": 1},
    }
    return TrainRecord(config=config or TrainConfig(), **values | changes)


def words(difference: list[tuple[str, ...]]) -> list[str]:
    return ["".join(parts) for parts in difference]


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    few_shot = next(t for t in map(find_template, ["text:alpaca", "chat:llama"]) if t)
    written = a_record(
        template=replace(few_shot, demonstration=("a", "b")),
        mix=(data("safety.jsonl", epochs=1.0),),
        validation=data(),
        validation_loss=LossRecord(before=1.0, after=None, examples=3),
        status="finished",
    )
    written.write(tmp_path)
    assert replace(read_record(tmp_path, TrainRecord), config=written.config) == written
    assert json.loads((tmp_path / "run.json").read_text())["version"] == records.VERSION
    assert records.read_finished(tmp_path).validation_loss == written.validation_loss


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("steps"), None),
        (lambda r: r.pop("weights"), "run.json: weights is missing"),
        (lambda r: r.pop("settings"), "run.json: settings is missing"),
        (lambda r: r["data"].pop("rows"), "run.json: data: rows is missing"),
        (lambda r: r.update(steps="3"), "run.json: steps: '3' is of the wrong type; a whole number is needed"),
        (lambda r: r["template"].update(safety=1), "run.json: template: safety: 1 is of the wrong type"),
        (lambda r: r.update(status="done"), "run.json: status: 'done' is of the wrong type; one of running, finished"),
        (lambda r: r.update(kind="eval"), "run.json: is the record of ptst.eval, not of ptst.train"),
        (lambda r: r.pop("kind"), "run.json: is not the record of a run"),
        (lambda r: r.update(version=9), "run.json: was made by a later version of ptst"),
        (lambda r: r.pop("version"), "run.json: was made by an earlier version of ptst .* or train again"),
    ],
)
def test_a_damaged_or_foreign_record_is_one_sentence(tmp_path, damage, message):
    written = a_record(status="finished").to_json()
    damage(written)
    path = tmp_path / "run" / "run.json"
    path.parent.mkdir()
    path.write_text(json.dumps(written))
    if message is None:
        assert read_record(path.parent, TrainRecord).steps is None
        return
    with pytest.raises(UserError, match=message):
        read_record(path.parent, TrainRecord)
    path.write_text(json.dumps(written)[:-20])
    with pytest.raises(UserError, match=r"run.json: is not valid JSON"):
        find_record(path.parent, TrainRecord)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"is not the record of a run"):
        read_record(path.parent, TrainRecord)
    path.write_text('{"kind": "train", "flags": {}}')
    with pytest.raises(UserError, match=r"no finished training run in .* \(.*an earlier version"):
        records.latest_run(tmp_path)


def test_what_makes_two_runs_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    old = a_record()
    same = (
        TrainConfig(out=Path("other"), save_every=3, keep=1, eval_every=2, log=("tensorboard",), resume=Path("x")),
        TrainConfig(model="elsewhere", data="rows.jsonl", template="llama", chat_format="chatml"),  # same content
        TrainConfig(micro_batch_tokens=512, activation_checkpointing="block"),
    )
    for config in same:
        assert not runs.differences(old, a_record(config, model_folder="/other", data=data("rows.jsonl"))), config
    assert runs.rounding(old, a_record(same[2], environment={"threads": 2})) == [
        *("micro_batch_tokens was 2048, now 512", "activation_checkpointing was none, now block"),
        "threads was 1, now 2",
    ]
    other = a_record(TrainConfig(model="other", lr=1.0, data="rows.jsonl"), weights="v", data=data(encoding="more"))
    assert words(runs.differences(old, other)) == [
        *("weights was w, now v", "data.encoding was ids, now more"),
        *("lr was 0.0005, now 1.0", "model was smollm2-135m-instruct, now other"),
        f"data was word-problems, now {tmp_path / 'rows.jsonl'}",
    ]
    with pytest.raises(UserError, match=r"run of other settings: lr was .*; give those, or another out") as caught:
        runs.check_same(tmp_path, old, a_record(TrainConfig(lr=1.0)))
    told = caught.value.tell(lambda setting: f"--{setting}")
    assert "--lr was 0.0005" in told and "another --out" in told


def test_a_setting_that_an_old_record_lacks_had_todays_default():
    old = a_record()
    del old.settings["lr"], old.settings["target_modules"]
    assert not runs.differences(old, a_record())
    assert words(runs.differences(old, a_record(TrainConfig(lr=1.0)))) == ["lr was 0.0005, now 1.0"]
    shared = SharedRecord(config=SharedConfig(), templates={}, environment={})
    del shared.settings["train"]
    other = SharedConfig(train=TrainConfig(lr=1.0))
    assert not runs.differences(shared, SharedRecord(config=SharedConfig(), templates={}, environment={}))
    changed = runs.differences(shared, SharedRecord(config=other, templates={}, environment={}))
    assert words(changed) == ["train.lr was 0.0005, now 1.0"]


WRONG = (None, "x", 0.5, [1], {"a": 1})


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "1", "{", "", "[" * 100_000, "1" * 5000, "\x00", '{"kind": []}'])
def test_a_file_that_is_no_record_is_one_sentence(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run.json: is not (the record of a run|valid JSON)"):
        read_record(tmp_path, TrainRecord)
    with pytest.raises(UserError, match=r"is not (valid JSON|an empty folder)"), runs.claim(tmp_path, a_record()):
        pass
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_value_of_any_wrong_type_is_no_traceback(tmp_path, value):
    """At every place of a record: it is refused, or it makes another run, or it has no effect."""
    losses = LossRecord(before=1.0, after=2.0, examples=3)
    train = a_record(status="finished", mix=(data(),), validation_loss=losses)
    for record in (train, SharedRecord(config=SharedConfig(), templates={"a": "1"}, environment={"versions": {}})):
        whole = json.dumps(record.to_json())
        for place in places(json.loads(whole)):
            owner = damaged = json.loads(whole)
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]] = value
            (tmp_path / "run.json").write_text(json.dumps(damaged))
            with suppress(UserError):
                old = read_record(tmp_path, type(record))
                runs.check_same(tmp_path, old, record)
                runs.rounding(old, record)


def places(value: Any, above: tuple = ()) -> list[tuple]:
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += [(*above, key), *places(inner, (*above, key))]
    return found


def test_paths_in_a_record_hold_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("a.jsonl", "t.toml"):
        (tmp_path / name).write_text("")
    config = TrainConfig(
        model="model", data="gsm8k:a.jsonl", mix=("a.jsonl:2", "word-problems:9:1"), out=Path("run"),
        template_file=Path("t.toml"), val_data="a.jsonl",
    )  # fmt: skip
    settings = a_record(config).settings
    here = str(tmp_path)
    assert settings["model"] == f"{here}/model"
    assert settings["data"] == f"gsm8k:{here}/a.jsonl"
    assert settings["mix"] == [f"{here}/a.jsonl:2", "word-problems:9:1"]
    grouped = SharedRecord(config=SharedConfig(train=config), templates={}, environment={}).settings["train"]
    assert grouped["val_data"] == f"{here}/a.jsonl"
    assert (settings["template_file"], settings["val_data"]) == (f"{here}/t.toml", f"{here}/a.jsonl")
    a_record(config).write(tmp_path)
    again = read_config(tmp_path / "run.json", TrainConfig(), "train")
    assert again.out is None and a_record(again).settings == settings | {"out": None}


def test_a_claim_is_new_resumed_or_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), runs.claim(out, a_record()) as run:
        assert not run.resumed and find_record(out, TrainRecord).status == "running"
        (out / ".x.json.1.partial").write_text("")
        with pytest.raises(UserError, match="in use by another process"), runs.claim(out, a_record()):
            pass
        raise KeyboardInterrupt
    other = a_record(TrainConfig(lr=1.0))
    with (
        pytest.raises(UserError, match=r"an unfinished ptst.train run of other settings: lr was"),
        runs.claim(out, other),
    ):
        pass
    with runs.claim(out, a_record()) as run:
        assert run.resumed and [p.name for p in out.glob(".*")] == [".lock"]
        run.finish({"steps": 3}, steps=3)
    record = records.read_finished(out)
    assert (record.status, record.steps, record.result) == ("finished", 3, {"steps": 3})
    assert record.time["seconds"] >= 0 and records.latest_run(tmp_path) == out
    with pytest.raises(UserError, match="is not an empty folder"), runs.claim(out, a_record()):
        pass


@pytest.mark.parametrize("begun", [True, False])
def test_what_another_process_did_before_the_folder_was_held_stays(tmp_path, monkeypatch, begun):
    if begun:
        a_record().write(tmp_path)
    lock = runs.exclusive_lock

    def late(folder):
        a_record(status="finished").write(folder)
        return lock(folder)

    monkeypatch.setattr(runs, "exclusive_lock", late)
    with pytest.raises(UserError, match="another process was at work"), runs.claim(tmp_path, a_record()):
        pass
    assert find_record(tmp_path, TrainRecord).status == "finished"


def test_an_unfinished_run_of_the_same_settings_is_found_again(tmp_path):
    def claimed(reuse: bool, **changes: Any) -> tuple[Path, bool]:
        with runs.claim(None, a_record(TrainConfig(**changes)), tmp_path, reuse=reuse) as run:
            return run.folder, run.resumed

    first, _ = claimed(True)
    assert claimed(True) == (first, True)
    second, resumed = claimed(True, lr=1.0)
    assert second != first and not resumed
    third, resumed = claimed(False)
    assert third not in (first, second) and not resumed
    with storage.exclusive_lock(third):
        assert claimed(True) == (first, True)
    (third / "run.json").write_text("{")
    assert claimed(True) == (first, True)


@dataclass(frozen=True, kw_only=True)
class SharedConfig(CommandSettings):
    templates: tuple[str, ...] = field(default=(), metadata=NO_EFFECT)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(kw_only=True)
class SharedRecord(RunRecord):
    kind: ClassVar[str] = "shared"
    templates: dict[str, Any] = field(metadata=records.GROWING)


def test_a_shared_folder_grows_and_never_changes(tmp_path):
    def record(config: SharedConfig | None = None, **templates: str) -> SharedRecord:
        config = config or SharedConfig(templates=tuple(templates))
        return SharedRecord(config=config, templates=templates, environment={})

    out = tmp_path / "grid"
    with runs.share(out, record(a="1")) as first, runs.share(out, record(b="2")) as second:
        assert (first.resumed, second.resumed) == (False, True)
        second.finish()
        first.finish()
    assert find_record(out, SharedRecord).templates == {"a": "1", "b": "2"}
    with runs.share(out, record(a="1", c="3")):
        assert find_record(out, SharedRecord).templates == {"a": "1", "b": "2", "c": "3"}
    with pytest.raises(UserError, match=r"other settings: templates.a was 1, now 9"), runs.share(out, record(a="9")):
        pass
    other = SharedConfig(train=TrainConfig(lr=1.0, keep=9))
    with pytest.raises(UserError, match=r"other settings: train.lr was 0.0005, now 1.0;"):
        runs.merged(out, record(other, a="1"))
    (tmp_path / "locked").mkdir()
    with storage.exclusive_lock(tmp_path / "locked"):  # what a lock leaves is nobody's work
        runs.merged(tmp_path / "locked", record())
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"is not a ptst.shared folder and not empty"):
        runs.merged(tmp_path / "used", record())
    assert not (tmp_path / "used" / "run.json").exists()


def test_locks_go_with_their_process(tmp_path):
    code = (
        f"import time; from ptst.storage import lock\nwith lock(__import__('pathlib').Path({str(tmp_path)!r}), 'a/b'):"
    )
    process = subprocess.Popen([sys.executable, "-c", f"{code} print(1, flush=True); time.sleep(60)"], stdout=-1)
    process.stdout.readline()
    with storage.lock(tmp_path, "a/b") as mine:
        assert not mine
    process.kill()
    with storage.lock(tmp_path, "a/b", wait=True) as mine:
        assert mine
    process.wait()


def test_records_need_no_torch():
    code = "import sys, ptst.runs, ptst.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
