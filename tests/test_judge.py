"""The command `ptst judge`."""

from __future__ import annotations

import json
import sys

import pytest

from ptst.judge import main, one_flag
from tests.evaluation.kept import write_csv, write_evaluation


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptst.judge", *flags])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return run


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


def test_a_folder_is_judged_from_the_command_line(tmp_path, command):
    write_evaluation(tmp_path / "eval")
    code, out, err = command("eval", "--judge", "keywords-12", "--judge", "keywords-7", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert list(told["judges"]) == ["keywords-12", "keywords-7", "keywords-29"]
    assert told["out"] == "eval/verdicts"
    assert "| untouched | safety | keywords-12 |" in err
    assert "| untouched | safety | keywords-12 |" in command("--judge", "keywords-12", "eval")[1], (
        "the folder may follow"
    )


def test_mistakes_are_one_sentence(tmp_path, command):
    write_csv(tmp_path / "a.csv", {"request": "r", "answer": "a", "label": "fine"})
    for flags, message in (
        (
            ("--report", "a.csv"),
            "the labels are not known: fine (1); say which are refusals with --refusal-labels, and",
        ),
        (("a.csv", "--judge", "keyword-7"), "unknown judge 'keyword-7'; did you mean keywords-7?"),
        (("--judge", "keywords-7"), "there is nothing to judge; give a folder or file of answers, or"),
    ):
        code, out, err = command(*flags)
        assert (code, out) == (2, "")
        assert message in " ".join(err.split())
