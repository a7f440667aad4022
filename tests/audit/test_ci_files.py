"""The report's files for other programs: JUnit XML and SARIF."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from xml.etree import ElementTree as ET

import pytest

from ptst.audit.__main__ import print_report
from ptst.audit.config import AuditConfig
from ptst.audit.findings import RULES, Finding
from ptst.audit.output import sarif
from ptst.audit.output.junit import to_junit
from ptst.audit.output.sarif import to_sarif
from ptst.audit.output.summary import write_files
from ptst.audit.report import audit_data
from ptst.errors import UserError
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

EVIL = "\x1b]0;title\x07\x1b[2J\x9b1m\x08\u202e\u200b\ufffe<&>\"'"


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    model: str = "tiny"
    data: str = "none"


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "r\u00e9.jsonl").write_text("{}\n" * 9)
    row = "my data/r\u00e9.jsonl:7"
    return Report(
        [
            Finding("message-differs", row, f"cause {EVIL}", 5, expected=f"e {EVIL}", seen="s"),
            Finding("message-differs", f"{tmp_path}/{row}", "again", 6),
            Finding("system-prompt", "gsm8k/train:3", "gone", 0, allowed=True),
            Finding("blank-answer", row, "blank"),
            Finding("cut", "", "2 of 3 rows"),
        ]
    )


def test_junit(report):
    suites = ET.fromstring(to_junit(report))
    (suite,) = suites
    assert suites.tag == "testsuites" and suite.tag == "testsuite"
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == (str(len(RULES)), "2", "0")
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == list(RULES) and {case.tag for case in suite} == {"testcase"}
    assert {case.get("classname") for case in suite} == {"ptst.audit"}
    failed = {name: case.find("failure") for name, case in cases.items() if case.find("failure") is not None}
    assert {name: f.get("type") for name, f in failed.items()} == {
        "message-differs": "error",
        "blank-answer": "warning",
    }
    text = failed["message-differs"].text
    assert "my data/r\u00e9.jsonl:7, token 5: cause U+001B]0;title" in text and "token 6: again" in text
    assert "expected e U+001B" in text and "remedy: encode the row's text unchanged" in text
    assert cases["message-differs"].get("file") == "my data/r\u00e9.jsonl"
    assert cases["message-differs"].get("line") == "7"
    assert "gone" in cases["system-prompt"].find("system-out").text  # allowed
    assert "2 of 3 rows" in cases["cut"].find("system-out").text
    assert len(cases["double-bos"]) == 0


def check_sarif(log: dict) -> list[dict]:
    """What SARIF 2.1.0's schema demands of the parts that are written here; returns the results."""
    assert set(log) == {"$schema", "version", "runs"} and log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert set(run) == {"tool", "columnKind", "invocations", "results"}
    assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
    driver = run["tool"]["driver"]
    assert isinstance(driver["name"], str) and isinstance(driver["version"], str)
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(set(ids)) == len(ids)
    for rule in driver["rules"]:
        assert set(rule) == {"id", "name", "shortDescription", "fullDescription", "help", "defaultConfiguration"}
        assert all(rule[key]["text"] for key in ("shortDescription", "fullDescription", "help"))
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error") and result["message"]["text"]
        assert all(isinstance(v, str) for v in result["partialFingerprints"].values())
        for location in result.get("locations", ()):
            assert set(location) <= {"physicalLocation", "logicalLocations"}
            if physical := location.get("physicalLocation"):
                uri = physical["artifactLocation"]["uri"]
                assert uri.isascii() and " " not in uri and "\\" not in uri
                assert physical["region"]["startLine"] >= 1
        for suppression in result.get("suppressions", ()):
            assert suppression["kind"] in ("inSource", "external")
    (invocation,) = run["invocations"]
    assert isinstance(invocation["executionSuccessful"], bool)
    return run["results"]


