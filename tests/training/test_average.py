"""The running average of weights, by its definition."""

from __future__ import annotations

import pytest
import torch

from ptst.training.average import Average


@pytest.mark.parametrize(
    ("decay", "wanted"), [(0.9, (0 + 1 + 2 + 4) / 4), (0.0, 4.0), (0.5, 0.125 * 0 + 0.125 + 0.5 + 2)]
)
def test_average(decay, wanted):
    weight = torch.nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, decay)
    for step, value in enumerate((1.0, 2.0, 4.0), 1):
        with torch.no_grad():
            weight.fill_(value)
        average.update(step)
    assert average.tensors["average.w"].tolist() == pytest.approx([wanted] * 3)
    version = weight._version
    average.swap()
    assert weight.tolist() == pytest.approx([wanted] * 3) and weight._version > version
    average.swap()
    assert weight.tolist() == [4.0] * 3
    assert average.tensors["average.w"].tolist() == pytest.approx([wanted] * 3)
