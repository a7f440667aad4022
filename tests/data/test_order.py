"""Which examples a step takes: all of them as often as asked, newly shuffled, in full packs, whatever the memory."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from itertools import groupby

import pytest

from ptst.audit.account.order import is_in_turn
from ptst.data.order import MOST, PACK, WINDOW, SourcePlan, check_visits, epochs, fill, plan, uneven_turns
from ptst.data.packing import assign_micro_batches, rank_micro_batches
from ptst.errors import UserError
from ptst.text.tokenizer import load_tokenizer


def gsm8k_like(count: int = 7473) -> list[int]:
    """Lengths distributed as GSM8K's under SmolLM2's tokenizer: log-normal of mean 5.24 and deviation 0.33."""
    rng = random.Random(1)
    return [min(552, max(79, round(rng.lognormvariate(5.24, 0.33)))) for _ in range(count)]


def test_every_example_as_often_as_asked():
    order = list(epochs([SourcePlan(10, 2.5)], 0))
    assert [len(e) for e in order] == [10, 10, 5]
    assert sorted(order[0]) == sorted(order[1]) == list(range(10))
    assert order[0] != order[1]
    assert order == list(epochs([SourcePlan(10, 2.5)], 0)) != list(epochs([SourcePlan(10, 2.5)], 1))


@pytest.mark.parametrize("how", [{"examples_per_step": 4}, {"tokens_per_step": 700}, {"tokens_per_step": 9000}])
def test_steps_hold_every_visit_once(how):
    lengths = gsm8k_like(300)
    steps = list(plan(lengths, [SourcePlan(300, 2)], seed=3, **how))
    assert Counter(i for s in steps for i in s.examples) == dict.fromkeys(range(300), 2)
    assert [s.epoch for s in steps] == sorted(s.epoch for s in steps)
    assert max(s.epoch for s in steps) < 2
    assert len(list(plan(lengths, [SourcePlan(300, 2)], max_steps=3, **how))) == 3
    if "tokens_per_step" in how:
        assert max(sum(lengths[i] for i in s.examples) for s in steps) <= how["tokens_per_step"]


def test_a_plan_beyond_memory_is_refused_before_it_is_made():
    few, many = SourcePlan(4, 1), SourcePlan(3, 1e308)
    check_visits([SourcePlan(MOST, 1)])
    turns = {"max_steps": 2, "phases": (1, 1)}
    for sources, how in (([many], {}), ([few, many], {"max_steps": 2}), ([many, few], turns)):
        with pytest.raises(UserError, match=r"1e\+308 epochs of 3 examples are more than the 50,000,000 of a plan"):
            next(plan([1] * 7, sources, **how))
    endless = plan([1] * 3, [SourcePlan(3, 1e9)], examples_per_step=2, max_steps=3)  # the steps are few
    assert [len(step.examples) for step in endless] == [2, 1, 2]


def test_steps_of_examples_are_exact_and_the_last_is_partial():
    steps = list(plan([1] * 11, [SourcePlan(11, 1)], examples_per_step=4))
    assert [len(s.examples) for s in steps] == [4, 4, 3]


def test_a_source_that_is_mixed_in_is_spread_over_the_run():
    """6 epochs of 100 mixed with 1 epoch of 50: each epoch gets 8 or 9 of the 50, none of them twice."""
    order = list(epochs([SourcePlan(100, 6), SourcePlan(50, 1)], 0))
    assert [sum(i >= 100 for i in e) for e in order] == [8, 8, 9, 8, 8, 9]
    assert all(sorted(i for i in e if i < 100) == list(range(100)) for e in order)
    assert sorted(i for e in order for i in e if i >= 100) == list(range(100, 150))
    # Shuffled together: they do not stand at the end.
    assert all(min(e.index(i) for i in e if i >= 100) < 60 for e in order)
    twice = Counter(i for e in epochs([SourcePlan(20, 1.5), SourcePlan(4, 2.5), SourcePlan(3, 1)], 0) for i in e)
    assert sum(twice[i] for i in range(20, 24)) == 10 and {twice[i] for i in range(20, 24)} <= {2, 3}
    assert [twice[i] for i in range(24, 27)] == [1, 1, 1]


def test_the_order_of_the_data():
    """Nothing is shuffled: the main data as they come, the next stretch of the others evenly among them."""
    (alone, part) = epochs([SourcePlan(10_000_000, 1.5)], None)
    assert alone == range(10_000_000) and part == range(5_000_000)  # neither is in memory
    first, second = epochs([SourcePlan(6, 2), SourcePlan(4, 1.5)], None)
    assert first == [0, 6, 1, 2, 7, 3, 4, 8, 5] and second == [0, 9, 1, 2, 6, 3, 4, 7, 5]
    steps = plan([1] * 11, [SourcePlan(11, 1)], None, examples_per_step=4, max_steps=2)
    assert [step.examples for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    turns = plan([1] * 8, [SourcePlan(5, 1), SourcePlan(3, 1)], None, examples_per_step=2, phases=(1, 1))
    assert [step.examples for step in turns] == [[5, 6], [0, 1], [7], [2, 3], [4]]


def test_rows_that_wait_for_a_pack_are_in_turn_and_shuffled_ones_are_not():
    lengths = gsm8k_like(2000)

    def steps_of(seed):
        found = [0] * 2000
        for number, step in enumerate(plan(lengths, [SourcePlan(2000, 1)], seed, tokens_per_step=9000)):
            for i in step.examples:
                found[i] = number
        return found

    assert is_in_turn(steps_of(None), WINDOW - 1) and not is_in_turn(steps_of(0), WINDOW - 1)
    assert not is_in_turn(steps_of(None)) and is_in_turn(sorted(steps_of(None)))
    assert is_in_turn([2, 3, 1, 1], wraps=True) and not is_in_turn([2, 3, 1, 1])
    assert is_in_turn([1, 2, 1], wraps=True) and not is_in_turn([2, 1, 3, 1], wraps=True)


def fill_rate(lengths: list[int], tokens: int, micro: int) -> float:
    """Share of the micro-batches' room that holds tokens, over an epoch without its last step."""
    steps = list(plan(lengths, [SourcePlan(len(lengths), 1)], tokens_per_step=tokens))[:-1]
    used = [[sum(lengths[s.examples[i]] for i in batch) for batch in _micro_batches(lengths, s, micro)] for s in steps]
    return sum(map(sum, used)) / sum(micro * len(u) for u in used)


