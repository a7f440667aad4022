"""A second exam: faults of other kinds than the known bugs, each at its row and token and by its cause."""

from __future__ import annotations

import pytest

from ptst.audit.documents import check_documents
from ptst.data.packing import to_batch
from ptst.text.tokenizer import JsonTokenizer
from tests.audit import more_faults
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours, raw = JsonTokenizer(path, settings), JsonTokenizer(path, settings)
    raw._tok.encode_special_tokens, raw._kept_out = False, frozenset()
    return ours, raw


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
