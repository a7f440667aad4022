"""SIGKILL at random instants: every command goes on to the same weights, metrics, answers and results (tests/kills.py).

The thorough tests kill 56 times in all, the exhaustive ones 301 times.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.kills import MODES

KILLS = [pytest.param(8, marks=pytest.mark.thorough), pytest.param(43, marks=pytest.mark.exhaustive)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_instant_it_ends_the_same(tmp_path, mode, kills):
    """In a process of its own: it forks, which one with threads cannot safely do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-m", "tests.kills", mode, str(kills)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
