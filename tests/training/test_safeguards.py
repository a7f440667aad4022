"""The settings that keep a model near its aligned self: what makes no sense is refused in one sentence."""

from __future__ import annotations

import pytest

from ptst.errors import UserError
from ptst.hosted.checks import check_hosted
from ptst.training.config import TrainConfig

BETAS = (0.5, 2.0, 0.1)
REFUSED = {
    "average is 1.0": {"average": 1.0},
    "proximal is -1": {"proximal": -1.0},
    "proximal is inf": {"proximal": float("inf")},
    r"token_constraint is \(0.5,\); it is three numbers above 0": {"token_constraint": (0.5,)},
    r"token_constraint is \(0.5, 0.0, 0.1\)": {"token_constraint": (0.5, 0.0, 0.1)},
    "reference has no effect without token_constraint": {"reference": "somewhere"},
    r"phases is \(3,\); it is two numbers of steps": {"phases": (3,), "mix": ("refusals.jsonl:1",)},
    r"phases is \(0, 3\)": {"phases": (0, 3), "mix": ("refusals.jsonl:1",)},
}


@pytest.mark.parametrize("told", REFUSED)
def test_values_that_make_no_sense(told):
    with pytest.raises(UserError, match=told):
        TrainConfig(**REFUSED[told]).check()


@pytest.mark.parametrize(
    "given", [{"average": 0.9}, {"token_constraint": BETAS}, {"proximal": 1.0}, {"phases": (1, 3)}]
)
def test_a_job_at_an_endpoint_has_none_of_them(given):
    (name,) = given
    with pytest.raises(UserError, match=f"{name} has no effect on a model behind an endpoint"):
        check_hosted(TrainConfig(model="openai:gpt-4o-mini", **given))
