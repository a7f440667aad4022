"""Faults planted in our own pipeline are found by the audit: a sample of those of `benchmarks/audit_mutations.py`."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from benchmarks import audit_mutations
from tests.conftest import ROOT


def plant(*options: str) -> tuple[int, int]:
    """Numbers of faults that were found, and of those that change anything."""
    script = [sys.executable, str(ROOT / "benchmarks/audit_mutations.py"), "-j", "1", *options]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"^(\d+) of (\d+) faults found", done.stdout, re.MULTILINE)
    assert told is not None, done.stdout
    return int(told[1]), int(told[2])


def test_every_fault_fits_the_source():
    """Whoever moves code moves the fault that is planted in it: one that fits nowhere would be seen only in a run of
    all."""
    for mutation in audit_mutations.all_mutations():
        if mutation.old:
            mutation.fit(importlib.import_module(f"ptst.{mutation.module}"))


def test_a_sample_of_planted_faults_is_found():
    found, counted = plant("--sample", "6")
    assert found == counted >= 5


@pytest.mark.thorough
def test_half_of_the_planted_faults_are_found():
    found, counted = plant("--sample", "90")
    assert counted >= 80 and found >= 0.97 * counted
