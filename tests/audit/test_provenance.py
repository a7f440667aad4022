"""Where a report comes from: what was read is named by its sha256, and another prompt format by another one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from ptst import __version__
from ptst.audit.config import AuditConfig
from ptst.audit.output.provenance import prompt_fingerprint
from ptst.audit.report import audit_data
from ptst.data import sources
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer


def test_what_was_read_is_named(tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "2+3?", "answer": "5"}\n')
    report = audit_data(AuditConfig(model=str(tiny_folder), data=str(data), rows=2))
    found = json.loads(json.dumps(report.to_json()))["provenance"]
    sums = found["fingerprints"]
    assert sums[f"data {data}"] == sources.load(str(data)).fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert sums[name] == hashlib.sha256((tiny_folder / name).read_bytes()).hexdigest()
    template = json.loads((tiny_folder / "tokenizer_config.json").read_text())["chat_template"]
    assert sums["chat template"] == hashlib.sha256(template.encode()).hexdigest()
    assert sums["prompt format"] == prompt_fingerprint(report.prompt_format)
    assert found["settings"] == {"model": str(tiny_folder), "data": str(data), "rows": 2}
    assert found["versions"]["ptst"] == __version__
    assert found["date"].endswith(" UTC")


@pytest.mark.parametrize(
    "change",
    [
        {"template": find_template("chat:llama")},
        {"family": find_family("gsm8k")},
        {"chat_format": CHAT_FORMATS["llama2"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_prompt_format_has_another_fingerprint(tiny_folder, change):
    tokenizer = load_tokenizer(tiny_folder)
    p = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    assert prompt_fingerprint(p) == prompt_fingerprint(replace(p))
    assert prompt_fingerprint(p) != prompt_fingerprint(replace(p, **change))
