"""The ledger: every row is accounted for, and spoiling any function between encoding and loss is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ptst.audit.account.batch_checks import BatchChecks
from ptst.audit.account.document_check import shares_prefixes
from ptst.audit.account.order import is_clustered, is_repeated, is_sorted
from ptst.audit.account.run_data import RunData
from ptst.audit.account.step_rule import StepRule
from ptst.audit.report import audit
from ptst.audit.setup import Setup
from ptst.data import examples, order, packing, step_batches
from ptst.data.examples import TrainingSource
from ptst.data.packing import IGNORE_INDEX, share_prefixes, to_batch
from ptst.data.sources import Source
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer

assert BatchChecks  # the names that the faults below replace are looked up in these modules


def source(name: str, count: int, words: str = "answer ") -> Source:
    def row(i: int) -> Conversation:
        messages = (Message("user", f"{name} question {i}?"), Message("assistant", f"{words * (1 + i % 7)}{i}"))
        return Conversation(messages, f"{name}.jsonl:{i + 1}")

    return Source(name, "plain", tuple(map(row, range(count))))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    from tests.tiny import write_tiny_model

    tokenizer = load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))
    template, family = find_template("chat:llama"), find_family("plain")
    return Setup(PromptFormat(template, family, CHAT_FORMATS["chatml"], tokenizer), max_length=2048)


MAIN, MIXED, HELD_OUT = source("main", 48), source("mixed", 25, "no, "), source("val", 10, "well ")
RULES = {
    "examples": StepRule(1400),
    "three": StepRule(4000, examples_per_step=3, seed=7),
    "tokens": StepRule(1400, tokens_per_step=3000),
    "turns": StepRule(1400, examples_per_step=4, phases=(1, 2)),
    "turns of tokens": StepRule(1400, tokens_per_step=3000, phases=(3, 1)),
}


def run(rule: StepRule = RULES["examples"], epochs: float = 2.0, mixed: float = 2.0, **changes) -> RunData:
    return RunData([TrainingSource(MAIN, epochs), TrainingSource(MIXED, mixed)], HELD_OUT, rule, **changes)


def errors(report) -> list[str]:
    return sorted({f.rule for f in report.findings if f.level != "info"})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("epochs", "mixed"), [(1, 1), (3, 2.5), (2.5, 0.3), (0.5, 4)])
@pytest.mark.parametrize("max_steps", [None, 5, 500])
def test_a_run_as_planned_is_clean(setup, rule, epochs, mixed, max_steps):
    report = audit(run(replace(RULES[rule], max_steps=max_steps), epochs, mixed), setup)
    assert [str(f) for f in report.findings if f.level != "info"] == []
    taken = [account.taken for account in report.account]
    whole = [-(-epochs * 48 // 1), -(-mixed * 25 // 1), 10]
    assert taken == whole if max_steps != 5 else all(t <= w for t, w in zip(taken, whole, strict=True))
    assert ("part-of-epoch" in report.found) == (max_steps == 5 or epochs % 1 > 0 or mixed % 1 > 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("epochs", "mixed"), [(1, 1), (2.5, 3.3)])
def test_the_order_of_the_data_is_clean_where_it_is_asked_for_alone(setup, monkeypatch, rule, epochs, mixed):
    rule = replace(RULES[rule], order="file")
    assert errors(audit(run(rule, epochs, mixed), setup)) == []
    monkeypatch.setattr(order, "seed_of", lambda _order, seed: seed)
    assert rule.tokens_per_step or errors(audit(run(rule, epochs, mixed), setup)) == ["order"]  # shuffled
    monkeypatch.setattr(order, "seed_of", lambda _order, _seed: None)
    assert "order" in errors(audit(run(replace(rule, order="random"), epochs, mixed), setup))


def test_the_account(setup):
    rows = [*MAIN.conversations, Conversation((Message("user", "unanswered"),), "main.jsonl:49")]
    long = Conversation((Message("user", "q"), Message("assistant", "a" * 3000)), "main.jsonl:50")
    data = replace(run(), training=[TrainingSource(replace(MAIN, conversations=(*rows, long)), 2.0)])
    report = audit(data, replace(setup, too_long="drop"))
    main, held_out = report.account
    assert (main.read, main.bad, main.dropped, main.examples, main.trained, main.taken) == (50, 1, 1, 48, 48, 96)
    assert (main.steps, main.first, main.last) == (12, 1, 12)
    assert main.rows["main.jsonl:49"] == "bad" and main.rows["main.jsonl:50"] == "dropped"
    assert all(len(steps) == 2 and steps[0] <= 6 < steps[1] for steps in [*main.rows.values()][:48])
    assert (held_out.part, held_out.read, held_out.taken, held_out.steps) == ("validation", 10, 10, 1)
    assert report.to_json()["account"][0]["rows"]["main.jsonl:50"] == "dropped"


def test_the_account_of_what_is_mixed_in(setup):
    _, mixed, _ = audit(run(mixed=1.0), setup).account
    steps = [mixed.rows[c.source] for c in MIXED.conversations]
    assert (mixed.examples, mixed.trained, mixed.taken) == (25, 25, 25) and all(len(own) == 1 for own in steps)
    assert mixed.steps == len({step for own in steps for step in own})


def test_a_batch_of_rows_that_were_shown_is_not_shown_again(setup):
    """Two epochs: the flagged row's second batch gives way to one with other rows."""
    blank = replace(MAIN.conversations[0], messages=(Message("user", "q"), Message("assistant", " ")))
    data = replace(run(), training=[TrainingSource(replace(MAIN, conversations=(blank, *MAIN.conversations[1:])), 2.0)])
    first, second = audit(data, setup, show=2).packs[:2]
    assert [blank.source in {row for row, _ in pack.documents} for pack in (first, second)] == [True, False]


