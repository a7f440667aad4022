"""Nothing in data, names or answers commands the terminal or is taken for markup, a formula or HTML."""

from __future__ import annotations

import csv
import io
import json
import signal
import tomllib
from dataclasses import replace

import pytest
from rich.table import Table

from ptst import cli, progress
from ptst.audit.__main__ import print_report
from ptst.audit.config import AuditConfig
from ptst.audit.output.page import page
from ptst.audit.report import audit_data
from ptst.config_file import to_toml
from ptst.experiment.tables import to_csv
from ptst.progress import ProgressLine, open_console, printable, printable_json, say
from ptst.settings import CommandSettings
from tests.tiny import write_tiny_model

EVIL = "\x1b]0;title\x07\x1b[2J\x9b1m\x08\r\u202e[/red][bold]:smile:"
SHOWN = "U+001B]0;titleU+0007U+001B[2JU+009B1mU+0008U+000DU+202E[/red][bold]:smile:"


def assert_harmless(text: str) -> None:
    assert not [c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e")], repr(text)


def test_what_is_printable_stays():
    text = "a\tb\n\u00e9 \u4e2d \U0001f469\u200d\U0001f52c \u05d0 [x] $"
    assert printable(text) == text
    assert printable(EVIL) == SHOWN
    assert printable("\ud800").encode() == b"U+D800"  # a lone surrogate cannot be encoded
    assert printable("a\u200bb\ufeff c\u200dd \U000e0041\u2066") == "aU+200BbU+FEFF cU+200Dd U+E0041U+2066"


def test_settings_as_toml_command_no_terminal():
    template = f"{EVIL}\u200b\x7f\U000e0041\u00e9"
    text = to_toml(replace(AuditConfig(), data=template))
    assert_harmless(text)
    assert tomllib.loads(text)["data"] == template and "\u00e9" in text


def test_json_commands_no_terminal():
    value = {f"k{EVIL}": [f"{EVIL}\u200b\U000e0041\n\u00e9", 1]}
    text = printable_json(value)
    assert_harmless(text)
    assert json.loads(text) == value and "\u200b" not in text and "\u00e9" in text


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 200 columns gets, rich's own sequences included."""
    out = io.StringIO()
    console = open_console(file=out, width=200, force_terminal=False, soft_wrap=True)
    monkeypatch.setattr(progress, "console", console)
    return out


def test_progress_tables_and_sentences(terminal):
    say(EVIL)
    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    progress.console.print(table)
    with ProgressLine(EVIL, 2) as line:
        line.update(2, EVIL)
    with pytest.raises(SystemExit):
        cli._fail("ptst", EVIL)
    assert_harmless(terminal.getvalue())
    assert terminal.getvalue().count("U+001B]0;title") == 8


def test_a_bar_on_a_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(ProgressLine, "_outer", None)  # whatever a test before this one has left open
    monkeypatch.setattr(progress, "console", open_console(file=out, width=200, force_terminal=True))
    with ProgressLine(EVIL, 2) as line:
        line.update(2, EVIL)
    assert "]0;title\x07" not in out.getvalue()
    assert "[/red][bold]" in out.getvalue()  # and no MarkupError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("[") / "a[/b"
    folder.mkdir(parents=True)
    write_tiny_model(folder)
    data = folder / "evil\x1b[1m[/red].jsonl"
    data.parent.mkdir()
    rows = [{"question": f"q {EVIL}", "answer": f"a {EVIL}<script>"}, {EVIL: "x"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return audit_data(AuditConfig(model=str(folder), data=str(data), test_template="chat:llama"))


def test_the_audit(report, capsys):
    print_report(report)
    out = capsys.readouterr().out
    assert_harmless(out)
    assert "[/red]" in out and "U+001B]0;title" in out.replace("\n", "")


def test_the_audits_page_and_json(report):
    html = page(report)
    assert html.count("<script") == 2  # the page's own: its script, and the findings as data
    assert_harmless(html)
    assert ">&lt;</span>" in html and "><</span>" not in html  # a token
    assert "\x1b]0;title" in report.to_json()["comparison"]["training"]  # a file stays as it is


def test_a_users_mistake_with_a_name_of_its_own(monkeypatch, capsys, terminal):
    def command(_config):
        raise OSError(f"{EVIL} is no file")

    monkeypatch.setattr("sys.argv", ["ptst"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        cli.run(command, CommandSettings, "train")
    signal.signal(signal.SIGINT, before)
    assert_harmless(terminal.getvalue())
    assert "[/red][bold]:smile: is no file" in terminal.getvalue()


def test_json_with_a_name_that_is_not_utf_8(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ptst", "--json"])
    before = signal.getsignal(signal.SIGINT)
    cli.run(lambda _config: {"name": "\u00e9\udcff"}, CommandSettings, "train")
    signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    assert out.encode() == b'{"name": "\xc3\xa9\\udcff"}\n' and json.loads(out)["name"] == "\u00e9\udcff"


def test_cells_of_a_csv_are_no_formulas():
    figures = {"mean": -0.5, "runs": [1], "interval95": [-1.0, 2.0]}
    names = ("=1+1", "+a", "-a", "@a", "\ta", "\ra")
    cell = {"test": "chat:a", "epochs": None, "defense": "none", "tasks": {"t": {"-m": figures}}}
    cells = [{"train": n, **cell} for n in names]
    rows = list(csv.DictReader(io.StringIO(to_csv({"cells": cells}), newline="")))
    assert [row["train"] for row in rows] == [f"'{name}".replace("\r", "\n") for name in names]
    assert {(row["test"], row["metric"], row["mean"], row["low"]) for row in rows} == {
        ("chat:a", "'-m", "-0.5", "-1.0")
    }
