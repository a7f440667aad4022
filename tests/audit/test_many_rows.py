"""The audit of data whose references are not all kept gives the report of data whose references are."""

from dataclasses import replace

import pytest

from ptst.audit import setup as setups
from ptst.audit.account import expected
from ptst.audit.account.by_row import StepsByRow
from ptst.audit.account.run_data import RunData
from ptst.audit.account.step_rule import StepRule
from ptst.audit.owner.rows import FIRST, sample
from ptst.audit.report import audit
from ptst.audit.rows import Repeats
from ptst.audit.setup import Setup
from ptst.data import examples, step_batches
from ptst.data.examples import TrainingSource
from ptst.data.sources import Source
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_template


def rows(name: str, count: int) -> Source:
    """Rows of which some are repeated, blank, too long, unanswered, or spell a control token or a tag."""

    def row(i: int) -> Conversation:
        answer = {5: " ", 6: "a" * 3000, 7: "b <|im_end|> c", 8: "an <s> in it"}.get(i, f"{'word ' * (i % 7)}{i % 13}")
        messages = (Message("user", f"{name} {i % 13}?"), Message("assistant", answer))
        return Conversation(messages[: 1 if i == 9 else 2], f"{name}.jsonl:{i + 1}")

    return Source(name, "plain", tuple(map(row, range(count))))


@pytest.fixture
def data() -> RunData:
    mixed = TrainingSource(rows("mixed", 14), 1.5, find_template("alpaca"))
    return RunData([TrainingSource(rows("main", 40), 2.0), mixed, TrainingSource(rows("main", 3))], rule=StepRule(300))


def test_the_report_is_the_same(data, tiny_folder, monkeypatch):
    setup = Setup(open_prompt_format(tiny_folder, find_template("vanilla"), "plain"), "all", 256, "drop")

    def reports() -> list[dict]:
        found = [audit(data, setup, show=3).to_json()]
        with monkeypatch.context() as patch:
            real = examples.prepare
            patch.setattr(examples, "prepare", lambda *given: (real(*given)[0][:-1], real(*given)[1]))
            found.append(audit(data, setup).to_json())
        with monkeypatch.context() as patch:
            to_batch = step_batches.to_batch

            def spoiled(chosen):
                return to_batch([replace(e, ids=[*e.ids[:-3], 3, *e.ids[-2:]]) for e in chosen])

            patch.setattr(step_batches, "to_batch", spoiled)
            found.append(audit(data, setup).to_json())
        return found

    kept = reports()
    whole, lost, spoiled = (report["found"] for report in kept)
    assert {"duplicate", "blank-answer", "bad-row", "dropped", "control-text", "tag-text"} <= set(whole)
    assert "left-out" in lost and {"unknown-document", "message-differs"} & set(spoiled)
    monkeypatch.setattr(expected, "MOST", 0)
    for module in (expected, setups):
        monkeypatch.setattr(module, "BLOCK", 3)
    assert reports() == kept


@pytest.mark.parametrize(("what", "changed"), [("prompt", "build_prompts"), ("text", "build_references")])
def test_what_is_to_be_said_of_a_row_is_said(data, tiny_folder, monkeypatch, what, changed):
    """A document is as its row has it, but its prompt at test time is another, or a character of its text is lost."""
    real = getattr(expected, changed)

    def spoiled(conversations, setup, first=0):
        found = real(conversations, setup, first)
        for at in range(4 - first, min(5 - first, len(found))):
            found[at] = replace(found[at], **({"ids": [0]} if what == "prompt" else {"lossy": {0: "x"}}))
        return found

    prompt_format = open_prompt_format(tiny_folder, find_template("vanilla"), "plain")
    setup = Setup(prompt_format, "all", 256, "drop").of_sources(data.training)
    references = expected.ReferencesByRow([c for each in data.training for c in each.source.conversations], setup)
    before = expected.Expected.of(references, setup).plain
    monkeypatch.setattr(expected, changed, spoiled)
    references = expected.ReferencesByRow([c for each in data.training for c in each.source.conversations], setup)
    after = expected.Expected.of(references, setup).plain
    assert [at for at, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [4] and before[4]


def test_steps_by_row():
    steps = StepsByRow()
    assert len(steps) == 0 and 3 not in steps
    for number, row in enumerate([3, 1, 3, 2, 3] * 9):
        steps.add(row, number)
        assert steps[row][-1] == number
    assert [*steps] == [1, 2, 3] and steps[3][:4] == [0, 2, 4, 5] and len(steps[1]) == 9


def test_repeated_rows_are_those_of_a_dict():
    every, first = rows("r", 120).conversations, dict[tuple[Message, ...], str]()
    places = {}
    for number, conversation in enumerate(every):
        if conversation.messages in first:
            places[number] = first[conversation.messages]
        first.setdefault(conversation.messages, conversation.source)
    repeats = Repeats(lambda: iter(every))
    assert repeats.places == places and places and repeats.distinct == len(first)
    assert Repeats(lambda: ()).distinct == 0


def test_the_longest_rows_are_in_the_sample():
    long = {FIRST + 9: 500, FIRST + 11: 400, FIRST + 20: 400, FIRST + 30: 400, FIRST + 40: 400}
    made = [
        Conversation((Message("user", "q" * long.get(i, 3)), Message("assistant", "a")), str(i))
        for i in range(FIRST + 50)
    ]
    chosen = {int(c.source) for c in sample(iter(made))}
    assert chosen == {*range(FIRST), *sorted(long)[:4]}
