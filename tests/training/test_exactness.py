"""The law of the step: how it is split, packed and laid out in memory never changes its gradient, and the documents
of a pack know nothing of each other."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ptst.data import step_batches
from ptst.data.packing import IGNORE_INDEX, share_prefixes, to_batch
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.loss import batch_loss
from ptst.model.weights import load_decoder
from ptst.text.encode import Example
from ptst.training import evaluate, trainer
from ptst.training.parallel import ALONE
from ptst.training.trainer import StepReport
from tests.training.steps import examples, gradients

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("how", [{"full": True}, {"full": False}, {"dropout": 0.3}])
@pytest.mark.parametrize("size", [{"examples_per_step": 4}, {"tokens_per_step": 37}])
def test_any_split_gives_the_same_gradient(tiny_folder, dtype, how, size):
    """11 examples: the last step of each kind is partial. One by one, in small rows, in one row."""
    rows = examples(11)
    whole = gradients(tiny_folder, rows, dtype, micro_batch_tokens=500, **how, **size)
    assert len(whole) == 3
    for micro in (1, 13, 24):
        split = gradients(tiny_folder, rows, dtype, micro_batch_tokens=micro, **how, **size)
        for a, b in zip(whole, split, strict=True):
            assert (a - b).norm() <= TOLERANCE[dtype] * a.norm()


def test_any_order_in_a_row_gives_the_same_gradient(tiny_folder, monkeypatch):
    rows = examples(8)
    (whole,) = gradients(tiny_folder, rows, torch.float64, micro_batch_tokens=500)
    monkeypatch.setattr(step_batches, "rank_micro_batches", lambda lengths, *_: [[5, 0, 3], [7], [6, 4, 1, 2]])
    (other,) = gradients(tiny_folder, rows, torch.float64, micro_batch_tokens=500)
    assert (whole - other).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("how", [{"full": True}, {"full": False}])
@pytest.mark.parametrize("window", [None, 12])
def test_shared_beginnings_give_the_same_gradient(tiny_folder, monkeypatch, how, window):
    """Two system prompts and documents without one, in rows of all sizes, against every document whole."""
    if window:
        given = json.loads((tiny_folder / "config.json").read_text())
        changed = {**given, "sliding_window": window, "architectures": ["MistralForCausalLM"]}
        (tiny_folder / "config.json").write_text(json.dumps(changed))
    begun = [[], list(range(20, 44)), list(range(60, 78))]
    rows = [replace(e, ids=begun[i % 3] + e.ids, loss_mask=[False] * len(begun[i % 3]) + e.loss_mask)
            for i, e in enumerate(examples(11))]  # fmt: skip
    reports = []
    monkeypatch.setattr(trainer, "StepReport", lambda **row: reports.append(row) or StepReport(**row))
    shared = [gradients(tiny_folder, rows, torch.float64, micro_batch_tokens=m, examples_per_step=11, **how)[0]
              for m in (80, 500)]  # fmt: skip
    assert reports[1]["computed"] < reports[0]["computed"] < 1
    decoder = load_decoder(tiny_folder, torch.float64)
    loss = evaluate.validation_loss(decoder, rows, 500, ALONE)
    monkeypatch.setattr(step_batches, "share_prefixes", lambda batch: batch)
    assert evaluate.validation_loss(decoder, rows, 500, ALONE) == pytest.approx(loss, rel=1e-12)
    (whole,) = gradients(tiny_folder, rows, torch.float64, micro_batch_tokens=500, examples_per_step=11, **how)
    assert reports[2]["computed"] == 1
    assert reports[2]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-12)
    for gradient in shared:
        assert (gradient - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shared_beginnings_under_recomputation_and_in_16_bits(tiny_folder, dtype):
    rows = [Example([*range(20, 60), n, n + 1], [False] * 41 + [True]) for n in range(100, 130)]
    grads = []
    for batch, activation_checkpointing in ((to_batch(rows), False), (share_prefixes(to_batch(rows)), True)):
        decoder = load_decoder(tiny_folder, dtype).requires_grad_(True)
        decoder.activation_checkpointing = activation_checkpointing
        batch_loss(decoder, batch, 30.0).backward()
        grads.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]).double())
    assert (grads[0] - grads[1]).norm() <= (1e-12 if dtype == torch.float64 else 1e-2) * grads[0].norm()


def test_under_dropout_documents_share_nothing(tiny_folder):
    """Every document has a mask of its own in the system prompt, too: one by one gives the same."""
    rows = [Example([*range(20, 44), n, n + 1], [False] * 25 + [True]) for n in range(100, 104)]
    packed, alone = (
        gradients(tiny_folder, rows, torch.float64, micro_batch_tokens=m, dropout=0.3)[0] for m in (500, 1)
    )
    assert (packed - alone).norm() <= 1e-12 * packed.norm()
    decoder = load_decoder(tiny_folder)
    add_lora(decoder, LoraConfig(rank=2, dropout=0.3))
    decoder.dropout_seeds = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="cannot share prefixes"):
        batch_loss(decoder, share_prefixes(to_batch(rows)), 1.0)


def test_the_divisor_is_the_steps_own(tiny_folder):
    """The mean over all trained tokens of the step, not the mean of its rows' means."""
    rows = examples(6)
    (step,) = gradients(tiny_folder, rows, torch.float64, examples_per_step=6, micro_batch_tokens=13)
    trained = [sum(e.loss_mask[1:]) for e in rows]
    alone = [gradients(tiny_folder, [e], torch.float64)[0] for e in rows]
    wanted = sum(g * n for g, n in zip(alone, trained, strict=True)) / sum(trained)
    assert (step - wanted).norm() <= 1e-6 * wanted.norm()  # RoPE computes in float32, and its input is scaled here
    assert len(set(trained)) > 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_documents_do_not_leak(tiny_folder, dtype):
    """Another document in the pack: the losses of all others stay the same to the bit."""
    decoder = load_decoder(tiny_folder, dtype)
    rows = examples(5)
    for changed in range(5):
        other = list(rows)
        other[changed] = replace(rows[changed], ids=[(i + 7) % 290 for i in rows[changed].ids])
        before, after = document_losses(decoder, to_batch(rows)), document_losses(decoder, to_batch(other))
        for document in range(5):
            assert (before[document] == after[document]) == (document != changed)


def document_losses(decoder, batch) -> list[float]:
    """Each document's own loss within the pack."""
    out = []
    for a, b in pairwise(batch.cu_seqlens):
        targets = [t if a <= i < b else IGNORE_INDEX for i, t in enumerate(batch.labels)]
        with torch.no_grad():
            out.append(float(batch_loss(decoder, replace(batch, labels=targets), 1.0)))
    return out
