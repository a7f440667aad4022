"""Ids against `transformers`' AutoTokenizer, where it is installed: plain text, and ChatML as a rendered template."""

from __future__ import annotations

import pytest

from ptst.text.tokenizer import load_tokenizer
from tests.text import made
from tests.text.made import MARKERS
from tests.text.test_added_tokens import KINDS, fine_tune

START, END = MARKERS
TEKKEN = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def tekken(folder):
    rules = made.byte_level(made.TEKKEN, specials=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    return made.write(folder, rules=rules, tokenizer_config=TEKKEN)


def llama(scheme, legacy):
    """A class of Llama's, which `transformers` builds by `legacy`, not by the file's rules for spaces."""
    return lambda folder: fine_tune(folder, scheme, tokenizer_class="LlamaTokenizer", legacy=legacy)


MORE = {"tekken": tekken, "llama, legacy": llama("prepend", True), "llama, new": llama("first", False)}
BY_JSON = {name: make for name, make in KINDS.items() if name not in ("older fine-tune", "yi", "by config")}


@pytest.mark.parametrize("kind", (*BY_JSON, *MORE))
def test_ids_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    folder = ({**BY_JSON, **MORE})[kind](tmp_path / "model")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in made.texts(21, 500):
        if kind == "llama, legacy" and text.startswith(" "):
            continue  # the file's rule puts a second space before it, as sentencepiece does; theirs does not
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        if kind == "tekken":
            continue
        rendered = f"{START}user\n{text}{END}\n{START}assistant\n"
        start, end = (ours.control_id(name) for name in MARKERS)
        ids = [start, *ours.encode(f"user\n{text}", after=START), end, *ours.encode("\n", after=END)]
        ids += [start, *ours.encode("assistant\n", after=START)]
        assert ids == theirs.encode(rendered, add_special_tokens=False), text