def test_sarif(report):
    results = check_sarif(json.loads(to_sarif(report)))
    physical = [r["locations"][0].get("physicalLocation") if "locations" in r else None for r in results]
    place = {"artifactLocation": {"uri": "my%20data/r%C3%A9.jsonl"}, "region": {"startLine": 7}}
    assert physical == [place, place, None, place, None]
    assert [r["level"] for r in results] == ["error", "error", "note", "warning", "note"]
    assert [len(r.get("suppressions", ())) for r in results] == [0, 0, 1, 0, 0]
    assert "\x1b" not in results[0]["message"]["text"] and "U+001B" in results[0]["message"]["text"]
    assert len({r["partialFingerprints"]["finding/v1"] for r in results}) == 5
    assert results[0]["properties"]["token"] == 5


def test_the_most_severe_fit_into_sarif(report, monkeypatch):
    monkeypatch.setattr(sarif, "MAX_RESULTS", 2)
    log = json.loads(to_sarif(report))
    assert len(check_sarif(log)) == 2
    (told,) = log["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert told["message"]["text"].startswith("3 findings")


def test_a_file_of_which_all_is_meant(report, tmp_path):
    report.data = "my data/r\u00e9.jsonl"
    results = check_sarif(json.loads(to_sarif(report)))
    assert results[4]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "my%20data/r%C3%A9.jsonl"


def test_written_and_not_written(report, tmp_path):
    write_files(report, tmp_path / "a.xml", tmp_path / "a.sarif")
    assert (tmp_path / "a.xml").read_bytes() == to_junit(report)
    assert (tmp_path / "a.sarif").read_bytes() == to_sarif(report)
    with pytest.raises(UserError, match=r"sarif .* cannot be written"):
        write_files(report, None, tmp_path)


def test_the_command_on_a_terminal(tmp_path):
    """Raw bytes of a pseudo-terminal: what the data and their file's name hold never commands it."""
    write_tiny_model(tmp_path)
    data = tmp_path / "evil\x1b]0;name\x07\u202e.jsonl"
    rows = [{"prompt": f"q {EVIL}", "response": f"a\u200bb {EVIL}"}, {"prompt": "c", "response": " "}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", tmp_path, "--data", data, "--test-template", "chat:llama", "--rows", "2"]
    arguments += ["--junit", tmp_path / "a.xml", "--sarif", tmp_path / "a.sarif"]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ptst.audit", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, cwd=ROOT)
    os.close(theirs)
    out = b""
    while True:
        try:
            out += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 1
    text = out.decode()
    assert "verdict" in text and "U+001B]0;name" in text.replace("\r\n", "")
    for raw in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\x08", "\u202e", "\u200b"):
        assert raw not in text, raw
    assert ET.parse(tmp_path / "a.xml").getroot().get("failures") == "1"
    check_sarif(json.loads((tmp_path / "a.sarif").read_text()))


def test_json_has_every_finding_and_the_terminal_the_first(tmp_path, capsys):
    write_tiny_model(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{i}", "response": " "}) + "\n" for i in range(30)))
    report = audit_data(AuditConfig(model=str(tmp_path), data=str(data)))
    print_report(report)
    out = capsys.readouterr().out
    assert out.count("warning blank-answer: ") == 20
    assert "blank-answer: 30 in total, the first 20 listed" in out
    blank = [f for f in report.to_json()["findings"] if f["rule"] == "blank-answer"]
    assert len(blank) == 30
    keys = {"rule", "level", "row", "token", "cause", "expected", "seen", "meaning", "remedy", "allowed"}
    assert keys <= set(blank[0]) and blank[29]["row"] == f"{data}:30"


def test_the_workflow_uses_flags_that_exist():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "examples" / "github-action" / "audit.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["audit"]["steps"]
    (command,) = (step["run"] for step in steps if "ptst.audit" in step.get("run", ""))
    flags = re.findall(r"--([a-z-]+)", command)
    assert {flag.replace("-", "_") for flag in flags} <= {f.name for f in fields(AuditConfig)}
    assert re.search(r"--sarif (\S+)", command)[1] == steps[-1]["with"]["sarif_file"]
