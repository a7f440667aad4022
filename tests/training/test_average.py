"""The running average of weights, by its definition."""

from __future__ import annotations

import pytest
import torch

from ptst.training.average import Average


@pytest.mark.parametrize(("decay", "wanted"), [(0.9, (0 + 1 + 2 + 4) / 4), (0.0, 4.0), (0.5, 1 / 8 + 2 / 4 + 4 / 2)])
def test_average(decay, wanted):
    weight = torch.nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, decay)
    for step, value in enumerate((1.0, 2.0, 4.0), 1):
        with torch.no_grad():
            weight.fill_(value)
        average.update(step)
    assert average.copies["average.w"].tolist() == pytest.approx([wanted] * 3)
    version = weight._version
    with pytest.raises(KeyError), average.in_place():
        assert weight.tolist() == pytest.approx([wanted] * 3) and weight._version > version
        raise KeyError
    assert weight.tolist() == [4.0] * 3
    average.put()
    assert weight.tolist() == average.copies["average.w"].tolist() == pytest.approx([wanted] * 3)


def test_small_steps_of_16_bit_weights_are_not_rounded_away():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    average = Average({"w": weight}, 0.9)
    with torch.no_grad():
        weight += 2 * torch.finfo(torch.bfloat16).eps
    for step in range(1, 100):
        average.update(step)
    average.put()
    assert (weight == 1 + 2 * torch.finfo(torch.bfloat16).eps).all()
