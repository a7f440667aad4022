"""The parts of benchmarks/gpu_all.py end within their seconds, with all that they have started."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.gpu_all import ROOT, STAGES, Part, parts, run

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
@pytest.mark.parametrize(("lasts", "ended"), [("60", "cut off by the time limit"), ("0", "exit code 3")])
def test_what_a_part_has_started_ends_with_it(lasts, ended, tmp_path):
    told = run("part", Part(["-c", STARTS, lasts], 9), tmp_path, 2.0)
    assert told["ended"] == ended
    child = int((tmp_path / "part.log").read_text().split()[0])
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_parts_without_time_or_program_are_left_out(tmp_path):
    assert run("late", Part(["-c", "1"], 9), tmp_path, 0.5)["ended"] == "left out for want of time"
    assert "no such-tool" in run("tool", Part([], 9, "such-tool"), tmp_path, 9)["ended"]


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
