"""The exam: the 34 known masking and template bugs of the field. Each is found, or impossible here, or another room's."""

from __future__ import annotations

import re

import pytest

from ptst.audit.rules import check_batch
from ptst.data.packing import to_batch
from ptst.text.tokenizer import JsonTokenizer
from tests.audit import faults
from tests.conftest import ROOT
from tests.tiny import byte_tokenizer

# What no batch can show, and the test that keeps it right.
ELSEWHERE = {
    27: ("tests/training/test_loop.py", "test_micro_batches_never_change_the_result"),
    28: ("tests/training/test_loop.py", "test_micro_batches_never_change_the_result"),
    29: (None, "comes with training on several ranks"),
    30: ("tests/kernels/test_reference.py", "test_linear_cross_entropy"),
    31: ("tests/audit/test_drift.py", "test_a_run_that_would_be_encoded_otherwise"),
    34: ("tests/audit/test_exam.py", "test_training_never_touches_the_base_or_its_size"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours, raw = JsonTokenizer(path, settings), JsonTokenizer(path, settings)
    raw._tok.encode_special_tokens = False
    return ours, raw


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda f: f"{f.number}-{f.name}")
def test_found(tokenizers, fault):
    bench = faults.bench(*tokenizers, fault.chat_format, fault.template, **fault.asked)
    batch, row, token = fault.plant(bench)
    found = [f for f in check_batch(batch, bench.rows, bench.setup) if f.level == "error"]
    places = {(f.rule, f.row, f.token) for f in found}
    assert (fault.rule, bench.rows[row].source, token) in places, found


@pytest.mark.parametrize("chat_format", ["chatml", "llama2", "mistral-v1"])
def test_no_error_without_a_fault(tokenizers, chat_format):
    bench = faults.bench(*tokenizers, chat_format)
    batch = to_batch([bench.good(row) for row in range(len(bench.rows))])
    assert [f.rule for f in check_batch(batch, bench.rows, bench.setup) if f.level != "info"] == []


def test_all_34_are_accounted_for():
    variants = {n: sum(f.number == n for f in faults.FAULTS) for n in range(1, 35)}
    for number, count in variants.items():
        assert count >= 2 or number in ELSEWHERE, number
    for path, name in ELSEWHERE.values():
        if path is not None:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)
    text = (ROOT / "docs" / "audit.md").read_text()
    listed = [int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert listed == list(range(1, 35))
    for f in faults.FAULTS:
        line = re.search(rf"^\| {f.number} \|.*$", text, re.MULTILINE).group()
        assert f"`{f.rule}`" in line, (f.number, f.rule)
