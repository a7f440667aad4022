"""SIGKILL at random instants: no job is paid for twice, and every run ends as an undisturbed one (kills.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("openai", reason="needs the package openai")


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["train", "grid"])
def test_killed_at_any_instant_nothing_is_paid_for_twice(tmp_path, mode):
    """In a process of its own: it forks, which one with threads cannot safely do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-m", "tests.hosted.kills", mode, "20"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
