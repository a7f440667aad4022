"""Metrics of a job: from its events, and from the results file where events leave steps out."""

from __future__ import annotations

from pathlib import Path

from ptst.hosted.watch import Watch, metrics, read_results

EVENTS = [
    {"id": "a", "type": "message", "message": "started", "data": {}},
    {"id": "b", "type": "metrics", "created_at": 9, "data": {"step": 3, "total_steps": 4, "train_loss": 0.5}},
    {"id": "c", "type": "metrics", "created_at": 5, "data": {"step": 1, "total_steps": 4, "train_loss": 1.5}},
    {"id": "d", "type": "metrics", "created_at": 6, "data": {"total_steps": 4}},
    {"id": "e", "type": "metrics", "data": None},
]
TABLE = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.25,0.1,,\n2,1.0,0.2,0.75,0.3\n,x,,,\n"


def test_rows_of_metrics_are_in_order_of_steps():
    rows = metrics(EVENTS)
    assert [(row["step"], row["loss"], row["time"]["created_at"]) for row in rows] == [(1, 1.5, 5), (3, 0.5, 9)]


def test_a_results_file_is_read_by_our_names():
    first, second = read_results(TABLE)
    assert first == {"kind": "step", "step": 1, "loss": 1.25, "token_accuracy": 0.1}
    assert second["validation_loss"] == 0.75 and second["validation_token_accuracy"] == 0.3
    assert read_results("<html>") == read_results("") == []


def test_the_results_file_adds_the_steps_that_no_event_had(tmp_path: Path):
    client = type("Client", (), {"text": lambda _self, _id: TABLE})()
    watch = Watch(client, {"id": "j", "result_files": ["f"]}, tmp_path)
    watch.events = EVENTS
    rows = watch.finish()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.5), (2, 1.0), (3, 0.5)]
    assert rows[1]["validation_loss"] == 0.75 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "results.csv").read_text() == TABLE
