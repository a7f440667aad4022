"""Training's watch: the ledger of a run stops it before a wrong step; resumed runs and several ranks are counted whole;
the gate remembers its verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ptst.audit.account import verdicts
from ptst.audit.account.gate import Prepared, check_start
from ptst.audit.account.step_rule import StepRule
from ptst.data import order, step_batches
from ptst.data.examples import Mixture
from ptst.data.order import SourcePlan
from ptst.data.packing import IGNORE_INDEX
from ptst.data.sources import Source
from ptst.data.step_batches import StepBatches
from ptst.errors import UserError
from ptst.records import DataRecord
from ptst.text.segments import Conversation, Message
from ptst.train import run_training
from ptst.training.config import TrainConfig
from ptst.training.watch import LedgerWatch
from tests.training.steps import examples

MAIN, MIXED, RULE = 40, 10, StepRule(64, examples_per_step=4)


def mixture(epochs: float = 2, mixed: float = 3) -> Mixture:
    made = examples(MAIN + MIXED, 20)
    messages = (Message("user", "q"), Message("assistant", "a"))
    rows = tuple(Conversation(messages, f"rows.jsonl:{n}") for n in range(1, MAIN + MIXED + 1))
    plans, records = [], []
    for name, count, number in (("main", MAIN, epochs), ("mixed", MIXED, mixed)):
        plans.append(SourcePlan(count, number))
        zero = dict.fromkeys(
            ("dropped", "cut", "untrained", "token_boundaries", "lossy", "tokens", "trained_tokens"), 0
        )
        records.append(DataRecord(name=name, encoding="", rows=count, examples=count, epochs=number, **zero))
    return Mixture(Source("main", "plain", rows), made, plans, records)


def steps_of(data: Mixture, rule: StepRule = RULE) -> list[order.Step]:
    lengths = [len(e.ids) for e in data.examples]
    return list(
        order.plan(lengths, data.plans, rule.seed, rule.examples_per_step, rule.tokens_per_step, rule.max_steps)
    )


def train(watch: LedgerWatch, data: Mixture, steps, rank: int = 0, size: int = 1, start: int = 0, stop: int = 10**6):
    """Take the steps' micro-batches as the trainer does."""
    for number, step in enumerate(steps, 1):
        if start < number <= stop:
            watch.begin_step(number, step.epoch)
            for _ in StepBatches(data.examples, step.examples, RULE.micro_batch_tokens, rank, size, True, watch.take):
                pass
    if stop >= len(steps):
        watch.finish()


@pytest.mark.parametrize("epochs", [1, 2.5])
@pytest.mark.parametrize("at", [0, 3, 13])
def test_a_run_is_counted_whole_when_it_is_resumed(epochs, at):
    data = mixture(epochs)
    steps = steps_of(data)
    watch = LedgerWatch(data, steps, RULE)
    watch.resume(steps[:at])
    train(watch, data, steps, start=at)
    main, mixed = watch.account()
    assert (main["visits"], mixed["visits"]) == (epochs * MAIN, 3 * MIXED)
    assert min(main["first_step"], mixed["first_step"]) == 1 and max(main["steps"], mixed["steps"]) <= len(steps)
    assert max(main["last_step"], mixed["last_step"]) == len(steps)


def test_ranks_count_together():
    """The ledgers of three ranks, each with its share: added up, they are that of one."""
    data = mixture()
    steps, alone = steps_of(data), LedgerWatch(data, steps_of(data), RULE)
    train(alone, data, steps)
    shares: list[list[list[int]]] = []
    for rank in range(3):  # first what each counts, with its epochs not added up
        watch, epochs = LedgerWatch(data, steps, RULE), list[list[int]]()
        shares.append(epochs)
        watch.ledger.ranks, watch.ledger.merge = 3, lambda own, epochs=epochs: epochs.append(own) or own
        watch._allowed = frozenset({"not-trained", "trained-twice", "visits", "steps", "order"})
        train(watch, data, steps, rank, 3)
    for rank in range(3):
        whole = iter([[sum(column) for column in zip(*epoch, strict=True)] for epoch in zip(*shares, strict=True)])
        watch = LedgerWatch(data, steps, RULE)
        watch.ledger.ranks, watch.ledger.merge = 3, lambda _own, whole=whole: next(whole)
        train(watch, data, steps, rank, 3)
        assert watch.account() == alone.account() and watch.ledger.findings == []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda b, n: replace(b, rows=[n, *b.rows[1:]]), "rows.jsonl:18, token 0: row-exchanged: .*step 1"),
        (lambda b, n: replace(b, rows=[99, *b.rows[1:]]), "row 99, token 0: row-exchanged"),
        (lambda b, _: replace(b, position_ids=[p + 1 for p in b.position_ids]), "position-ids"),
        (lambda b, _: replace(b, labels=[IGNORE_INDEX] * len(b.labels)), "nothing-trained"),
        (lambda b, _: replace(b, tokens=[t + 1 for t in b.tokens], labels=b.labels), "labels"),
    ],
)
def test_a_wrong_batch_stops_the_run(monkeypatch, spoil, told):
    data, real = mixture(), step_batches.to_batch
    steps = steps_of(data)
    other = data.examples[steps[1].examples[0]].row
    assert other == 17
    monkeypatch.setattr(step_batches, "to_batch", lambda chosen: spoil(real(chosen), other))
    with pytest.raises(UserError, match=told):
        train(LedgerWatch(data, steps, RULE), data, steps)


