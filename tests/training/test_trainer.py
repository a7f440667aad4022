"""The trainer: the gradient of a step does not depend on how it is split, and a loss that is not finite stops."""

from __future__ import annotations

import pytest
import torch

from ptst.errors import UserError
from ptst.experiment.align_config import AlignConfig
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.weights import load_decoder
from ptst.training import trainer
from ptst.training.config import TrainConfig
from ptst.training.schedule import factor
from ptst.training.trainer import Trainer, TrainerConfig, dropout_seed
from tests.training.steps import examples


def trained_weights(folder, config: TrainerConfig, rows, dtype=torch.float64) -> tuple[torch.Tensor, list]:
    decoder = load_decoder(folder, dtype)
    parameters = add_lora(decoder, LoraConfig(rank=2, alpha=4))
    reports = list(Trainer(decoder, parameters, rows, config))
    return torch.cat([p.detach().flatten() for p in parameters.values()]), reports


def test_micro_batches_never_change_the_result(tiny_folder):
    """Two passes over 11 examples in steps of 4 (the last one partial): the same weights whatever is in memory."""
    whole, reports = trained_weights(
        tiny_folder, TrainerConfig(epochs=2, examples_per_step=4, micro_batch_tokens=500), examples(11)
    )
    assert [r.step for r in reports] == list(range(1, 7))
    for micro in (1, 13, 30):
        split, others = trained_weights(
            tiny_folder, TrainerConfig(epochs=2, examples_per_step=4, micro_batch_tokens=micro), examples(11)
        )
        assert (whole - split).norm() <= 1e-10 * whole.norm()
        assert [r.loss for r in others] == pytest.approx([r.loss for r in reports], rel=1e-10)


def test_it_learns_and_seeds_matter(tiny_folder):
    config = TrainerConfig(epochs=30, lr=0.02, examples_per_step=4)
    weights, reports = trained_weights(tiny_folder, config, examples(4), torch.float32)
    assert reports[-1].loss < 0.5 * reports[0].loss
    again, _ = trained_weights(tiny_folder, config, examples(4), torch.float32)
    assert torch.equal(weights, again)
    one, two = (TrainerConfig(seed=s).plan([1] * 20) for s in (0, 1))
    assert one != two


def test_the_trainers_defaults_are_the_commands():
    assert TrainerConfig.of(TrainConfig()) == TrainerConfig()
    assert TrainerConfig.of(AlignConfig(), clip=2.0) == TrainerConfig(
        lr=7e-5, max_steps=80, examples_per_step=16, micro_batch_tokens=4096, clip=2.0
    )


def broken(folder, token: int) -> tuple:
    """A decoder to which one token is poison, its adapter's parameters, and copies of them."""
    decoder = load_decoder(folder)
    decoder.embed_tokens.weight[token] = float("nan")
    decoder.lm_head = torch.nn.Linear(1, 1, bias=False)  # the head is not the poisoned embedding
    decoder.lm_head.weight = load_decoder(folder).embed_tokens.weight
    parameters = add_lora(decoder, LoraConfig(rank=2))
    return decoder, parameters, [p.clone() for p in parameters.values()]


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_folder):
    """The step, the learning rate and the one example that does it are named; the other examples are not."""
    rows = examples(8)
    rows[5].ids[0] = 299
    decoder, parameters, before = broken(tiny_folder, 299)
    config = TrainerConfig(examples_per_step=2, lr=2e-4, schedule="constant", warmup=0)
    number = next(n for n, s in enumerate(config.plan([1] * 8), 1) if 5 in s.examples)
    reports, run = [], Trainer(decoder, parameters, rows, config)
    run.name_example = "d.jsonl:{}".format
    with pytest.raises(UserError) as stopped:
        for report in run:
            reports.append(report)
    assert str(stopped.value) == (
        f"step {number}: the loss is nan and the norm of its gradient nan at learning rate 0.0002, so the update was "
        "not applied; look at d.jsonl:5, whose loss alone is not finite, or lower lr"
    )
    assert len(reports) == run.done == number - 1
    assert all(p.isfinite().all() and p.grad is None for p in parameters.values())
    assert any((a != b).any() for a, b in zip(parameters.values(), before, strict=True)) == (number > 1)


def test_weights_that_have_diverged(tiny_folder):
    decoder = load_decoder(tiny_folder)
    parameters = add_lora(decoder, LoraConfig(rank=2))
    list(parameters.values())[1].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"step 1: .* every example of the step .*: the weights have diverged; lower"):
        next(iter(Trainer(decoder, parameters, examples(4), TrainerConfig())))
    with pytest.raises(ValueError, match="no example left"):
        Trainer(decoder, parameters, [], TrainerConfig())


def test_a_trainer_goes_on_where_it_was_left(tiny_folder):
    """Stopped after two steps and taken up again, by hand: the same reports and weights, and the average as well."""
    config, weights = TrainerConfig(epochs=2, examples_per_step=3), []
    for stops in ((), (2,)):
        decoder = load_decoder(tiny_folder)
        run = Trainer(decoder, add_lora(decoder, LoraConfig(rank=2)), examples(6), config, average=0.9)
        reports = []
        for _ in (*stops, None):
            for report in run:
                reports.append(report)
                if report.step in stops:
                    break
        assert [r.step for r in reports] == [1, 2, 3, 4] == list(range(1, len(run) + 1))
        assert (reports[-1].last, reports[-2].last, list(run)) == (True, False, [])
        weights.append(torch.cat([t.detach().flatten() for t in run.tensors.values()]))
        assert weights[-1].numel() == 2 * sum(p.numel() for p in run.parameters.values())
    assert torch.equal(*weights)


def test_a_dropout_seed_knows_run_step_and_example(tiny_folder, monkeypatch):
    """The seeds of a batch's documents are set before its loss, whatever the split, and taken away after the step."""
    rows, seen = examples(6), {}

    def noting(decoder, batch, divisor, real=trainer.batch_loss):
        for row, seed in zip(batch.rows, decoder.dropout_seeds, strict=True):
            seen.setdefault(row, []).append(seed)
        return real(decoder, batch, divisor)

    monkeypatch.setattr(trainer, "batch_loss", noting)
    for micro in (1, 100):
        decoder = load_decoder(tiny_folder)
        config = TrainerConfig(epochs=2, examples_per_step=4, micro_batch_tokens=micro, seed=7)
        list(Trainer(decoder, add_lora(decoder, LoraConfig(rank=2)), rows, config))
        assert decoder.dropout_seeds is None
    for row, seeds in seen.items():
        steps_ = [n for n, s in enumerate(config.plan([len(e.ids) for e in rows]), 1) if row in s.examples]
        assert seeds == [dropout_seed(7, n, row) for n in steps_] * 2
    assert len({dropout_seed(*x) for x in ((7, 1, 1), (8, 1, 1), (7, 2, 1), (7, 1, 2))}) == 4
    assert 0 <= dropout_seed(7, 1, 1) < 2**31


def test_schedules():
    assert [factor("constant", s, 10, 2, 0) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [factor("linear", s, 4, 0, 0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [factor("cosine", s, 4, 0, 0) for s in (0, 2)] == pytest.approx([1, 0.5])
    assert factor("step", 50, 100, 0, 3) == pytest.approx(0.85**3)
