"""The proximal term and its anchor, by a loop written out with autograd and torch's plain optimizer."""

from __future__ import annotations

import pytest
import torch

from ptst.data.order import SourcePlan
from ptst.data.packing import to_batch
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.loss import batch_loss
from ptst.model.weights import load_decoder
from ptst.training.checkpoint import Checkpoints
from ptst.training.masters import Masters
from ptst.training.proximal import Anchor
from ptst.training.trainer import Trainer, TrainerConfig
from tests.training.steps import examples

SOURCES = [SourcePlan(8, 2), SourcePlan(5, 1)]
CONFIG = TrainerConfig(
    epochs=2, lr=0.02, schedule="constant", warmup=0, examples_per_step=2, clip=0.05, proximal=0.7, phases=(1, 2)
)


def model(folder, full: bool, dtype=torch.float64):
    decoder = load_decoder(folder, dtype)
    if full:
        return decoder, dict(decoder.requires_grad_(True).named_parameters())
    return decoder, add_lora(decoder, LoraConfig(rank=2, alpha=4))


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("phases", [(1, 2), ()])
def test_weights_are_those_of_the_written_out_method(tiny_folder, full, phases):
    """Lisa: the loss of the turn's data plus rho / 2 times the squared distance from the weights at its beginning."""
    config, rows = CONFIG.of(CONFIG, phases=phases), examples(13)
    decoder, parameters = model(tiny_folder, full)
    own = list(parameters.values())
    optimizer = torch.optim.AdamW(own, lr=0.02, weight_decay=0.0)
    anchor, before, wanted = [p.detach().clone() for p in own], None, []
    for step in config.plan([len(e.ids) for e in rows], SOURCES):
        on_main = step.examples[0] < 8
        if phases and before is not None and on_main != before:
            anchor = [p.detach().clone() for p in own]
        before = on_main
        trained = sum(sum(rows[i].loss_mask[1:]) for i in step.examples)
        loss = batch_loss(decoder, to_batch([rows[i] for i in step.examples]), trained)
        objective = loss + 0.7 / 2 * sum((p - a).square().sum() for p, a in zip(own, anchor, strict=True))
        optimizer.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(own, 0.05)
        optimizer.step()
        wanted.append((loss.item(), objective.item()))
    theirs = flat(own)
    decoder, parameters = model(tiny_folder, full)
    start = flat(parameters.values())
    reports = list(Trainer(decoder, parameters, rows, config, SOURCES))
    assert (flat(parameters.values()) - theirs).norm() <= 1e-9 * (theirs - start).norm()
    assert [(r.loss, r.objective) for r in reports] == [pytest.approx(pair, rel=1e-9) for pair in wanted]
    assert any(r.objective > r.loss * (1 + 1e-6) for r in reports)


@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_of_bfloat16_weights_the_masters_are_pulled(tiny_folder, update):
    _, parameters = model(tiny_folder, True, torch.bfloat16)
    masters = Masters(parameters, update, 0)
    anchor = Anchor(masters, 3.0)
    name, held = next(iter(masters.tensors.items()))
    with torch.no_grad():
        held += 0.25
    before = held.detach().float() - anchor.copies[f"anchor.{name}"].float()
    assert anchor.pull().item() == pytest.approx(1.5 * before.double().square().sum().item())
    gradient = masters.weights[name].grad
    assert gradient.dtype == torch.float32 and torch.equal(gradient, 3.0 * before)
    assert all(m.grad.count_nonzero() == 0 for other, m in masters.weights.items() if other != name)
    anchor.pull()  # adds to what is there
    assert torch.equal(masters.weights[name].grad, 6.0 * before)
    anchor.move()
    assert anchor.pull().item() == 0


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_trainer_knows_where_its_turn_began(tiny_folder, tmp_path, at):
    """Within a turn and at its end."""
    rows, ends = examples(13), []
    for stop in (None, at):
        decoder, parameters = model(tiny_folder, False, torch.float32)
        trainer = Trainer(decoder, parameters, rows, CONFIG, SOURCES, average=0.5)
        if stop is not None:
            for _ in range(stop):
                trainer.step()
            Checkpoints(tmp_path / "state", trainer, 1).save({})
            decoder, parameters = model(tiny_folder, False, torch.float32)
            trainer = Trainer(decoder, parameters, rows, CONFIG, SOURCES, average=0.5)
            Checkpoints(tmp_path / "state", trainer, 1).restore()
        list(trainer)
        ends.append(flat(trainer.tensors.values()))
    assert torch.equal(*ends) and ends[0].numel() == 3 * flat(parameters.values()).numel()