def test_nothing_left_is_an_error(setup):
    report = audit(run(), replace(setup, max_length=3, too_long="drop"))
    assert [f.row for f in report.findings if f.rule == "no-example"] == ["main", "mixed", "val"]
    assert report.verdict == "error" and report.packs == []


def test_a_row_that_is_mixed_in_is_checked(setup):
    blank = Conversation((Message("user", "q"), Message("assistant", " ")), "mixed.jsonl:9")
    data = replace(run(), training=[TrainingSource(MAIN), TrainingSource(replace(MIXED, conversations=(blank,)))])
    found = [(f.rule, f.row) for f in audit(data, setup).findings if f.level != "info"]
    assert found == [("blank-answer", "mixed.jsonl:9")]
    data = replace(run(), validation=replace(HELD_OUT, conversations=(blank,)))
    report = audit(data, setup)
    assert [(f.rule, f.row) for f in report.findings if f.level != "info"] == [("blank-answer", "mixed.jsonl:9")]
    assert report.rows[0][0] == "mixed.jsonl:9"  # shown, as it has a finding


def test_a_pack_is_shown_as_it_is_trained(setup):
    report = audit(run(), setup, show=3)
    pack = report.packs[0]
    assert pack.step == 1 and len(pack.documents) == len(pack.batch.rows) > 1
    assert [t.id for _, tokens in pack.documents for t in tokens] == pack.batch.tokens
    assert [t.position for _, tokens in pack.documents for t in tokens] == pack.batch.position_ids
    labels = [IGNORE_INDEX if t.label is None else t.label for _, tokens in pack.documents for t in tokens]
    assert labels == pack.batch.labels
    assert [t.document for t in pack.documents[1][1]] == [1] * len(pack.documents[1][1])
    assert len(report.rows) == 3


FAULTS: dict[str, tuple[object, str, Callable, set[str]]] = {}


def fault(module, name: str, *rules: str):
    """A function that takes the place of `module.name` and gets the real one first; any of `rules` finds it."""

    def note(spoiled):
        FAULTS[f"{name}-{spoiled.__name__}"] = (module, name, spoiled, set(rules))
        return spoiled

    return note


@fault(step_batches, "to_batch", "not-trained", "steps", "nothing-trained")
def loses_the_last_document(real, chosen):
    return real(chosen[:-1] or chosen)


@fault(step_batches, "to_batch", "trained-twice", "steps")
def doubles_a_document(real, chosen):
    return real([*chosen, chosen[0]])


@fault(step_batches, "to_batch", "row-exchanged", "message-differs")
def exchanges_rows(real, chosen):
    batch = real(chosen)
    return replace(batch, rows=batch.rows[::-1]) if len(chosen) > 1 else batch


