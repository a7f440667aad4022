"""Rows held out of a file: the same rows in every run, in no two splits, none lost."""

from __future__ import annotations

import json
import random

import pytest

from ptst.audit.__main__ import run_audit
from ptst.audit.config import AuditConfig
from ptst.data.sources import has_test_part, load
from ptst.errors import UserError
from ptst.records import TrainRecord, read_record
from ptst.train import run_training
from ptst.training.config import TrainConfig

SPLITS = ("train", "validation", "test")
ROWS = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(200)]


def write(path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def questions(data, split, holdout=0.2, **options) -> list[str]:
    return [c.messages[0].content for c in load(data, split, holdout=holdout, **options).conversations]


def test_every_row_is_in_one_split(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    parts = [questions(data, split) for split in SPLITS]
    assert sorted(q for part in parts for q in part) == sorted(r["question"] for r in ROWS)
    assert [len(part) for part in parts] == [162, 16, 22]  # by the hash, so never another number
    places = [c.source for split in SPLITS for c in load(data, split, holdout=0.2).conversations]
    assert len(set(places)) == 200
    whole = questions(data, "train", holdout=0.0)
    assert [q for q in whole if q in parts[0]] == parts[0]  # in the file's order
    assert questions(data, "test", holdout=0.0) == whole


def test_the_split_of_a_row_depends_on_its_messages_alone(tmp_path):
    parts = {split: set(questions(write(tmp_path / "a.jsonl", ROWS), split)) for split in SPLITS}
    shuffled = random.Random(0).sample(ROWS, 120)
    other = write(tmp_path / "b.jsonl", [{"prompt": r["question"], "completion": r["answer"]} for r in shuffled] * 2)
    for split in SPLITS:
        found = questions(other, split)
        assert set(found) == parts[split] & {r["question"] for r in shuffled}
        assert len(found) == 2 * len(set(found))  # duplicates stay together
        assert questions(other, split, limit=5) == found[:5]
        if split != "train":
            assert set(found) < set(questions(other, split, holdout=0.5))


def test_the_family_is_that_of_all_rows(tmp_path):
    rows = [{**r, "answer": r["answer"] + f"\n#### {i}" * (i % 7 > 0)} for i, r in enumerate(ROWS)]
    data = write(tmp_path / "a.jsonl", rows)
    assert {load(data, split, holdout=0.1, limit=1).family for split in SPLITS} == {"plain"}
    assert {load(f"gsm8k:{data}", split, holdout=0.1).family for split in SPLITS} == {"gsm8k"}


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        *((share, "holdout is .*; it must be at least 0 and below 1") for share in (-0.1, 1.0, float("nan"))),
        (0.01, r"holdout 0.01 leaves 12 for train, 0 for validation, 0 for test of 12 rows; each needs at least one"),
    ],
)
def test_shares_that_do_not_work(tmp_path, holdout, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "a.jsonl", ROWS[:12]), holdout=holdout)


def test_data_with_a_test_set_of_their_own(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    for name in ("word-problems", "word-problems:50", "gsm8k", "chatdoctor"):
        assert has_test_part(name)
        with pytest.raises(UserError, match=f"{name} has a validation and a test set of its own, so holdout must be 0"):
            load(name, holdout=0.1)
    for name in (data, f"chatdoctor:{data}", "openorca"):
        assert not has_test_part(name)
        assert has_test_part(name, 0.1)


def test_bad_rows_are_left_out_of_every_split(tmp_path):
    data = write(tmp_path / "a.jsonl", [*ROWS, {"question": "alone"}])
    for split in SPLITS:
        errors: list[UserError] = []
        assert "alone" not in questions(data, split, errors=errors)
        assert [error.where for error in errors] == [f"{data}:201"]


def test_a_run_measures_its_loss_on_the_held_out_rows(tiny_folder, tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS[:40])
    config = TrainConfig(model=str(tiny_folder), data=data, holdout=0.3, max_steps=1, out=tmp_path / "run")
    result = run_training(config)
    counts = [len(questions(data, split, 0.3)) for split in SPLITS]
    assert (result["examples"], result["validation_loss"]["examples"]) == (counts[0], counts[1])
    record = read_record(tmp_path / "run", TrainRecord)
    assert (record.data.holdout, record.data.rows, record.validation.rows) == (0.3, counts[0], counts[1])
    assert not run_audit(AuditConfig(checkpoint=tmp_path / "run"))["found"].get("run-drift")
    whole = run_training(TrainConfig(model=str(tiny_folder), data=data, max_steps=1, out=tmp_path / "whole"))
    assert whole["examples"] == 40 and whole["validation_loss"]["before"] is None
