"""What the tests of a GPU share. They are skipped without one; PTST_GPU_TESTS=small runs them at small shapes on a CPU,
which shows that the tests themselves work (`benchmarks/gpu_all.py --dry-run` does so)."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SMALL = not ON_GPU and os.environ.get("PTST_GPU_TESTS") == "small"
needs_gpu = pytest.mark.skipif(not (ON_GPU or SMALL), reason="needs a GPU")
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: nothing stands in for what it tests")


def size(real, small):
    """A shape on a GPU, and in its place on a CPU."""
    return real if ON_GPU else small
