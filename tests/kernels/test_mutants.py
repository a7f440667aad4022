"""The kernels' tests see a wrong kernel: each mistake of benchmarks/kernel_mutations.txt fails the tests it names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.kernel_mutations import all_mutations
from ptst.kernels.dispatch import triton
from tests.conftest import ROOT


def test_every_mistake_fits_the_source():
    """Its fragment is there, once; the tests that it names exist."""
    mutations = all_mutations()
    assert len({(m.files, m.function, m.old, m.new) for m in mutations}) == len(mutations)
    for mutation in mutations:
        path, changed = mutation.find(ROOT)
        compile(changed, path, "exec")
        assert (ROOT / mutation.tests.split()[0]).exists(), mutation


@pytest.mark.thorough
@pytest.mark.timeout(3000)
@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_all_are_killed():
    command = [sys.executable, str(ROOT / "benchmarks/kernel_mutations.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
