"""The estimate of what is left, on a simulated clock and against what a real study took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.experiment.status.forecast import Forecast, Seen
from ptst.experiment.status.items import Item, by_name
from tests.experiment.status import recorded
from tests.experiment.status.simulated import CPU, GPU, TASKS, Task, World


@pytest.mark.parametrize("rows", [60, 500, 4000])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_after_the_first_training_and_cell_it_is_within_a_quarter(machine, full, rows):
    """Tasks of 30 to 200 prompts, written and scored; defences with more rows, with a reference, composed."""
    world = World(machine, full, rows)
    said, rest = world.after(world.first("train"), world.first("test"))
    assert said == pytest.approx(rest, rel=0.25)


def test_a_cell_of_few_prompts_says_what_many_take():
    tasks = {"few": Task(4, 60, 48, base=30, tuned=30), "many": Task(2000, 60, 48, base=30, tuned=30)}
    for machine in (CPU, GPU):
        for names in (("few", "many"), ("many", "few")):
            world = World(machine, False, 60, {name: tasks[name] for name in names})
            said, rest = world.after(world.first("train"), world.first("test"))
            assert said == pytest.approx(rest, rel=0.25), (machine, names)


def test_models_that_stop_early_mislead_no_further_than_their_own():
    """The aligned model refuses in a few words; the tuned ones answer at length, as their training data do."""
    safety = replace(TASKS["safety"], prompts=400, limit=300, base=12, tuned=90)
    world = World(CPU, False, 60, {"safety": safety})
    said, rest = world.after(world.first("train"), world.first("test"))
    assert said == pytest.approx(rest, rel=0.25)
    others = [name for name, item in world.items.items() if item.kind == "test" and item.needs]
    said, rest = world.after(world.first("train"), world.first("test"), others[0])
    assert said == pytest.approx(rest, rel=0.25)


def test_composing_a_model_counts_once_for_all_its_cells():
    items = by_name(
        Item("test", f"{model}/{n}", "safety", fixed=100, model=model, needs="run", loads=f"compose {model}")
        for model in ("a", "b")
        for n in range(3)
    )
    seen = {"test a/0": Seen(1.0, around=50.0)}
    assert Forecast(items, frozenset(seen), seen).seconds == pytest.approx(5 * 1.0 + 50.0 + 50.0)


def test_an_unmeasured_task_takes_the_speed_of_tasks_like_it_not_of_the_last_ones():
    """Once, hundreds of cells were foretold to take as long as eight that had been read before."""
    items = by_name(
        [
            Item("test", "a/1", "over-refusal", answers=1000, model="a"),
            *(Item("test", f"a/r{n}", "distance", fixed=1000, model="a") for n in range(20)),
            Item("test", "a/2", "safety", answers=1000, model="a"),
        ]
    )
    seen = {"test a/1": Seen(40.0, answered=1000, at=0)}
    seen |= {f"test a/r{n}": Seen(0.01, at=1 + n) for n in range(20)}
    left = Forecast(items, frozenset(seen), seen).left["test a/2"]
    assert left.seconds == pytest.approx(40.0, rel=0.25) and left.rough


def test_what_was_measured_last_counts():
    """The machine has become four times as fast."""
    items = by_name(Item("test", f"a/{n}", "safety", fixed=100, model="a") for n in range(40))
    seen = {f"test a/{n}": Seen(4.0 if n < 20 else 1.0, at=n) for n in range(30)}
    assert Forecast(items, frozenset(seen), seen).seconds == pytest.approx(10.0)


def test_nothing_is_known_before_anything_was_measured():
    items = by_name([Item("train", "a", fixed=100), Item("test", "b/1", "safety", fixed=50)])
    assert Forecast(items, frozenset(), {}).seconds is None
    guessed = Forecast(items, frozenset(), {}, guess=0.1)
    assert guessed.seconds == pytest.approx(15.0) and all(left.rough for left in guessed.left.values())


def test_a_run_that_is_going_on_counts_with_its_rest_and_workers_share():
    items = by_name(Item("train", name, fixed=100) for name in "abc")
    forecast = Forecast(items, frozenset(), {"train a": Seen(5.0, done=0.5)})
    assert forecast.seconds == pytest.approx(5 + 10 + 10)
    assert forecast.until_done(2) == pytest.approx(12.5)
    assert forecast.until_done(9) == pytest.approx(10)  # no run is shared


def test_a_real_study_takes_what_the_forecast_says():
    items, seen = recorded.read()
    runs = [name for name in items if name.startswith("train")]
    cells = [name for name in items if name.startswith("test")]
    assert len(runs) == 9 and len(cells) == 290
    assert recorded.ratio(items, seen, [runs[1], cells[0]]) == pytest.approx(1, abs=0.25)  # the first was suspended
    for number in (1, 2, 5, 10, 20, 40, 80, 140, 200, 260):
        assert recorded.ratio(items, seen, runs + cells[:number]) == pytest.approx(1, abs=0.25), number
