"""The parts of benchmarks/gpu_all.py end within their seconds, with all that they have started."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from benchmarks import gpu_all
from benchmarks.gpu_all import ENDS, ROOT, STAGES, Part, parts, run, summary

# Starts a process that outlives it if nobody ends that, and tells its number.
STARTS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at /proc")
@pytest.mark.parametrize(("lasts", "ended"), [("60", "cut off"), ("0", "failed")])
def test_what_a_part_has_started_ends_with_it(lasts, ended, tmp_path):
    told = run("part", Part(["-c", STARTS, lasts], 9), tmp_path, 2.0)
    assert told["ended"] == ended
    child = int((tmp_path / "part.log").read_text().split()[0])
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_parts_without_time_or_program_are_not_run(tmp_path):
    assert run("late", Part(["-c", "1"], 9), tmp_path, 0.5) == {"part": "late", "ended": "no time left"}
    for seconds in (9, 0.5):
        told = run("tool", Part([], 9, "such-tool"), tmp_path, seconds)
        assert told == {"part": "tool", "ended": "not there", "why": "such-tool is missing"}


def test_a_missing_tool_is_no_failure_and_has_not_passed():
    passed, missing = {"part": "a", "ended": "passed"}, {"part": "b", "ended": "not there", "why": "ncu is missing"}
    assert summary([passed, missing]) == ("1 passed, 1 not there; b: not there (ncu is missing)", 0)
    assert summary([passed, passed]) == ("2 passed", 0)
    for ended in ENDS[1:4]:
        assert summary([passed, missing, {"part": "c", "ended": ended}])[1] == 1


def test_how_a_run_ends_is_in_its_summary(tmp_path, monkeypatch, capsys):
    line = ["gpu_all.py", "--out", str(tmp_path), "--stage", "check"]
    monkeypatch.setattr(sys, "argv", line)
    known = {"tool": Part([], 9, "such-tool"), "tests": Part(["-c", "raise SystemExit(0)"], 9)}
    monkeypatch.setattr(gpu_all, "parts", lambda *_: known)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        gpu_all.main()
    assert ended.value.code == 0 and "1 passed, 1 not there; tool" in capsys.readouterr().out
    told = json.loads((tmp_path / "summary-check.json").read_text())["parts"]
    assert [part["ended"] for part in told] == ["not there", "passed"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_parts_are_there(stage, tmp_path):
    """Every script and test that a part names; the seconds of a stage are those that first_gpu.sh gives it."""
    known = parts(stage, tmp_path, 12)
    for part in known.values():
        for word in part.line:
            assert not word.startswith(("benchmarks/", "tests/")) or (ROOT / word).exists()
        assert part.program in (sys.executable, "compute-sanitizer", "ncu")
    limit = {"check": 5 * 60, "speed": 7 * 60, "tune": 8 * 60}.get(stage, 3600)
    assert sum(part.seconds for part in known.values()) <= limit