@fault(step_batches, "to_batch", "labels")
def labels_are_the_tokens(real, chosen):
    batch = real(chosen)
    pairs = zip(batch.tokens, batch.labels, strict=True)
    return replace(batch, labels=[IGNORE_INDEX if label == IGNORE_INDEX else token for token, label in pairs])


@fault(step_batches, "to_batch", "position-ids")
def positions_run_on(real, chosen):
    batch = real(chosen)
    return replace(batch, position_ids=list(range(len(batch.tokens))))


@fault(step_batches, "to_batch", "unknown-document")
def rows_count_from_one(real, chosen):
    batch = real(chosen)
    return replace(batch, rows=[row + 100 for row in batch.rows])


@fault(step_batches, "rank_micro_batches", "not-trained", "steps")
def loses_a_micro_batch(real, lengths, *how):
    return real(lengths, *how)[:-1] or real(lengths, *how)


@fault(step_batches, "rank_micro_batches", "trained-twice")
def computes_a_micro_batch_twice(real, lengths, *how):
    return [*real(lengths, *how), real(lengths, *how)[0]]


@fault(step_batches, "rank_micro_batches", "micro-batch")
def packs_beyond_the_limit(_real, lengths, *_how):
    return [list(range(len(lengths)))]


@fault(packing, "assign_micro_batches", "micro-batch")
def packs_one_by_one(_real, lengths, *_how):
    return [[i] for i in range(len(lengths))]


@fault(packing, "_next_fit", "micro-batch", "not-trained", "steps")
def next_fit_forgets_the_last(real, lengths, size):
    return real(lengths[:-1], size) if len(lengths) > 1 else real(lengths, size)


@fault(step_batches, "share_prefixes", "shared-prefix")
def sharing_loses_a_label(real, batch):
    shared = real(batch)
    last = max(i for i, label in enumerate(shared.labels) if label != IGNORE_INDEX)
    labels = [IGNORE_INDEX if i == last else label for i, label in enumerate(shared.labels)]
    return replace(shared, labels=labels)


@fault(step_batches, "share_prefixes", "shared-prefix")
def sharing_takes_another_prefix(real, batch):
    shared = real(batch)
    return replace(shared, shared_prefixes=[(start, max(0, size - 1)) for start, size in shared.shared_prefixes])


@fault(order, "epochs", "order")
def no_shuffle(real, sources, seed):
    return [sorted(epoch) for epoch in real(sources, seed)]


@fault(order, "epochs", "order")
def every_epoch_in_the_same_order(real, sources, seed):
    return [next(real(sources, seed)) for _ in real(sources, seed)]


@fault(order, "epochs", "order")
def the_seed_is_ignored(real, sources, _seed):
    return real(sources, 0)


@fault(order, "epochs", "order")
def the_order_is_another_every_time(real, sources, _seed):
    return real(sources, random.random())


@fault(order, "epochs", "not-trained", "visits")
def an_epoch_loses_its_last(real, sources, seed):
    return [epoch[:-1] for epoch in real(sources, seed)]


@fault(order, "epochs", "trained-twice")
def an_epoch_takes_one_twice(real, sources, seed):
    return [[*epoch[:-1], epoch[0]] for epoch in real(sources, seed)]


@fault(order, "epochs", "visits", "not-trained")
def an_epoch_is_missing(real, sources, seed):
    return list(real(sources, seed))[:-1]


@fault(order, "epochs", "order")
def what_is_mixed_in_comes_last(real, sources, seed):
    return [sorted(epoch, key=lambda i: i >= sources[0].count) for epoch in real(sources, seed)]


@fault(order, "epochs", "visits", "order")
def all_is_mixed_into_the_first_epoch(real, sources, seed):
    first, *rest = real(sources, seed)
    later = [i for epoch in rest for i in epoch if i >= sources[0].count]
    return [[*first, *later], *([i for i in epoch if i < sources[0].count] for epoch in rest)]


@fault(order, "_stream", "trained-twice", "not-trained")
def a_stream_repeats_itself(real, start, count, rng):
    for index in real(start, count, rng):
        yield start + (index - start) % (count - 3)


@fault(order, "plan", "steps")
def steps_are_smaller(real, *how):
    for step in real(*how):
        half = len(step.examples) // 2
        yield replace(step, examples=step.examples[:half])
        yield replace(step, examples=step.examples[half:])


