"""A second exam: faults of other kinds than the known bugs, each at its row and token and by its cause."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ptst.audit.documents import check_documents
from ptst.data.packing import to_batch
from ptst.text.encode import Example, cut, first_difference
from tests.audit import more_faults, order_faults, token_faults, word_faults


def test_the_exam_is_whole():
    """The modules put their faults into the list when they are imported."""
    modules = (word_faults, order_faults, token_faults)
    counts = [sum(f.plant.__module__ == module.__name__ for f in more_faults.FAULTS) for module in modules]
    assert min(counts) > 20 and sum(counts) == len(more_faults.FAULTS) == len({f.name for f in more_faults.FAULTS})


@pytest.mark.parametrize("fault", more_faults.FAULTS, ids=lambda f: f.name)
def test_found_by_its_cause(tokenizers, fault):
    bench = more_faults.bench(*tokenizers, fault.chat_format, fault.template, fault.family, **fault.asked)
    batch, row, token, *changed = fault.plant(bench)
    bench = changed[0] if changed else bench
    found = [f for f in check_documents(batch, bench.rows, bench.setup) if f.level == "error"]
    wanted = [f for f in found if (f.rule, f.row, f.token) == (fault.rule, bench.rows[row].source, token)]
    assert wanted, found
    assert fault.words in wanted[0].message, wanted[0].message
    extra = [f for f in found if f is not wanted[0]]
    assert not extra or fault.name == "a_question_is_trained_beside_a_wrong_system_prompt", extra


@pytest.mark.parametrize(("template", "family"), [("chat:plain", "plain"), ("chat:llama", "gsm8k")])
@pytest.mark.parametrize("chat_format", ["chatml", "llama2", "mistral-v1"])
def test_no_error_without_a_fault(tokenizers, chat_format, template, family):
    bench = more_faults.bench(*tokenizers, chat_format, template, family)
    batch = to_batch([bench.good(row) for row in range(len(bench.rows))])
    found = check_documents(batch, bench.rows, bench.setup)
    assert [f for f in found if f.level == "error"] == []


def _spoiled(rng: random.Random, e: Example) -> Example:
    """An example with some of its tokens replaced, doubled, reversed, left out or followed by others."""
    i = rng.randrange(len(e.ids) + 1)
    j = min(len(e.ids), i + rng.choice((0, 1, 1, 2, 5, 20)))
    some = [rng.randrange(3), rng.randrange(265), rng.randrange(265)]
    put = rng.choice(([], some[:1], some[1:2], some, e.ids[i:j] * 2, e.ids[i:j][::-1]))
    mask = [*e.loss_mask[:i], *[rng.random() < 0.5] * len(put), *e.loss_mask[j:]]
    return replace(e, ids=[*e.ids[:i], *put, *e.ids[j:]], loss_mask=mask)


@pytest.mark.parametrize("seed", range(4))
def test_row_and_token_of_any_difference(tokenizers, seed):
    """Packs of rows that are whole, cut, or with a token boundary, one of them spoiled: the one row has findings, and
    one of them at the first token that differs (the last before it where the row ends early)."""
    rng = random.Random(seed)
    formats, families = ("chatml", "llama2", "mistral-v1"), ("plain", "gsm8k", "chatdoctor", "openorca")
    templates = ("chat:plain", "chat:llama", "chat:alpaca", "chat:vanilla", "chat:in-context-defense")
    asked = ({}, {"train_on": "last"}, {"max_length": 60, "too_long": "cut"})
    for _ in range(40):
        names = [rng.choice(each) for each in (formats, templates, families)]
        bench = more_faults.bench(*tokenizers, *names, **rng.choice(asked))
        limit = bench.setup.max_length or 10**6
        good = [cut(bench.good(row), limit) for row in range(len(bench.rows))]
        good = [e for e in good if any(e.loss_mask)] or [good[0]]
        chosen = rng.sample(good, min(4, len(good)))
        number = rng.randrange(len(chosen))
        bad = _spoiled(rng, chosen[number])
        if len(bad.ids) < 2 or bad.ids == chosen[number].ids or not any(chosen[number].loss_mask):
            continue
        at = first_difference(bad.ids, chosen[number].ids)
        batch = to_batch([bad if i == number else e for i, e in enumerate(chosen)])
        found = [f for f in check_documents(batch, bench.rows, bench.setup) if f.level == "error"]
        assert {f.row for f in found} == {bench.rows[bad.row].source}, found
        assert {at, at - (at == len(bad.ids))} & {f.token for f in found}, (at, found)
