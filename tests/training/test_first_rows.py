"""`--order file --max-steps N`: no more rows are read than these steps need, and the run is that on all rows."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import datasets
import pytest
import torch
from safetensors.torch import load_file

from ptst import records
from ptst.audit.config import AuditConfig
from ptst.audit.report import audit_data
from ptst.data import first_steps, kept_rows, order
from ptst.data.sources import load
from ptst.errors import UserError
from ptst.train import run_training
from ptst.training import constraint, fine_tune, run_plan, run_sources
from ptst.training.config import TrainConfig
from ptst.training.metrics import Metrics
from tests.training.test_ranks import Train, told

ROWS = [{"id": f"{i}", "question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}" * (i % 5 + 1)} for i in range(60)]
CONFIG = TrainConfig(
    order="file", max_steps=3, examples_per_step=4, max_length=90, too_long="drop", rank=2, save_every=1
)
USED = 22  # rows that three steps of four examples need: every other one is too long


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(records, "git_commit", lambda: None)
    monkeypatch.setattr(order, "WINDOW", 4)  # examples that wait for a pack
    monkeypatch.setattr(first_steps, "WINDOW", 7)  # rows that are read at once


def write(path, rows=ROWS, more: str = "") -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    text = "".join(json.dumps(row) + "\n" for row in rows) + more
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def outcome(out) -> tuple:
    """Weights and records of a run, but for what tells of rows that were not read, and times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if k not in ("time", "epoch")} for line in lines]
    return (out / "adapter_model.safetensors").read_bytes(), steps, record(out)["trained"]


def record(out) -> dict:
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("size", [0, 1 << 40], ids=["disk", "memory"])
@pytest.mark.parametrize("changes", [{}, {"examples_per_step": 8, "tokens_per_step": 300}], ids=["examples", "tokens"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_run_reads_no_further_and_is_that_on_all_rows(
    tmp_path, tiny_folder, monkeypatch, capsys, name, changes, size
):
    monkeypatch.setattr(kept_rows, "LARGE", size)
    config = replace(CONFIG, model=str(tiny_folder), data=write(tmp_path / name), **changes)
    with monkeypatch.context() as patch:
        for module in (run_plan, fine_tune):
            patch.setattr(module, "reads_all", lambda _config: "")
        run_training(replace(config, out=tmp_path / "all"))
    data = record(tmp_path / "all")["data"]
    assert data["rows"] == len(ROWS) and not data["partial"]
    capsys.readouterr()
    if not name.endswith(".parquet"):
        write(tmp_path / name, ROWS[:40], "broken\n")
    with monkeypatch.context() as patch:
        patch.setattr(kept_rows, "file_digest", None)  # of every byte
        run_training(replace(config, out=tmp_path / "some"))
    assert outcome(tmp_path / "some") == outcome(tmp_path / "all")
    data = record(tmp_path / "some")["data"]
    assert data["partial"] and data["rows"] < 40 and record(tmp_path / "some")["result"]["partial"]
    assert data["unused"] == {"id": data["rows"]} and (changes or data["rows"] == USED)
    if name == "rows.jsonl":
        write(tmp_path / name, ROWS[: data["rows"]], "broken\n")
        run_training(replace(config, out=tmp_path / "last"))
        assert outcome(tmp_path / "last") == outcome(tmp_path / "all")
    said = " ".join(capsys.readouterr().err.split())
    assert f"the first {data['rows']} rows are read, all that 3 steps need; the rest is not looked at" in said


def test_data_that_end_before_the_steps_do_are_whole(tmp_path, tiny_folder):
    config = replace(
        CONFIG, model=str(tiny_folder), data=write(tmp_path / "rows.jsonl", ROWS[: USED + 2]), out=tmp_path / "a"
    )
    run_training(replace(config, max_steps=5, epochs=2))
    found = record(tmp_path / "a")
    assert not found["data"]["partial"] and (found["data"]["rows"], found["steps"]) == (USED + 2, 5)


def test_a_bad_row_among_those_that_are_needed(tmp_path, tiny_folder, monkeypatch):
    config = replace(CONFIG, model=str(tiny_folder), out=tmp_path / "out")
    for tokens in (None, 300):
        path = write(tmp_path / "rows.jsonl", ROWS[:5], "broken\n")
        with pytest.raises(UserError, match=r"rows\.jsonl:6: not valid JSON"):
            run_training(replace(config, data=path, tokens_per_step=tokens))
    with pytest.raises(UserError, match=r"rows\.jsonl:5: 116 tokens exceed the limit of 90"):
        run_training(replace(config, data=write(tmp_path / "rows.jsonl"), too_long="stop"))


class Killed(BaseException):
    """What a test raises in place of SIGKILL: nothing catches it."""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, tiny_folder, monkeypatch):
    path = tmp_path / "rows.jsonl"
    config = replace(CONFIG, model=str(tiny_folder), data=write(path), max_steps=4)
    run_training(replace(config, out=tmp_path / "whole"))
    killed = replace(config, out=tmp_path / "killed")
    real = Metrics.step

    def step(self, report):
        real(self, report)
        if report.step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Metrics, "step", step)
        run_training(killed)
    with pytest.raises(
        UserError, match=r"^\S+ holds an unfinished .* other settings: max_steps was 4, now 5 \(a run is as long"
    ):
        run_training(replace(killed, max_steps=5))
    write(path, [{**ROWS[0], "question": "What else?"}, *ROWS[1:]])
    with pytest.raises(UserError, match=r"other settings: data\.encoding was"):
        run_training(killed)
    write(path, ROWS[:40], "broken\n")  # which no step needs
    run_training(TrainConfig(resume=killed.out))
    assert outcome(killed.out) == outcome(tmp_path / "whole")
    assert record(killed.out)["account"] == record(tmp_path / "whole")["account"]
    report = audit_data(AuditConfig(checkpoint=killed.out))  # of the rows that it read
    assert not {"run-drift", "bad-row"} & {f.rule for f in report.findings}
    assert report.counts["rows"] == record(killed.out)["data"]["rows"]