@fault(order, "plan", "not-trained", "steps", "visits")
def a_step_is_lost(real, *how):
    for number, step in enumerate(real(*how)):
        if number != 2:
            yield step


@fault(order, "plan", "trained-twice")
def a_step_is_taken_twice(real, *how):
    for number, step in enumerate(real(*how)):
        yield from [step, step] if number == 2 else [step]


@fault(order, "plan", "steps")
def the_plan_tells_another_epoch(real, *how):
    for step in real(*how):
        yield replace(step, epoch=int(step.epoch))


@fault(order, "plan", "steps", "trained-twice")
def the_plan_tells_no_epoch(real, *how):
    for step in real(*how):
        yield replace(step, epoch=0.0)


@fault(examples, "prepare", "left-out", "miscounted")
def preparing_loses_a_row(real, *given):
    made, record = real(*given)
    return made[:-1], record


@fault(examples, "prepare", "left-out")
def preparing_loses_a_row_and_counts_it(real, source, *given):
    made, record = real(source, *given)
    return made[:-1], replace(record, dropped=record.dropped + 1)


@fault(examples, "prepare", "trained-twice")
def preparing_doubles_a_row(real, *given):
    made, record = real(*given)
    return [*made, made[0]], record


@fault(examples, "prepare", "row-exchanged", "message-differs")
def preparing_numbers_rows_from_the_end(real, *given):
    made, record = real(*given)
    return [replace(e, row=len(made) - 1 - e.row) for e in made], record


@fault(examples, "prepare", "miscounted")
def preparing_counts_wrong(real, *given):
    made, record = real(*given)
    return made, replace(record, trained_tokens=record.trained_tokens + 1)


@fault(examples, "SourcePlan", "visits", "not-trained")
def mixing_forgets_the_epochs(real, count, _epochs, *more):
    return real(count, 1.0, *more)


TURNS = {}


def turned(spoiled):
    """A function that takes the place of `order._turns` and gets the real one first; rule `steps` finds it."""
    TURNS[spoiled.__name__] = spoiled
    return spoiled


@turned
def the_main_data_begin(real, sources, seed, phases, grouped):
    for steps in real(sources, seed, phases, grouped):
        yield [*steps[1:], steps[0]]


@turned
def turns_are_longer(real, sources, seed, phases, grouped):
    return real(sources, seed, tuple(2 * p for p in phases), grouped)


@turned
def turns_are_exchanged(real, sources, seed, phases, grouped):
    return real(sources, seed, phases[::-1], grouped)


@turned
def no_turns(real, sources, seed, _phases, grouped):
    return [[(0, group) for group in grouped(part)] for part in order.epochs(sources, seed)]


@turned
def what_is_mixed_in_goes_first(real, *given):
    return [sorted(steps, key=lambda step: step[1][0] < 48) for steps in real(*given)]


@turned
def one_example_is_on_the_other_side(real, *given):
    for steps in real(*given):
        (a, first), (b, second), *rest = steps
        yield [(a, [*first[:-1], second[0]]), (b, [first[-1], *second[1:]]), *rest]


@turned
def a_step_on_what_is_mixed_in_is_small(real, *given):
    """The first of them has one example fewer, the last of the run, which is not full, one more."""
    epochs = [list(steps) for steps in real(*given)]
    (turn, first), *rest = epochs[0]
    last = max((n, k) for n, steps in enumerate(epochs) for k, (_, group) in enumerate(steps) if group[0] >= 48)
    epochs[0] = [(turn, first[:-1]), *rest]
    number, group = epochs[last[0]][last[1]]
    epochs[last[0]][last[1]] = (number, [*group, first[-1]])
    return epochs


@pytest.mark.parametrize("name", TURNS)
def test_turns_that_are_not_as_asked_are_found(setup, monkeypatch, name):
    real = order._turns
    monkeypatch.setattr(order, "_turns", lambda *given: TURNS[name](real, *given))
    found = errors(audit(run(RULES["turns"]), setup))
    assert "steps" in found, found


# What comes after the order takes the steps as they are, turns or none.
@pytest.mark.parametrize("name", [n for n, f in FAULTS.items() if f[0] is order and f[1] == "plan"])
def test_a_spoiled_function_is_found_in_turns(setup, monkeypatch, name):
    module, attribute, spoiled, rules = FAULTS[name]
    real = getattr(module, attribute)
    monkeypatch.setattr(module, attribute, lambda *given: spoiled(real, *given))
    assert rules & set(errors(audit(run(RULES["turns"]), setup)))


