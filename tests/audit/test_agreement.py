"""A batch passes as agreeing only where all rules, applied in detail, find nothing but notes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.audit.account.expected import build_references
from ptst.audit.agreement import agrees
from ptst.audit.documents import check_documents
from ptst.data.packing import to_batch
from tests.audit import more_faults, order_faults, token_faults, word_faults  # noqa: F401  they put their faults in


def passes(batch, bench) -> bool:
    references = dict(enumerate(build_references(bench.rows, bench.setup)))
    prompts = bench.setup.prompt_format.encode_all([row.prompt() for row in bench.rows])
    return agrees(batch, references, dict(enumerate(prompts)), bench.setup)


@pytest.mark.parametrize("fault", more_faults.FAULTS, ids=lambda f: f.name)
def test_no_fault_agrees(tokenizers, fault):
    bench = more_faults.bench(*tokenizers, fault.chat_format, fault.template, fault.family, **fault.asked)
    batch, _row, _token, *changed = fault.plant(bench)
    assert not passes(batch, changed[0] if changed else bench)


@pytest.mark.parametrize("chat_format", ["chatml", "llama2", "mistral-v1"])
def test_what_agrees_has_no_findings_but_notes(tokenizers, chat_format):
    bench = more_faults.bench(*tokenizers, chat_format, "chat:llama", "gsm8k")
    batch = to_batch([bench.good(row) for row in range(len(bench.rows))])
    found = [f for f in check_documents(batch, bench.rows, bench.setup) if f.level != "info"]
    assert passes(batch, bench) == (not found)
    alone = [to_batch([bench.good(row)]) for row in range(len(bench.rows))]
    told = {f.row for f in found}
    assert [passes(one, bench) for one in alone] == [row.source not in told for row in bench.rows]
    assert any(passes(one, bench) for one in alone)


def test_each_part_of_a_batch_is_compared(tokenizers):
    bench = more_faults.bench(*tokenizers, "chatml", "chat:plain", "plain")
    batch = to_batch([bench.good(row) for row in (0, 1)])
    assert passes(batch, bench)
    middle = len(bench.good(0).ids)
    for name in ("tokens", "labels", "position_ids"):
        for at in range(len(batch.tokens)):
            wrong = [*getattr(batch, name)]
            wrong[at] += 1
            assert not passes(replace(batch, **{name: wrong}), bench), (name, at)
    bounds = [0, middle + 1, len(batch.tokens)]
    changes = ({"rows": [1, 0]}, {"rows": [0, 99]}, {"cu_seqlens": bounds}, {"rows": [0, -1]})
    assert not any(passes(replace(batch, **change), bench) for change in changes)


def test_a_prompt_that_differs_lossy_text_and_a_row_beyond_the_limit(tokenizers):
    bench = more_faults.bench(*tokenizers, "chatml", "chat:plain", "plain")
    example = bench.good(0)
    references = dict(enumerate(build_references(bench.rows, bench.setup)))
    prompt = bench.setup.prompt_format.encode(bench.rows[0].prompt())
    batch = to_batch([example])
    assert agrees(batch, references, {0: prompt}, bench.setup)
    assert not agrees(batch, references, {}, bench.setup)
    lossy = {0: replace(references[0], lossy={0: "other text"})}
    assert not agrees(batch, lossy, {0: prompt}, bench.setup)
    assert not agrees(batch, references, {0: replace(prompt, ids=[*prompt.ids[:-1], 0])}, bench.setup)
    assert not agrees(batch, references, {0: prompt}, replace(bench.setup, max_length=len(example.ids) - 1))
