"""Block shapes: the safe ones, those that were tuned on the machine, and tuning, with a timer that is no clock."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

from ptst.errors import UserError
from ptst.kernels import attention_prefill, flash_attention, flash_blocks, tuned
from ptst.kernels.dispatch import triton
from ptst.kernels.flash_blocks import SHARED, TUNED, Blocks, blocks_of, safe_blocks
from ptst.kernels.tune import candidates, prepared, tiles, tune
from ptst.tune_kernels import TuneKernelsConfig, run_tune_kernels
from tests.gpu import ON_GPU
from tests.kernels import interpreter

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
GPU, DEVICE = "NVIDIA H200 (test)", torch.device("cuda", 0)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with a GPU of that name, and an empty home."""
    monkeypatch.setenv("PTST_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    caches = flash_blocks._tuned, flash_blocks._architecture
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def chosen(head_dim=128, group=4, dtype=torch.bfloat16, part="dq"):
    flash_blocks._tuned.cache_clear()
    return blocks_of(None, DEVICE, head_dim, dtype, group, part)


@pytest.mark.parametrize("part", TUNED)
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 256])
def test_safe_entries_fit(head_dim, part):
    for arch, most in SHARED.items():
        shape = safe_blocks(arch, head_dim, torch.bfloat16, part)
        assert 16 <= shape.edge <= max(shape.queries, shape.keys)
        assert tiles(shape, head_dim, part) <= most
        assert not shape.tma or arch >= 90
    assert safe_blocks(103, head_dim, torch.float16, part) == safe_blocks(100, head_dim, torch.float16, part)
    assert safe_blocks(75, head_dim, torch.float16, part) == safe_blocks(80, head_dim, torch.float16, part)


def test_tuned_entries_come_first(gpu):
    safe = safe_blocks(90, 128, torch.bfloat16, "dq")
    assert chosen() == safe
    entry = {"queries": 64, "keys": 32, "edge": 16, "warps": 4, "stages": 4, "edge_stages": 1, "tma": True}
    name = tuned.entry_name("dq", 128, 4)
    path = tuned.write_tuned(GPU, {name: {"blocks": entry, "milliseconds": 1.0}})
    assert chosen() == Blocks(**entry)
    assert chosen(group=1) == chosen(part="dq", head_dim=96) == safe  # neither was tuned
    assert chosen(dtype=torch.float16) == Blocks(**entry)
    assert chosen(dtype=torch.float32) == safe_blocks(90, 128, torch.float32, "dq")
    assert blocks_of(80, DEVICE, 128, torch.bfloat16, 4, "dq") == safe_blocks(80, 128, torch.bfloat16, "dq")
    stored = json.loads(path.read_text())
    for key, value in (("triton", "0"), ("kernels", 0), ("gpu", "another")):
        path.write_text(json.dumps(stored | {key: value}))
        assert chosen() == safe
    path.write_text("{")
    with pytest.raises(UserError, match=r"test\.json: this file of tuned kernels.*ptst tune-kernels"):
        chosen()


def test_the_fastest_candidate_is_chosen():
    asked = []

    def timer(part, shape, head_dim, group):
        asked.append((part, shape))
        if part == "dkdv" or shape.warps == 4:
            return None  # does not compile
        return 1.0 if (shape.queries, shape.keys, shape.stages) == (64, 64, 3) else 2.0

    found = dict(tune(timer, 90, 128, 4))
    assert found.keys() == {tuned.entry_name(part, 128, 4) for part in ("forward", "dq", "prefill")}
    for name, entry in found.items():
        shape = Blocks(**entry["blocks"])
        assert (shape.queries, shape.keys, shape.stages, shape.warps) == (64, 64, 3, 8)
        assert shape.tma == (not name.startswith("prefill"))
        assert (entry["milliseconds"], entry["safe"]) == (1.0, 2.0)
    assert len(set(asked)) == len(asked)
    for arch in SHARED:
        for part in TUNED:
            all_of_them = list(candidates(arch, 128, part))
            assert all_of_them[0] == safe_blocks(arch, 128, torch.bfloat16, part)
            assert all(tiles(shape, 128, part) <= SHARED[arch] for shape in all_of_them)


