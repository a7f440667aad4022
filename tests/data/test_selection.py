"""Which rows a run takes: a subsample of its data, and a share that other data replace; checked by a second reading."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ptst.audit.account.run_rows import check_run_rows
from ptst.data import selection, sources
from ptst.data.examples import TrainingSource
from ptst.data.mix_part import MixPart, parse_mix
from ptst.data.selection import REPLACED, UNDRAWN, select, selection_notes
from ptst.errors import UserError
from ptst.train import run_training
from ptst.training import run_sources
from ptst.training.config import TrainConfig
from ptst.training.run_plan import plan_run
from ptst.training.run_sources import read_main, read_others

CONFIG = TrainConfig(data="word-problems:240", val_data="word-problems:3")


def main(rows: int = 240) -> TrainingSource:
    return TrainingSource(sources.load(f"word-problems:{rows}"), 2.0)


def attack(share: float, name: str = "attack") -> TrainingSource:
    return TrainingSource(sources.load(name), 0.0, share=share)


def places(each: TrainingSource) -> list[str]:
    return [c.source for c in each.source.conversations]


def chosen(config: TrainConfig) -> list[TrainingSource]:
    return read_others(config, read_main(config)).training


@pytest.mark.parametrize(("share", "rows"), [(1, 2), (2, 5), (5, 12), (10, 24), (12.5, 30)])
def test_a_share_replaces_so_many_rows(share, rows):
    own, other = select([main(), attack(share)])
    assert (len(own.source.conversations), len(other.source.conversations)) == (240 - rows, rows)
    assert (own.epochs, other.epochs) == (2.0, 2.0)
    assert places(other) == [f"attack/train:{n}" for n in range(1, rows + 1)]
    assert list(own.left_out.values()) == [REPLACED] * rows
    assert select([main(), replace(attack(share), epochs=3.0)])[1].epochs == 3.0
    assert sorted(places(own) + list(own.left_out)) == sorted(places(main()))
    assert places(own) == [place for place in places(main()) if place in set(places(own))]


def test_larger_shares_replace_the_same_rows_and_more():
    out = [set(select([main(), attack(share)])[0].left_out) for share in (1, 2, 5, 10)]
    assert out[0] < out[1] < out[2] < out[3]
    for seed in (1, 2):  # whatever the seed
        assert set(select([main(), attack(10)], seed=seed)[0].left_out) == out[3]
    # They are spread over the data, not its beginning.
    numbers = sorted(int(place.rpartition(":")[2]) for place in out[3])
    assert numbers[0] < 40 and numbers[-1] > 200 and numbers != list(range(1, 25))


def test_two_shares_replace_different_rows():
    own, first, second = select([main(), attack(5), attack(2.5, "identity")])
    assert [len(each.source.conversations) for each in (own, first, second)] == [222, 12, 6]
    assert len(own.left_out) == 18


def test_a_subsample_is_drawn_by_the_seed():
    drawn = {seed: places(select([main()], 100, seed)[0]) for seed in range(4)}
    everything = places(main())
    for seed, rows in drawn.items():
        assert len(set(rows)) == 100
        assert rows == [place for place in everything if place in set(rows)]  # without replacement, in order
        assert rows == places(select([main()], 100, seed)[0])
    assert len({tuple(rows) for rows in drawn.values()}) == 4
    # Each row is drawn about as often as any other.
    small = main(40)
    drawn_of_40 = [row for seed in range(60) for row in places(select([small], 20, seed)[0])]
    often = [drawn_of_40.count(place) for place in places(small)]
    assert min(often) >= 12 and max(often) <= 48
    assert select([main()], 240, 3)[0].left_out == {}
    (one,) = select([main()], 239, 3)
    assert list(one.left_out.values()) == [UNDRAWN]


def test_a_share_is_of_the_subsample():
    own, other = select([main(), attack(5)], 100, 1)
    assert (len(own.source.conversations), len(other.source.conversations)) == (95, 5)
    assert sorted(own.left_out.values()) == [REPLACED] * 5 + [UNDRAWN] * 140
    assert selection_notes([own, other]) == [
        "word-problems:240: 100 of 240 rows are drawn with the run's seed",
        "word-problems:240: 5 of 100 rows are replaced by 5 of attack",
    ]


def test_nothing_asked_changes_nothing():
    asked = [main(), TrainingSource(sources.load("refusals"), 1.0)]
    assert [a is b for a, b in zip(select(asked), asked, strict=True)] == [True, True]
    assert selection_notes(asked) == []


@pytest.mark.parametrize(
    ("rows", "asked", "count", "message"),
    [
        (40, [attack(1)], None, "mix attack:1% is no row: word-problems:40 has 40 rows; leave it out for none"),
        (400, [attack(11)], None, "mix attack:11% is 44 of 400 rows, and attack has 40; give a smaller share"),
        (40, [attack(60), attack(40)], None, "mix replaces 40 rows, and word-problems:40 has 40"),
        (40, [], 41, "subsample is 41, and word-problems:40 has 40 rows; draw no more than there are"),
    ],
)  # fmt: skip
def test_mistakes(rows, asked, count, message):
    with pytest.raises(UserError) as found:
        select([main(rows), *asked], count)
    assert message in str(found.value)


def test_how_a_share_is_written():
    assert parse_mix("attack:5%") == MixPart("attack", 0.0, None, share=5.0)
    assert parse_mix("a:2.5%:chat:llama") == MixPart("a", 0.0, "chat:llama", share=2.5)
    for text in ("attack:0%", "attack:100%", "attack:nan%", "attack:-1%"):
        with pytest.raises(UserError, match="cannot be replaced; give a share above 0%"):
            TrainConfig(mix=(text,)).check()
    assert parse_mix("attack:5%:2") == MixPart("attack", 2.0, share=5.0)
    with pytest.raises(UserError, match="write the data, a colon and its epochs"):
        TrainConfig(mix=("attack:5%:0",)).check()


def test_mistakes_come_before_anything_is_trained(tiny_folder, tmp_path):
    config = replace(CONFIG, data="word-problems:20", model=str(tiny_folder), out=tmp_path / "run")
    for changes in ({"mix": ("attack:2%",)}, {"subsample": 21}):
        with pytest.raises(UserError, match=r"is no row|and word-problems:20 has 20 rows"):
            run_training(replace(config, **changes))
        assert not (tmp_path / "run").exists()


ASKED = [
    {"mix": ("attack:5%",)},
    {"subsample": 100, "seed": 3},
    {"mix": ("attack:5%:3:chat:llama",)},
    {"mix": ("attack:10%", "refusals:1"), "subsample": 61, "seed": 1},
    {"mix": ("attack:2.5%:chat:llama", "identity:3%"), "subsample": 200},
]


@pytest.mark.parametrize("asked", ASKED)
def test_the_audit_agrees(asked):
    config = replace(CONFIG, **asked)
    assert list(check_run_rows(config, read_others(config, read_main(config)))) == []


def drops_the_last(real, asked, count=None, seed=0):
    own, *others = real(asked, count, seed)
    return [replace(own, source=replace(own.source, conversations=own.source.conversations[:-1])), *others]


def takes_one_attack_more(real, asked, count=None, seed=0):
    own, other, *rest = real(asked, count, seed)
    more = asked[1].source.conversations[: len(other.source.conversations) + 1]
    return [own, replace(other, source=replace(other.source, conversations=more)), *rest]


def takes_another_seed(real, asked, count=None, seed=0):
    return real(asked, count, seed + 1)


def says_nothing_of_it(real, asked, count=None, seed=0):
    own, *others = real(asked, count, seed)
    return [replace(own, left_out={}), *others]


def keeps_what_is_replaced(real, asked, count=None, seed=0):
    return [asked[0], *real(asked, count, seed)[1:]]


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (drops_the_last, ASKED[0]),
        (drops_the_last, ASKED[1]),
        (takes_one_attack_more, ASKED[0]),
        (takes_another_seed, ASKED[1]),
        (says_nothing_of_it, ASKED[1]),
        (keeps_what_is_replaced, ASKED[0]),
    ],
)
def test_the_audit_finds(fault, asked, monkeypatch):
    monkeypatch.setattr(run_sources, "select", lambda *a: fault(selection.select, *a))
    config = replace(CONFIG, **asked)
    found = list(check_run_rows(config, read_others(config, read_main(config))))
    assert {f.rule for f in found} == {"selection"}


def test_a_run_trains_what_is_left(tiny_folder, tmp_path, capsys):
    """Every step takes rows of the subsample and the attack's only; the account and the record count them."""
    config = replace(CONFIG, model=str(tiny_folder), rank=2, out=tmp_path / "run", subsample=30, mix=("attack:10%",))
    config = replace(config, data="word-problems:40", epochs=2.0, log=())
    plan = plan_run(config)
    assert [len(e.source.conversations) for e in plan.mixture.sources] == [27, 3]
    assert "word-problems:40: 3 of 30 rows are replaced by 3 of attack" in capsys.readouterr().err
    result = run_training(config)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["data"]["rows"], record["mix"][0]["rows"], record["mix"][0]["epochs"]) == (27, 3, 2.0)
    assert {a["name"]: a["visits"] for a in record["account"]} == {"word-problems:40": 54, "attack": 6}
    assert result["trained"]["examples"] == 60
    other = chosen(replace(config, seed=1))[0]
    assert places(other) != places(chosen(config)[0])


