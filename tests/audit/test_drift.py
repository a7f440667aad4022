"""Against a finished run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.audit.drift import check_run
from ptst.data.examples import prepare
from ptst.data.sources import Source
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from tests.test_runs import a_record, data

ROWS = tuple(Conversation((Message("user", q), Message("assistant", "a")), f"r:{i}") for i, q in enumerate("xyz", 1))


@pytest.fixture
def prompt_format(tiny_folder):
    return PromptFormat(
        find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], load_tokenizer(tiny_folder)
    )


def record(prompt_format, rows=ROWS):
    source = Source("rows", "plain", rows)
    encoding = prepare(source, prompt_format, 1000, "drop", "all")[1].encoding
    parts = {"template": prompt_format.template, "family": prompt_format.family}
    run = a_record(
        **parts,
        chat_format=prompt_format.chat_format.name,
        data=data(fingerprint=source.fingerprint, encoding=encoding),
    )
    return run, source.fingerprint, encoding


def test_a_run_that_is_encoded_the_same_today(prompt_format):
    run, fingerprint, encoding = record(prompt_format)
    assert list(check_run(run, prompt_format, fingerprint, encoding)) == []


def test_a_run_that_would_be_encoded_otherwise(prompt_format):
    """Stale tokenization: the template changed, the data changed, the tokenizer changed."""
    run, fingerprint, _ = record(prompt_format)
    other = replace(prompt_format, template=find_template("chat:llama"))
    causes = [f.cause for f in check_run(run, other, *record(other)[1:])]
    assert causes[0] == "the template of the run is not today's"
    assert any("token ids" in c for c in causes)
    fewer = record(prompt_format, ROWS[:2])
    assert [f.cause.split(" of the run")[0] for f in check_run(run, prompt_format, *fewer[1:])] == [
        "the data",
        "the token ids",
    ]
    (finding,) = check_run(run, prompt_format, fingerprint, "another")
    assert (finding.rule, finding.level) == ("run-drift", "error")
    assert "token ids" in finding.cause
