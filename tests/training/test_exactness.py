"""The law of the step: how it is split, packed and laid out in memory never changes its gradient, and the documents
of a pack know nothing of each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ptst.data.packing import UNTRAINED, to_batch
from ptst.model.likelihood import batch_loss
from ptst.model.weights import load_decoder
from ptst.training import loop
from tests.training.steps import examples, gradients

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("how", [{"full": True}, {"full": False}, {"dropout": 0.3}])
@pytest.mark.parametrize("size", [{"examples_per_step": 4}, {"tokens_per_step": 37}])
def test_any_split_gives_the_same_gradient(tiny_folder, dtype, how, size):
    """11 examples: the last step of each kind is partial. One by one, in small rows, in one row."""
    rows = examples(11)
    whole = gradients(tiny_folder, rows, dtype, micro_tokens=500, **how, **size)
    assert len(whole) == 3
    for micro in (1, 13, 24):
        split = gradients(tiny_folder, rows, dtype, micro_tokens=micro, **how, **size)
        for a, b in zip(whole, split, strict=True):
            assert (a - b).norm() <= TOLERANCE[dtype] * a.norm()


def test_any_order_in_a_row_gives_the_same_gradient(tiny_folder, monkeypatch):
    rows = examples(8)
    (whole,) = gradients(tiny_folder, rows, torch.float64, micro_tokens=500)
    monkeypatch.setattr(loop, "share", lambda lengths, *_: [[5, 0, 3], [7], [6, 4, 1, 2]])
    (other,) = gradients(tiny_folder, rows, torch.float64, micro_tokens=500)
    assert (whole - other).norm() <= 1e-12 * whole.norm()


def test_the_divisor_is_the_steps_own(tiny_folder):
    """The mean over all trained tokens of the step, not the mean of its rows' means."""
    rows = examples(6)
    (step,) = gradients(tiny_folder, rows, torch.float64, examples_per_step=6, micro_tokens=13)
    trained = [sum(e.trained[1:]) for e in rows]
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
        targets = [t if a <= i < b else UNTRAINED for i, t in enumerate(batch.targets)]
        with torch.no_grad():
            out.append(float(batch_loss(decoder, replace(batch, targets=targets), 1.0)))
    return out