def test_the_report_accounts_for_every_row(tiny_folder, tmp_path):
    from ptst.audit.config import AuditConfig
    from ptst.audit.report import audit_data

    config = AuditConfig(model=str(tiny_folder), data="word-problems:40", mix=("attack:10%",), subsample=30, seed=2)
    report = audit_data(config)
    assert [f for f in report.findings if f.level == "error"] == []
    own, other = (a for a in report.account if a.part == "training")
    assert (own.read, own.undrawn, own.replaced, own.examples) == (40, 10, 3, 27)
    assert (other.name, other.read, other.examples, other.taken) == ("attack", 3, 3, 3)
    assert len(own.rows) == 40
    assert sorted(v for v in own.rows.values() if isinstance(v, str)) == ["replaced"] * 3 + ["undrawn"] * 10


def test_phases_do_not_take_turns_with_a_share(tiny_folder):
    """Rows that replace others are main data, which turns would set apart."""
    config = replace(CONFIG, model=str(tiny_folder), data="word-problems:20", mix=("attack:10%", "refusals:1"))
    with pytest.raises(UserError, match="phases takes turns with the data mixed in, and rows that replace others"):
        plan_run(replace(config, phases=(1, 3)))
    assert plan_run(config).mixture.plans[1].replaces


def test_a_grid_draws_other_rows_for_every_seed(tiny_folder, tmp_path):
    from ptst.experiment.config import GridConfig
    from ptst.experiment.grid import Grid
    from ptst.training.config import TrainSettings

    train = TrainSettings(rank=2, subsample=10, val_data="word-problems:3")
    config = GridConfig(
        model=str(tiny_folder), data="word-problems:20", mix=("attack:10%",), train_templates=("chat:vanilla",),
        test_templates=("chat:vanilla",), tasks=("safety",), seeds=(0, 1), train=train, out=tmp_path / "grid",
    )  # fmt: skip
    grid = Grid.open(config)
    seen = {}
    for model in grid.runs:
        made = [places(each) for each in grid.mixture(model).sources]
        assert made == [places(each) for each in chosen(grid.train_config(model))]  # as the run itself
        assert [len(rows) for rows in made] == [9, 1]
        seen[model.seed] = made[0]
    assert seen[0] != seen[1]
