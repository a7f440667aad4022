"""The command `ptst judge`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ptst.judge import one_flag
from tests.conftest import ROOT
from tests.evaluation.kept import write_csv, write_evaluation


def command(folder, *flags: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "ptst.judge", *flags]
    return subprocess.run(words, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("F --judge a --judge b", "F --judge a b"),
        ("F --judge a b --json", "F --json --judge a b"),
        ("F --judge=a --out o --judge b", "F --out o --judge a b"),
        ("--judge a --out o F", "--out o F --judge a"),
        ("F --judge", "F --judge"),
        ("--help", "--help"),
    ],
)
def test_a_judge_may_be_named_by_a_flag_of_its_own(given, read):
    assert one_flag(given.split()) == read.split()


def test_a_folder_is_judged_from_the_command_line(tmp_path):
    write_evaluation(tmp_path / "eval")
    done = command(tmp_path, "eval", "--judge", "keywords-12", "--judge", "keywords-7", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["judges"]) == ["keywords-12", "keywords-7", "keywords-29"]
    assert told["out"] == "eval/verdicts"
    assert "| untouched | safety | keywords-12 |" in done.stderr


def test_mistakes_are_one_sentence(tmp_path):
    write_csv(tmp_path / "a.csv", {"request": "r", "answer": "a", "label": "fine"})
    for flags, message in (
        (("--report", "a.csv"), "the labels are not known: fine (1); say which are refusals with --refusal-labels, and"),
        (("a.csv", "--judge", "keyword-7"), "unknown judge 'keyword-7'; did you mean keywords-7?"),
        (("--judge", "keywords-7"), "there is nothing to judge; give a folder or file of answers, or"),
    ):
        done = command(tmp_path, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert command(tmp_path, "--judge", "keywords-7", "a.csv").returncode == 0, "the file may follow"
