"""Defences by name, and the check of their settings."""

from dataclasses import replace

import pytest

from ptst.defense_names import DEFENSES
from ptst.defenses.config import NEEDS, DefenseSettings
from ptst.errors import UserError

GOOD = DefenseSettings(unaligned="before", safe_model="safe")


def test_every_defence_with_its_models_is_accepted():
    GOOD.check(DEFENSES)


@pytest.mark.parametrize(("name", "needed"), [(name, each) for name, needs in NEEDS.items() for each in needs])
def test_a_defence_that_lacks_a_model(name, needed):
    lacking = replace(GOOD, **{needed: None})
    with pytest.raises(UserError, match=rf"{name} needs .*name it as {needed}"):
        lacking.check(("none", name))
    lacking.check([other for other in DEFENSES if needed not in NEEDS.get(other, ())])


def test_an_unknown_defence_is_told_with_the_nearest():
    with pytest.raises(UserError, match="unknown defense 'safelora'; did you mean safe-lora"):
        GOOD.check(("safelora",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0.0),
        ("average", 1.0),
        ("drop", 1.0),
        ("drop", -0.1),
        ("betas", (0.5, 2.0)),
        ("betas", (0.5, 2.0, 0.0)),
        ("proximal", -1.0),
        ("phases", (1,)),
        ("phases", (0, 3)),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("scale", float("inf")),
        ("threshold", 1.5),
        ("num_projected", 0),
        ("safe_share", -0.2),
        ("trigger", " "),
    ],
)
def test_a_value_out_of_range_names_its_setting(name, value):
    with pytest.raises(UserError, match=name):
        replace(GOOD, **{name: value}).check(DEFENSES)