@pytest.mark.parametrize("name", FAULTS)
def test_a_spoiled_function_is_found(setup, monkeypatch, name):
    module, attribute, spoiled, rules = FAULTS[name]
    real = getattr(module, attribute)
    monkeypatch.setattr(module, attribute, lambda *given: spoiled(real, *given))
    found = errors(audit(run(), setup))
    assert rules & set(found), found


@pytest.mark.parametrize("change", [-1, 1])
def test_the_limit_is_the_limit(setup, monkeypatch, change):
    """A row of exactly the limit is kept, one above is dropped: with the limit moved by one, both are found."""
    tokens = len(setup.prompt_format.encode(MAIN.conversations[0]).ids)
    limited = replace(setup, max_length=tokens, too_long="drop")
    report = audit(run(), limited)
    assert errors(report) == [] or errors(report) == ["no-example"]
    real = examples.prepare
    monkeypatch.setattr(examples, "prepare", lambda s, p, limit, *rest: real(s, p, limit + change, *rest))
    assert {"left-out", "too-long"} & set(errors(audit(run(), limited)))


def test_packs_of_tokens_that_are_too_small_or_too_large(setup, monkeypatch):
    rule, real = RULES["tokens"], order.fill
    monkeypatch.setattr(order, "fill", lambda lengths, order_, _tokens: [[i] for i in order_])
    assert "steps" in errors(audit(run(rule), setup))
    monkeypatch.setattr(order, "fill", lambda lengths, order_, tokens: real(lengths, order_, 2 * tokens))
    assert "steps" in errors(audit(run(rule), setup))


def test_an_example_longer_than_a_pack_is_told(setup):
    long = Conversation((Message("user", "q"), Message("assistant", "ab " * 300)), "main.jsonl:49")
    data = RunData(
        [TrainingSource(replace(MAIN, conversations=(*MAIN.conversations, long)))], rule=StepRule(900, 8, 800)
    )
    report = audit(data, setup)
    assert report.verdict == "info" and report.found == {"longer-than-pack": 1}


def test_sharing_prefixes_is_checked_in_all_its_parts():
    def document(*ids: int) -> Example:
        return Example([*range(20), *ids], [False] * 20 + [True] * len(ids), row=ids[0])

    whole = to_batch([document(30, 31), document(32), document(33, 34, 35)])
    shared = share_prefixes(whole)
    assert shares_prefixes(whole, shared) and shared.shared_prefixes[1] == (0, 19)
    for field in ("tokens", "position_ids", "labels"):
        for i, value in enumerate(getattr(shared, field)):
            spoiled = [*getattr(shared, field)]
            spoiled[i] = value + 1
            assert not shares_prefixes(whole, replace(shared, **{field: spoiled})), (field, i)
    assert not shares_prefixes(whole, replace(shared, rows=shared.rows[::-1]))
    for n, (start, size) in enumerate(shared.shared_prefixes):
        for other in [(start, size + 1), *([(start + 1, size), (start, size - 1)] if size else [])]:
            spoiled = [*shared.shared_prefixes]
            spoiled[n] = other
            assert not shares_prefixes(whole, replace(shared, shared_prefixes=spoiled)), (n, other)


@pytest.mark.parametrize(("count", "size"), [(21, 1), (24, 8), (60, 8), (200, 50), (300, 299), (25, 25)])
def test_a_shuffle_is_told_from_none(count, size):
    rng, provable = random.Random(0), size < count - 1
    plain = [i // size for i in range(count)]
    for _ in range(200):
        one, two = ([place // size for place in rng.sample(range(count), count)] for _ in range(2))
        assert not is_sorted(one) and not is_repeated(one, two)
        assert not is_clustered(rng.sample(one, 21), one)
        assert is_repeated(one, [step + 9 for step in one]) == provable
    assert is_sorted(plain) == is_sorted(plain[::-1]) == provable
    assert not is_sorted(plain[:20])
    steps = SimpleNamespace(own=[*range(75, 100)], every=[*range(100)])
    assert is_clustered(steps.own, steps.every) and not is_clustered(range(0, 100, 4), steps.every)
