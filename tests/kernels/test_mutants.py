"""The kernels' tests see a wrong kernel: each mutant below is planted in a copy, where its test must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from ptst.kernels.dispatch import triton
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.timeout(600),
    pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="runs in Triton's interpreter"),
]
FORWARD, BACKWARD = "flash_forward.py", "flash_backward.py"
LOSS, DECODE = "linear_cross_entropy.py", "attention_decode.py"
CPU, CPU_LAYER = "cpu_attention.py", "cpu_layer.py"
# (what is wrong, file, line as it is, line as it becomes, tests that must notice)
MUTANTS = [
    ("dx zeroed", "rms_norm.py", "out.to(dx.dtype.element_ty)", "(out * 0).to(dx.dtype.element_ty)", "rms_norm"),
    ("dw halved", "rms_norm.py", "sums += d * n", "sums += 0.5 * d * n", "rms_norm"),
    ("tail unmasked", "rms_norm.py", "inside = h < H", "inside = h < H + 1", "rms_norm"),
    ("eps lost", "rms_norm.py", "/ H + eps)", "/ H)", "rms_norm"),
    ("dgate without its second term", "swiglu.py", "(1.0 + g * (1.0 - s))", "1.0", "swiglu"),
    ("tail unmasked", "swiglu.py", "inside = f < F", "inside = f <= F", "swiglu"),
    ("rotated the wrong way", "rope.py", "SIGN=-1.0 if inverse else 1.0", "SIGN=1.0", "rope"),
    ("last head left out", "rope.py", "inside = (h < K)", "inside = (h < K - 1)", "rope"),
    ("gradient shifted by one", LOSS, "at + v == target", "at + v == target + 1", "cross_entropy"),
    ("gradient halved", LOSS, "d = weight * (", "d = 0.5 * weight * (", "cross_entropy"),
    ("tail unmasked", LOSS, "mask=at + v < V, other", "mask=at + v <= V, other", "cross_entropy"),
    ("mask off by one", FORWARD, "mask = j <= i + offset", "mask = j < i + offset", "flash"),
    ("window off by one", FORWARD, "i + offset - j < window", "i + offset - j <= window", "flash"),
    ("window's edge left out", FORWARD, "start + offset - window + 1)", "start + offset - window + 2)", "flash"),
    ("unmasked too far", FORWARD, "start + offset + 1 - low", "start + BN + offset - low", "flash"),
    ("window's edge unmasked", FORWARD, "start + BM + offset - window - low", "0 * low", "flash"),
    ("nothing seen yet", FORWARD, "if EMPTY:", "if False:", "flash"),
    ("dq halved", BACKWARD, "(out * scale).to(dq", "(out * scale * 0.5).to(dq", "flash"),
    ("dk of one head alone", BACKWARD, "// BM * GROUP, num", "// BM, num", "flash"),
    ("dk's edges of one head alone", BACKWARD, "edges * GROUP", "edges", "flash"),
    ("dv zeroed", BACKWARD, "dvs.to(dv.dtype.element_ty)", "(dvs * 0).to(dv.dtype.element_ty)", "flash"),
    ("delta forgotten", BACKWARD, "(dp - delta_i[:, None])\n        out", "dp\n        out", "flash"),
    ("dk unmasked too early", BACKWARD, "start + BN - 1 - offset - low", "start + 1 - offset - low", "flash"),
    ("dk unmasked beyond the window", BACKWARD, "start - offset + window)", "high + 0 * window)", "flash"),
    ("between dk's edges", BACKWARD, "(at >= first) & (at < last)", "(at > first) & (at < last)", "flash"),
    ("a split's sum forgotten", DECODE, "weight[:, None], axis=0) / tl", "weight[:, None], axis=0) * 2 / tl", "decode"),
    ("newest key left out", DECODE, "inside = (j < high)", "inside = (j < high - 1)", "decode"),
    ("window off by one", DECODE, "length - window)", "length - window - 1)", "decode"),
    ("split's edge left out", DECODE, "low += split * share", "low += split * (share + 1)", "decode"),
    ("heads of another group", DECODE, "h = head * GROUP + g", "h = head + g", "decode"),
    ("block not looked up", DECODE, "own = tl.load(table + r", "own = own + 0 * tl.load(table + r", "decode"),
    ("dA halved", "lora.py", "tl.store(to, total * scale,", "tl.store(to, total * scale * 0.5,", "lora"),
    ("tail of rows unmasked", "lora.py", "inside = (at + t < high)", "inside = (at + t < high + 1)", "lora"),
    ("last inputs left out", "lora.py", "inside = at + n < N", "inside = at + n < N - 1", "lora"),
    ("old value forgotten", "lora.py", "(old + scale * added)", "(scale * added)", "lora"),
    ("tail unmasked", CPU, "s_L[high:] = lowest", "pass", "paged"),
    ("window off by one", CPU, "max(0, length - window)", "max(0, length - window - 1)", "paged"),
    ("heads of another group", CPU, "v_BKPD[table_RN[r, i], k]", "v_BKPD[table_RN[r, i], 0]", "paged"),
    ("exponential less exact", "cpu.py", "(c4 + u * (c5 + u * c6))", "c4", "paged"),
    ("rotated the wrong way", CPU, "cos_TD2[t, d] - b *", "cos_TD2[t, d] + b *", "rotate"),
    ("halves rounded up", CPU, "below_half + ((bits >> 16) & low_bit)", "below_half + low_bit", "storing"),
    ("sum forgotten", CPU_LAYER, "squares += y * y", "squares += x[e] * x[e]", "norm"),
    ("next part's start", CPU_LAYER, "range(0, O, N)", "range(0, O - N, N)", "norm"),
    ("residual forgotten", CPU_LAYER, "y = total[e] + x[e] * scale", "y = x[e] * scale", "norm"),
    ("gate's sign forgotten", CPU_LAYER, "(one if g > 0 else e)", "one", "swiglu"),
    ("second chunk of ranks lost", "lora.py", "range(0, R, BR)", "range(0, BR, BR)", "lora"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[1]}-{m[0]}".replace(" ", "-"))
def test_killed(mutant, tmp_path):
    _, file, before, after, chosen = mutant
    for folder in ("kernels", "tests", "ptst"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,  # ptst/kernels leads to the mutant
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "kernels" / file
    text = path.read_text()
    assert before in text, "the mutant no longer fits the kernel"
    path.write_text(text.replace(before, after))
    own = sorted(ROOT.glob(f"tests/kernels/test_{'flash_' if 'flash' in file else file.removesuffix('.py')}*.py"))
    tests = [str(path.relative_to(ROOT)) for path in own] or ["tests/kernels/test_triton.py"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout[-2000:]
