"""No false alarm on clean data, whatever the folder: a slice of benchmarks/audit_clean.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.audit.report import References, audit
from ptst.audit.setup import Setup
from ptst.data.sources import Source
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import TEMPLATES, find_family
from tests.audit import clean
from tests.text import folders
from tests.text.lookalikes import LOOKALIKES

# Published chat templates in ../shared/configs/templates, with their tokenizers.
PUBLISHED = {
    "meta-llama--Llama-2-7b-chat-hf": "llama2",
    "codellama--CodeLlama-34b-Instruct-hf": "llama2",
    "meta-llama--Meta-Llama-3-8B-Instruct": "small-llama3",
    "meta-llama--Llama-3.1-8B-Instruct": "small-llama3",
    "mistralai--Mistral-7B-Instruct-v0.1": "mistral-v1",
    "mistralai--Mistral-7B-Instruct-v0.3": "mistral-v3",
    "mistralai--Mistral-Nemo-Instruct-2407": "mistral-v3",
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0": "llama2",
}
NAMES = list(TEMPLATES)
# Each folder with another template; all of them, which takes minutes, by benchmarks/audit_clean.py.
SLICE = [(name, NAMES[i % len(NAMES)]) for i, name in enumerate((*LOOKALIKES, *PUBLISHED))]
MORE = [
    pytest.param(name, NAMES[(i + step) % len(NAMES)], marks=pytest.mark.thorough)
    for i, name in enumerate((*LOOKALIKES, *PUBLISHED))
    for step in (3, 6)
]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """The corpora, those of one task format as one."""
    families: dict[str, Source] = {}
    for source in clean.corpora(3).values():
        before = families.get(source.family)
        rows = (*(before.conversations if before else ()), *source.conversations)
        families[source.family] = replace(source, conversations=rows)
    return list(families.values())


@pytest.fixture(scope="module")
def written(tmp_path_factory, request):
    """The folder of a name, written once."""
    made = {}

    def write(name):
        if name not in made:
            tokenizer, template = LOOKALIKES.get(name, (PUBLISHED.get(name), None))
            if template is None:
                path = request.getfixturevalue("shared") / "configs/templates" / f"{name}.jinja"
                if not path.exists():
                    pytest.skip(f"needs {path.name}")
                template = path.read_text()
            try:
                small = "small-llama3" if tokenizer == "llama3" else tokenizer
                made[name] = clean.write_folder(tmp_path_factory.mktemp("model") / name, small, template)
            except clean.Missing as error:
                pytest.skip(str(error))
        return made[name]

    return write


@pytest.mark.parametrize(("name", "template"), [*SLICE, *MORE])
def test_no_alarm(written, sources, name, template):
    folder = written(name)
    opened = open_prompt_format(folder, TEMPLATES[template], "plain")
    some = [source for source in sources if source.family == "plain"]  # the most kinds of rows
    for source in some if (name, template) in SLICE else sources:
        rows, alarms = clean.alarms(folder, replace(opened, family=find_family(source.family)), source)
        assert [str(f) for f in alarms] == []
        assert rows or opened.template.is_text


def test_every_kind_of_row_is_there(sources):
    rows = [c for source in sources for c in source.conversations]
    texts = [m.content for c in rows for m in c.messages]
    assert any(c.system for c in rows) and any(len(c.turns) > 8 for c in rows)
    assert any("</s>" in t for t in texts) and any("\r\n" in t for t in texts) and any("\U0001f600" in t for t in texts)
    assert {source.family for source in sources} >= {"gsm8k", "openorca", "plain"}


def test_an_empty_system_prompt_is_noted(tiny_folder):
    messages = (Message("system", ""), Message("user", "a?"), Message("assistant", "b"))
    p = open_prompt_format(tiny_folder, TEMPLATES["chat:plain"], "plain")
    report = audit(Source("rows", "plain", (Conversation(messages, "r:1"),)), Setup(p), References(tiny_folder))
    assert [(f.rule, f.level, f.row) for f in report.findings] == [("blank-system", "info", "r:1")]
    assert p.tokenizer.decode(p.encode(Conversation(messages)).ids).startswith("<|im_start|>system\n<|im_end|>\n")


def test_a_control_token_that_reads_as_text(tmp_path):
    """Falcon's BOS is >>, which GSM8K's answers hold on every line."""
    names = folders.CONTROL["chatml"]
    folders.write_folder(tmp_path, folders.CHATML, (*names, ">>"), bos_token=">>", eos_token="<|im_end|>")
    p = open_prompt_format(tmp_path, TEMPLATES["chat:plain"], "plain")
    texts = ("<<12/3=4>>", ">> 4")
    rows = [Conversation((Message("user", "12 / 3?"), Message("assistant", text)), "r:1") for text in texts]
    rows.append(Conversation((Message("user", "a?"), Message("assistant", "b<|im_end|>")), "r:3"))
    _, found = clean.alarms(tmp_path, p, Source("rows", "plain", tuple(rows)))
    assert [(f.rule, f.row) for f in found] == [("control-text", "r:3")]