def test_a_gpu_is_tuned_and_the_choice_kept(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ptst.kernels.tune.gpu_timer", lambda tokens: lambda part, shape, *_: shape.stages * tokens)
    result = run_tune_kernels(TuneKernelsConfig(head_dims=(64,), groups=(4,), tokens=256))
    assert len(result["entries"]) == len(TUNED) and GPU not in capsys.readouterr().err
    assert json.loads(tuned.tuned_path(GPU).read_text())["entries"] == result["entries"]
    assert chosen(head_dim=64, part="forward").stages == 2
    assert attention_prefill.blocks(DEVICE, 64, torch.bfloat16, 4).stages == 3
    run_tune_kernels(TuneKernelsConfig(head_dims=(128,), groups=(1,), tokens=256))
    assert chosen(head_dim=64, part="forward").stages == chosen(head_dim=128, group=1, part="forward").stages == 2
    assert chosen(head_dim=64, group=2, part="forward").stages == 3


def test_what_was_found_before_an_interruption_is_kept(gpu, monkeypatch):
    def time(part, shape, *_):
        if part == "dq":
            raise KeyboardInterrupt
        return shape.stages

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ptst.kernels.tune.gpu_timer", lambda tokens: time)
    with pytest.raises(KeyboardInterrupt):
        run_tune_kernels(TuneKernelsConfig(head_dims=(128,), groups=(4,)))
    assert tuned.read_tuned(GPU).keys() == {tuned.entry_name("forward", 128, 4)}


def of_one_document(part, inputs, dtype):
    """What a pass that is timed computes, in plain torch: out and lse; dq, or dk and dv, where lse and delta are 0."""
    q, k, v, do = (x.to(dtype) if x is not None else None for x in inputs)
    T, H, D = q.shape
    kx, vx = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    s = torch.einsum("ihd,jhd->hij", q, kx).mul(D**-0.5).masked_fill(hidden, -torch.inf)
    if part in ("forward", "prefill"):
        out = torch.einsum("hij,jhd->ihd", s.softmax(-1), vx)
        return (out, s.logsumexp(-1) / math.log(2)) if part == "forward" else (out,)
    p, dp = s.exp(), torch.einsum("ihd,jhd->hij", do, vx)
    if part == "dq":
        return (torch.einsum("hij,jhd->ihd", p * dp, kx) * D**-0.5,)
    dk, dv = torch.einsum("hij,ihd->jhd", p * dp, q) * D**-0.5, torch.einsum("hij,ihd->jhd", p, do)
    return tuple(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def what_is_timed(part, shape, tokens, heads):
    """The inputs (q, k, v, do), the keys and values in their order, and the results of a pass that tuning times."""
    timed = prepared(part, shape, tokens, heads, "cuda" if ON_GPU else "cpu")
    if part == "prefill":
        q, keys, values, table = timed.args[:4]
        kv = (x[table[0].long()].flatten(0, 1)[:tokens] for x in (keys, values))
        return (q, *kv, None), (timed(),)
    if part == "forward":
        return (*timed.args[:3], None), timed()
    given, outs = timed.args[0][:4], timed.args[3:]
    for out in outs:
        out.fill_(torch.nan)
    timed()
    return given, outs


@pytest.mark.parametrize("part", TUNED)
def test_what_is_timed_is_right(part):
    """Each candidate at a tiny shape against the plain formula, by the kernels' rule: what is fast and wrong must not
    be chosen, and a mistake in what is timed would cost a machine with a GPU its minutes."""
    if not ON_GPU:
        interpreter.install()
    torch.manual_seed(0)
    arch = flash_blocks._architecture(DEVICE) if ON_GPU else 90
    # Each size of blocks once: in the interpreter warps and stages change nothing, on a GPU they would cost minutes.
    shapes = {(shape.queries, shape.keys): shape for shape in candidates(arch, 16, part)}
    for number, shape in enumerate(shapes.values()):
        inputs, found = what_is_timed(part, shape, 150 if ON_GPU else 70, (16, 1 if number else 2))
        exact, eager = (of_one_document(part, inputs, dtype) for dtype in (torch.float64, torch.bfloat16))
        for ours, plain, wanted in zip(found, eager, exact, strict=True):
            limit = (2 if part in ("forward", "prefill") else 3) * (plain - wanted).norm() + 1e-6 * wanted.norm()
            assert (ours.double() - wanted).norm() <= limit, shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence():
    with pytest.raises(UserError, match="no GPU"):
        run_tune_kernels(TuneKernelsConfig())
    for wrong in ({"head_dims": (300,)}, {"groups": (0,)}, {"tokens": 1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            run_tune_kernels(TuneKernelsConfig(**wrong))


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("window", [0, 40])
def test_the_longest_blocks_come_first(of_keys, window):
    """Work: pairs of a query and a key, rounded to the tokens of the loop."""
    cu_q, cu_k, size = (0, 100, 130, 400), (0, 100, 200, 470), 32
    own, other = (cu_k, cu_q) if of_keys else (cu_q, cu_k)
    rows = flash_attention.table(own, other, size, torch.device("cpu"), window, of_keys).tolist()
    works = []
    for start, end, begin, other_end in rows:
        mine, theirs = range(start, min(start + size, end)), range(begin, other_end)
        offset = end - other_end if of_keys else other_end - end
        pairs = [(i, j) if not of_keys else (j, i) for i in mine for j in theirs]
        seen = [(i, j) for i, j in pairs if j <= i + offset and (not window or i + offset - j < window)]
        works.append(len({pair[0 if of_keys else 1] for pair in seen}))
    assert works == sorted(works, reverse=True) and works[0] > works[-1]
    assert sorted(row[0] for row in rows) == [s for a, b in pairwise(own) for s in range(a, b, size)]
