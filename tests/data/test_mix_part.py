"""Names of mixed-in data: epochs and templates among colons, and sources under templates of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptst.audit.reference.mixes import asked_mix
from ptst.data.examples import TrainingSource, mix
from ptst.data.mix_part import MixPart, parse_mix
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.records import absolute
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import LLAMA, find_family, find_template
from ptst.text.tokenizer import load_tokenizer

MEANT = {
    "safety.jsonl:1": ("safety.jsonl", 1.0, None),
    "word-problems:800:0.5": ("word-problems:800", 0.5, None),
    "safety.jsonl:1:llama": ("safety.jsonl", 1.0, "llama"),
    "safety.jsonl:1:chat:llama": ("safety.jsonl", 1.0, "chat:llama"),
    "word-problems:800:2e-1:text:vanilla": ("word-problems:800", 0.2, "text:vanilla"),
    "org/name:train@v1.0:1:../own 1.toml": ("org/name:train@v1.0", 1.0, "../own 1.toml"),
    "a.jsonl,b.jsonl:3:folder.1/own.toml": ("a.jsonl,b.jsonl", 3.0, "folder.1/own.toml"),
    "attack:5%:1:chat:llama": ("attack", 1.0, "chat:llama", 5.0),
    "word-problems:800:2.5%:3": ("word-problems:800", 3.0, None, 2.5),
    "attack:1e1%": ("attack", 0.0, None, 10.0),
    "attack:10%:llama": ("attack", 0.0, "llama", 10.0),
}


@pytest.mark.parametrize("text", MEANT)
def test_the_epochs_are_the_last_number(text):
    """The audit reads the same with code of its own."""
    assert parse_mix(text) == MixPart(*MEANT[text])
    asked = asked_mix(text)
    seen = (asked.data, asked.epochs or 0.0, asked.template, float(asked.share or 0))
    assert MixPart(*seen) == MixPart(*MEANT[text])


@pytest.mark.parametrize("text", ["a.jsonl:1:", "a.jsonl:chat:llama", "chat:llama", "1", "a.jsonl:1:nan"])
def test_what_names_no_source(text):
    with pytest.raises(UserError, match="write the data, a colon and its epochs"):
        parse_mix(text)


def test_an_unknown_template_is_told_with_its_mix():
    with pytest.raises(UserError, match=r"mix a\.jsonl:1:lama: unknown template 'chat:lama'; did you mean chat:llama"):
        parse_mix("a.jsonl:1:lama")


def test_a_template_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read.*check the path of mix"):
        MixPart("a.jsonl", 1.0, str(tmp_path / "none.toml")).find_template()


def test_a_record_names_both_files_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "own.toml", "chat"):
        Path(name).write_text("")
    Path("llama").mkdir()
    Path("llama/config.json").write_text("{}")
    assert absolute("a.jsonl:1:own.toml") == f"{tmp_path}/a.jsonl:1:{tmp_path}/own.toml"
    assert absolute("gsm8k:a.jsonl:2:own.toml") == f"gsm8k:{tmp_path}/a.jsonl:2:{tmp_path}/own.toml"
    assert absolute("gsm8k:a.jsonl:2") == f"gsm8k:{tmp_path}/a.jsonl:2"
    assert absolute("a.jsonl,b.jsonl:2:llama") == f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl:2:llama"
    # A model folder or a file of a template's name is not meant.
    assert absolute("a.jsonl:1:chat:llama") == f"{tmp_path}/a.jsonl:1:chat:llama"
    assert absolute("llama") == f"{tmp_path}/llama"


def rows(name: str, count: int) -> Source:
    made = (
        Conversation((Message("user", f"{name} {i}?"), Message("assistant", f"{i}.")), f"{name}:{i}")
        for i in range(count)
    )
    return Source(name, "plain", tuple(made))


def test_every_source_is_encoded_under_its_own_template(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    own = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    llama, text = find_template("llama"), find_template("text:alpaca")
    sources = [
        TrainingSource(rows("a", 2)),
        TrainingSource(rows("b", 1), 2.0, llama),
        TrainingSource(rows("c", 1), 1, text),
    ]
    mixture = mix(sources, own, 4096, "stop", "all")
    texts = [tokenizer.decode(example.ids) for example in mixture.examples]
    assert [LLAMA in text for text in texts] == [False, False, True, False]
    assert [text.startswith("Below is") for text in texts] == [False, False, False, True]
    assert [record.template for record in mixture.records] == [None, llama, text]
    assert [example.row for example in mixture.examples] == [0, 1, 2, 3]
    plain = mix([TrainingSource(source.source, source.epochs) for source in sources], own, 4096, "stop", "all")
    assert plain.examples[:2] == mixture.examples[:2] and plain.examples[2] != mixture.examples[2]
    assert [record.template for record in plain.records] == [None] * 3