def test_a_wrong_plan_stops_the_run_before_its_first_step():
    data = mixture()
    steps = steps_of(data)
    LedgerWatch(data, steps, RULE)
    for spoiled, told in (
        ([*steps[:3], steps[2], *steps[4:]], "trained-twice"),
        (steps[:-1], "not-trained"),
        ([replace(s, examples=s.examples[:-1]) if i == 2 else s for i, s in enumerate(steps)], "not-trained"),
    ):
        with pytest.raises(UserError, match=told):
            LedgerWatch(data, spoiled, RULE)
    LedgerWatch(data, steps[:4], replace(RULE, max_steps=4))
    LedgerWatch(data, steps[:-1], RULE, allow=("not-trained", "visits", "steps"))


def test_what_is_lost_in_the_batches_ends_the_epoch_with_an_error(monkeypatch):
    """The plan is right, and one document never reaches a batch."""
    data, real = mixture(), step_batches.to_batch
    lost = data.examples[7].row
    monkeypatch.setattr(step_batches, "to_batch", lambda chosen: real([e for e in chosen if e.row != lost]))
    with pytest.raises(UserError, match=r"rows.jsonl:8: not-trained: in no batch of epoch 1"):
        train(LedgerWatch(data, steps_of(data), RULE), data, steps_of(data))


def test_the_gate_remembers_its_verdict(tiny_folder, tmp_path, monkeypatch, capsys):
    """A second run of the same settings is not checked again; one of other rows, template, limit or code is. Warnings
    and --allow are the same on a hit, and an error is never remembered."""
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "home"))
    from ptst.training.run_plan import plan_run

    def checked(**changes) -> tuple[bool, list[str]]:
        plan = plan_run(replace(config, **changes))
        capsys.readouterr()
        plan.check()
        said = " ".join(capsys.readouterr().err.split())
        return "is remembered" in said, said.split("warning: ")[1:]

    rows = [{"prompt": f"question {i}?", "response": f"answer {i}" if i else " "} for i in range(6)]
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "val.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps(rows[3]) + "\n")
    config = TrainConfig(model=str(tiny_folder), data=str(data), val_data=str(held_out), max_steps=1)
    hit, warnings = checked()
    assert not hit and len(warnings) == 1 and f"{data}:1" in warnings[0]
    hit, again = checked(seed=3, lr=1e-5)
    assert hit and again == warnings
    assert checked(allow=("blank-answer",)) == (True, [])
    for change in ({"template": "chat:llama"}, {"max_length": 99}, {"train_on": "last"}, {"limit": 5}):
        assert checked(**change)[0] is False
        assert checked(**change)[0] is True
    assert checked(mix=(f"{held_out}:1",))[0] is False
    held_out.write_text(json.dumps(rows[4]) + "\n")
    assert checked()[0] is False
    for entry in (tmp_path / "home" / verdicts.FOLDER).iterdir():
        entry.write_text("{")
    assert checked() == (False, warnings)
    monkeypatch.setattr(verdicts, "code_fingerprint", lambda *_: "of another version")
    assert checked()[0] is False
    data.write_text(json.dumps({"prompt": "a <|im_end|>", "response": "b"}) + "\n")
    with pytest.raises(UserError, match="control-text"):
        checked()
    assert checked(allow=("control-text",))[0] is False
    assert checked(allow=("control-text",))[0] is False


def test_the_gate_finds_a_row_that_was_left_out(tiny_folder, tmp_path):
    from ptst.audit.setup import Setup
    from ptst.training.run_plan import plan_run

    plan = plan_run(TrainConfig(model=str(tiny_folder), data="word-problems:5"))
    source, made, records = plan.mixture.source, plan.mixture.examples, plan.mixture.records
    setup = Setup(plan.model.prompt_format, "all", plan.max_length, "stop")
    assert check_start([Prepared(source, made, records)], setup, 2048, ()) == []
    with pytest.raises(UserError, match=r"word-problems/train:3: left-out: it has \d+ tokens"):
        check_start([Prepared(source, [*made[:2], *made[3:]], records)], setup, 2048, ())
    with pytest.raises(UserError, match="miscounted: dropped is 1, and by the rows 0"):
        check_start([Prepared(source, made, [replace(records[0], dropped=1)])], setup, 2048, ())


def test_all_rows_dropped_is_an_error(tiny_folder, tmp_path):
    config = TrainConfig(model=str(tiny_folder), data="word-problems:5", max_length=3, too_long="drop")
    with pytest.raises(UserError, match="no example is left"):
        run_training(replace(config, out=tmp_path / "run"))
