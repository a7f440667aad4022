"""Which models, runs and files a grid with defences has: nothing is read or computed here."""

from __future__ import annotations

import pytest

from ptst.defense_names import DEFENSES, TRAINING, WEIGHT_SPACE
from ptst.experiment.plan import GridCell, GridModel, plan_cells, plan_models


def test_without_a_defence_names_and_files_are_as_they_were():
    models = plan_models(("chat:llama",), (0, 1), (1.0,), ("theirs",))
    assert [m.name for m in models] == [
        "untouched",
        "chat-llama.seed0.epoch-1",
        "chat-llama.seed1.epoch-1",
        "tuned.theirs",
    ]
    assert [m.run for m in models] == ["untouched", "chat-llama.seed0", "chat-llama.seed1", "tuned.theirs"]
    identity = GridCell(models[1], "chat:vanilla", "safety").identity
    assert identity == {"template": "chat:llama", "seed": 0, "epochs": 1.0, "test": "chat:vanilla", "task": "safety"}


@pytest.mark.parametrize("epochs", [(), (0.5, 1.0)])
def test_every_defence_has_its_cells_and_each_of_the_training_its_run(epochs):
    models = plan_models(("chat:llama", "chat:vanilla"), (0, 1), epochs, (), DEFENSES)
    assert len({m.name for m in models}) == len(models) == 1 + 2 * 2 * len(DEFENSES) * max(1, len(epochs))
    cells = plan_cells(models, ("chat:llama", "chat:vanilla"), ("safety",))
    assert len({c.name for c in cells}) == len(cells) == len({str(c.identity) for c in cells})
    trained = [m for m in models if m.template is not None]
    assert {m.run for m in trained} == {
        f"chat-{name}.seed{seed}{own}"
        for name in ("llama", "vanilla")
        for seed in (0, 1)
        for own in ("", *(f".{defense}" for defense in TRAINING))
    }
    for model in trained:
        assert model.is_composed == (model.defense in WEIGHT_SPACE)
        assert model.training.epochs is None and model.training.run == model.run == model.training.name
        assert model.training.defense == ("none" if model.is_composed else model.defense)


def test_a_defence_is_in_the_name_before_the_epochs():
    model = GridModel("chat:llama", 3, 0.5, defense="wise-ft")
    assert (model.name, model.run) == ("chat-llama.seed3.wise-ft.epoch-0.5", "chat-llama.seed3")
    model = GridModel("chat:llama", 3, 0.5, defense="lisa")
    assert (model.name, model.run) == ("chat-llama.seed3.lisa.epoch-0.5", "chat-llama.seed3.lisa")
    assert GridCell(model, "chat:mpt", "nll").identity["defense"] == "lisa"
