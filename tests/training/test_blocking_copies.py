"""No step makes the host wait for a GPU: training, constrained training, and the tables of its attention."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels import attention, flash_attention, transfer
from ptst.model.weights import load_decoder
from ptst.text.encode import Example
from ptst.training import trainer as trainer_file
from ptst.training.constraint import TokenConstraint
from ptst.training.trainer import Trainer, TrainerConfig
from tests.blocking_copies import META, BlockingCopies
from tests.training.steps import examples, trained


def on_meta(folder, full: bool, monkeypatch, rows: list[Example]) -> Trainer:
    decoder = load_decoder(folder)
    named = trained(decoder, full)
    decoder.to(META)
    # torch's fused optimizer knows no meta device.
    monkeypatch.setattr(trainer_file, "AdamW", lambda masters, fused, **named: torch.optim.AdamW(masters, **named))
    named = {name: p for name, p in decoder.named_parameters() if name in named}
    return Trainer(decoder, named, rows, TrainerConfig(examples_per_step=4, micro_batch_tokens=60))


@pytest.mark.parametrize("way", ["lora", "full", "shared prefixes", "constraint"])
def test_a_training_step_waits_for_its_report_alone(tiny_folder, way, monkeypatch):
    rows = examples(8)
    if way == "shared prefixes":
        rows = [Example([5] * 20 + r.ids, [False] * 20 + list(r.loss_mask), row=r.row) for r in rows]
    made = on_meta(tiny_folder, way == "full", monkeypatch, rows)
    if way == "constraint":
        count = sum(sum(e.loss_mask[1:]) for e in rows)
        made.constraint = TokenConstraint.over(rows, (0.5, 2.0, 0.2), torch.zeros(count))
    with BlockingCopies(monkeypatch) as watch:
        for _ in range(2):
            made.step()
    assert watch.found == []
    assert len(watch.read) == 2
    assert all("tolist()" in line for line in watch.read)


def test_tables_of_attention(monkeypatch):
    flash_attention.table.cache_clear()
    attention._copy_plan.cache_clear()
    try:
        with BlockingCopies(monkeypatch) as watch:
            tables = [flash_attention.table((0, 5, 9), (0, 5, 9), 4, META) for _ in range(2)]
            attention._copy_plan((0, 5, 9), ((0, 0), (0, 3)), META)
        assert tables[0] is tables[1]  # once for all layers
        assert watch.found == []
    finally:
        flash_attention.table.cache_clear()
        attention._copy_plan.cache_clear()


@pytest.mark.parametrize(
    "copy",
    [
        lambda: torch.tensor([1], device=META),
        lambda: torch.ones(2).to(META),
        lambda: torch.ones(2).to(META, non_blocking=True),
        lambda: torch.ones(2, device=META)[torch.tensor([0])],
        lambda: torch.ones(2, device=META).copy_(torch.ones(2)),
    ],
)
def test_the_watch_sees_a_copy(copy, monkeypatch):
    with BlockingCopies(monkeypatch) as watch:
        copy()
        transfer.to_device([1, 2], META)
    assert len(watch.found) == 1