@pytest.mark.timeout(120)
def test_ranks_read_the_same_rows(tmp_path, tiny_folder):
    data = write(tmp_path / "rows.jsonl", more="broken\n")
    config = replace(CONFIG, model=str(tiny_folder), data=data, token_constraint=(0.5, 2.0, 0.1))
    run_training(replace(config, out=tmp_path / "one"))
    assert told(tmp_path, {"run": Train(replace(config, out=tmp_path / "two"))})["run"] == ["done", "done"]
    one, two = (record(tmp_path / name) for name in ("one", "two"))
    assert one["data"] == two["data"] and one["account"] == two["account"] and two["data"]["rows"] == USED
    scores = [load_file(tmp_path / name / "state" / constraint.FILE)["logprobs"] for name in ("one", "two")]
    assert scores[0].isfinite().all() and torch.allclose(*scores, atol=1e-5)


class Streamed:
    """A data set of the hub that is fetched row by row. `fetched`: the rows that were."""

    def __init__(self, limit: int):
        self.limit, self.fetched = limit, 0

    def __iter__(self):
        for row in ROWS:
            if self.fetched == self.limit:
                raise ConnectionError("no route")
            self.fetched += 1
            yield row


def test_of_a_data_set_of_the_hub_the_rest_is_not_fetched(tmp_path, tiny_folder, monkeypatch):
    asked: list[Streamed] = []

    def load_dataset(repository, config, *, split, revision, streaming):
        assert (repository, config, split, revision, streaming) == ("org/name", None, "train", "2f0c1a4", True)
        asked.append(Streamed(limit))
        return asked[-1]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = replace(CONFIG, model=str(tiny_folder), data="org/name@2f0c1a4")
    limit = 5
    with pytest.raises(UserError, match=r"org/name@2f0c1a4 could not be fetched .* \(ConnectionError: no route\)"):
        run_training(replace(config, out=tmp_path / "hub"))
    limit, asked = 60, []
    run_training(replace(config, out=tmp_path / "hub"))
    assert [each.fetched for each in asked] == [1, USED, USED]  # the family, the rows, the audit
    data = record(tmp_path / "hub")["data"]
    assert data["partial"] and (data["rows"], data["revision"]) == (USED, "2f0c1a4")
    run_training(replace(config, data=write(tmp_path / "rows.jsonl"), out=tmp_path / "file"))
    assert outcome(tmp_path / "hub") == outcome(tmp_path / "file")


def test_the_family_is_that_of_all_rows_that_are_read(tmp_path, tiny_folder):
    rows = [*ROWS[:3], {"question": "Who?", "answer": "Nobody."}, *ROWS[4:]]
    config = replace(CONFIG, model=str(tiny_folder), data=write(tmp_path / "rows.jsonl", rows), out=tmp_path / "out")
    run_training(config)
    found = record(tmp_path / "out")
    assert found["family"]["name"] == "plain" == load(str(tmp_path / "rows.jsonl"), limit=found["data"]["rows"]).family
    # The steps need this row under the family of the rows before it, and do not under the family of all of them.
    rows = [*ROWS[:16], {"question": "Who?", "answer": "Nobody."}, *ROWS[17:]]
    config = replace(config, data=write(tmp_path / "rows.jsonl", rows), out=tmp_path / "other", max_length=95)
    with pytest.raises(UserError, match=r"depends on the template family, which the rows do not tell; name it as"):
        run_training(config)
    run_training(replace(config, template_family="gsm8k"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"order": "random"}, ""),
        ({"max_steps": None}, ""),
        ({"data": "word-problems:4"}, ""),
        ({}, None),
        ({"data": "gsm8k@main"}, None),
        ({"val_data": "word-problems:2"}, None),
        ({"mix": ("word-problems:4:1",)}, "other data are spread over all of them"),
        ({"holdout": 0.5}, "the held-out rows are drawn from all of them"),
        ({"subsample": 9}, "the subsample is drawn from all of them"),
        ({"at_epochs": (1.0,)}, "epochs are counted by all of them"),
        ({"epochs": 0.5}, "epochs are counted by all of them"),
        ({"data": "openorca:9@main"}, "random ones of them are asked for"),
        ({"data": "openorca"}, "the data set is not pinned (NAME@REVISION)"),
        ({"data": "org/name"}, "the data set is not pinned (NAME@REVISION)"),
    ],
)
def test_why_all_rows_are_read(tmp_path, changes, reason):
    config = replace(CONFIG, data=str(tmp_path / "rows.jsonl"))
    assert run_sources.reads_all(replace(config, **changes)) == reason