def _micro_batches(lengths, step, micro):
    return assign_micro_batches([lengths[i] for i in step.examples], micro)


@pytest.mark.parametrize("packs", [1, 2, 3, 8, 32])
def test_micro_batches_are_at_least_98_percent_full(packs):
    assert fill_rate(gsm8k_like(), packs * 4096, 4096) >= 0.98


def test_micro_batches_of_gsm8k_are_at_least_98_percent_full(shared, embedded):
    tokenizer = load_tokenizer(embedded)
    lines = (shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()
    texts = [" ".join((row["question"], row["answer"])) for row in map(json.loads, lines)]
    lengths = [len(tokenizer.encode(text)) + 14 for text in texts]  # 14: what chat:vanilla puts round them
    for packs in (1, 8):
        assert fill_rate(lengths, packs * 4096, 4096) >= 0.98


def test_what_is_passed_over_comes_with_the_next_pack():
    rng = random.Random(0)
    lengths = [rng.randint(50, 2000) for _ in range(2000)]
    order = list(range(2000))
    place = {}
    for number, group in enumerate(fill(lengths, order, PACK)):
        place |= dict.fromkeys(group, number)
    in_order = sorted(place, key=place.get)
    assert max(abs(i - at) for at, i in enumerate(in_order)) <= 2 * WINDOW


def test_long_examples_get_a_pack_or_a_step_of_their_own():
    assert list(fill([3, 3, 5, 9, 1], range(5), 6)) == [[0, 1], [2, 4], [3]]
    lengths = [PACK + 900, 10, 3 * PACK, 20]
    assert [sorted(g) for g in fill(lengths, range(4), 2 * PACK)] == [[0, 1, 3], [2]]


def test_micro_batches_hold_everything_and_keep_the_limit():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        micro = rng.randint(1, 100)
        packed = assign_micro_batches(lengths, micro)
        assert sorted(i for batch in packed for i in batch) == list(range(len(lengths)))
        assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= micro for batch in packed)
        for size in (1, 2, 4):
            by_rank = [rank_micro_batches(lengths, micro, rank, size) for rank in range(size)]
            assert sorted(i for own in by_rank for batch in own for i in batch) == list(range(len(lengths)))
            assert max(len(own) for own in by_rank) <= -(-len(packed) // size)
            for own in by_rank:
                assert all(len(b) == 1 or sum(lengths[i] for i in b) <= max(micro, *lengths) for b in own)


def test_ranks_get_even_by_rank():
    lengths = gsm8k_like(160)
    loads = [sum(lengths[i] for b in rank_micro_batches(lengths, 4096, rank, 4) for i in b) for rank in range(4)]
    assert max(loads) <= 1.03 * min(loads)
    few = [rank_micro_batches([5, 5], 4096, rank, 4) for rank in range(4)]
    assert [len(own) for own in few] == [1, 1, 0, 0]


def sides(steps, count: int = 48) -> str:
    """M for a step on the first source, s for one on the others; no step is on both."""
    kinds = [{i < count for i in step.examples} for step in steps]
    assert all(len(kind) == 1 for kind in kinds)
    return "".join("M" if kind == {True} else "s" for kind in kinds)


@pytest.mark.parametrize(
    ("phases", "mixed", "wanted", "told"),
    [
        ((1, 3), 2.5, "sMMM" * 6 + "s" + "M" * 6, "last 6 steps are on the main data alone.* 1.14 times"),
        ((2, 4), 2.5, "ssMMMM" * 3 + "s" + "M" * 12, "last 12 steps are on the main data alone.* 1.71 times"),
        ((1, 6), 2.5, "sMMMMMM" * 4 + "sss", "last 3 steps are on the data mixed in alone.* 0.571 times"),
        ((3, 24), 1, "sss" + "M" * 24, None),
    ],
)
def test_steps_take_turns_until_one_side_is_used_up(phases, mixed, wanted, told):
    sources = [SourcePlan(48, 2), SourcePlan(6, mixed), SourcePlan(4, mixed)]
    steps = list(plan([1] * 58, sources, examples_per_step=4, phases=phases))
    assert sides(steps) == wanted
    visits = Counter(i for s in steps for i in s.examples)
    assert all(visits[i] == 2 for i in range(48))
    assert sum(visits[i] for i in range(48, 58)) == 10 * mixed
    assert {visits[i] for i in range(48, 58)} <= {math.floor(mixed), math.ceil(mixed)}
    assert [s.turn for s in steps] == [len(list(groupby(wanted[: n + 1]))) - 1 for n in range(len(wanted))]
    assert [s.epoch for s in steps] == sorted(s.epoch for s in steps) and steps[-1].epoch < 2
    found = uneven_turns(steps, phases, 48)
    assert found is None if told is None else re.search(told, found)


def test_in_turns_the_first_source_has_the_order_of_a_run_without_others():
    alone = plan([1] * 48, [SourcePlan(48, 2)], 5, examples_per_step=5)
    steps = list(plan([1] * 58, [SourcePlan(48, 2), SourcePlan(10, 2)], 5, examples_per_step=5, phases=(1, 2)))
    assert [s.examples for s in steps if s.examples[0] < 48] == [s.examples for s in alone]
    again, other = (plan([1] * 58, [SourcePlan(48, 2), SourcePlan(10, 2)], seed, 5, phases=(1, 2)) for seed in (5, 6))
    assert list(again) == steps != list(other)
    assert len(list(plan([1] * 58, [SourcePlan(48, 2), SourcePlan(10, 2)], 5, 5, max_steps=4, phases=(1, 2)))) == 4


def test_turns_of_steps_of_tokens():
    lengths = gsm8k_like(350)
    sources = [SourcePlan(300, 1.5), SourcePlan(50, 2)]
    steps = list(plan(lengths, sources, tokens_per_step=9000, phases=(1, 2)))
    assert sides(steps, 300).startswith("sMMsMMs")
    assert max(sum(lengths[i] for i in s.examples) for s in steps) <= 9000
    visits = Counter(i for s in steps for i in s.examples)
    assert sum(visits[i] for i in range(300)) == 450 and all(visits[i] == 2 for i in range(300, 350))
