"""The training loop: the gradient of a step does not depend on how it is split, and a loss that is not finite stops."""

from __future__ import annotations

import pytest
import torch

from ptst.model.lora import LoraConfig, add_lora
from ptst.model.weights import load_decoder
from ptst.text.encode import Encoded
from ptst.training.loop import LoopConfig, steps, train
from ptst.training.schedule import factor


def examples(count: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(2)
    out = []
    for n in range(count):
        ids = torch.randint(3, 290, (5 + n % 6,), generator=generator).tolist()
        out.append(Encoded(ids, [i >= 1 + n % 3 for i in range(len(ids))]))
    return out


def trained_weights(folder, config: LoopConfig, rows, dtype=torch.float64) -> tuple[torch.Tensor, list]:
    decoder = load_decoder(folder, dtype)
    parameters = list(add_lora(decoder, LoraConfig(rank=2, alpha=4)).values())
    reports = []
    train(decoder, parameters, rows, config, reports.append)
    return torch.cat([p.detach().flatten() for p in parameters]), reports


def test_micro_batches_never_change_the_result(tiny_folder):
    """Two passes over 11 examples in steps of 4 (the last one partial): the same weights whatever is in memory."""
    whole, reports = trained_weights(
        tiny_folder, LoopConfig(epochs=2, examples_per_step=4, micro_tokens=500), examples(11)
    )
    assert [r.step for r in reports] == list(range(1, 7))
    for micro in (1, 13, 30):
        split, others = trained_weights(
            tiny_folder, LoopConfig(epochs=2, examples_per_step=4, micro_tokens=micro), examples(11)
        )
        assert (whole - split).norm() <= 1e-10 * whole.norm()
        assert [r.loss for r in others] == pytest.approx([r.loss for r in reports], rel=1e-10)


def test_it_learns_and_seeds_matter(tiny_folder):
    config = LoopConfig(epochs=30, lr=0.02, examples_per_step=4)
    weights, reports = trained_weights(tiny_folder, config, examples(4), torch.float32)
    assert reports[-1].loss < 0.5 * reports[0].loss
    again, _ = trained_weights(tiny_folder, config, examples(4), torch.float32)
    assert torch.equal(weights, again)
    one, two = (steps([1] * 20, LoopConfig(seed=s)) for s in (0, 1))
    assert one != two


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_folder):
    decoder = load_decoder(tiny_folder)
    parameters = list(add_lora(decoder, LoraConfig(rank=2)).values())
    with torch.no_grad():
        parameters[1][0, 0] = float("nan")
    before = [p.clone() for p in parameters]
    with pytest.raises(ValueError, match=r"step 1: the loss is nan .* was not applied"):
        train(decoder, parameters, examples(4), LoopConfig())
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(parameters, before, strict=True)
    )
    with pytest.raises(ValueError, match="no example left"):
        train(decoder, parameters, [], LoopConfig())


def test_schedules():
    assert [factor("constant", s, 10, 2, 0) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [factor("linear", s, 4, 0, 0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [factor("cosine", s, 4, 0, 0) for s in (0, 2)] == pytest.approx([1, 0.5])
    assert factor("step", 50, 100, 0, 3) == pytest.approx(0.85**3)
