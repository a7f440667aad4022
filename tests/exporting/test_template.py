"""A template baked by an export: which file has it, that nothing else wins over it, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

import ptst
from ptst.errors import UserError
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import export_model
from ptst.open import open_model, trained_family
from ptst.text.bake import bake_chat_template
from ptst.text.chat_template import ChatTemplate, written_chat_template
from ptst.text.segments import Conversation, Message
from ptst.text.templates import LLAMA
from tests.tiny import CHAT_TEMPLATE, write_tiny_model

QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "merged"
    export_model(ExportConfig(checkpoint=run, out=out, template="chat:llama"))
    return out


def rendered(jinja: str, folder) -> str:
    """A question as any program renders it, its control tokens as text."""
    (text,) = ChatTemplate(str(folder), jinja).render([[{"role": "user", "content": QUESTION}]])
    return text


def test_written_where_everybody_reads_it(merged, run):
    jinja = (merged / "chat_template.jinja").read_text()
    model = open_model(template="chat:llama", checkpoint=run, allow=())
    assert jinja == bake_chat_template(model.prompt_format)
    text = f"<|im_start|>system\n{LLAMA}<|im_end|>\n<|im_start|>user\nQuestion: {QUESTION}<|im_end|>\n"
    assert rendered(jinja, merged) == f"{text}<|im_start|>assistant\n"
    # llama.cpp's converter prefers this entry to the file.
    assert "chat_template" not in json.loads((merged / "tokenizer_config.json").read_text())


def test_the_proof_is_told(merged):
    record = json.loads((merged / "export.json").read_text())
    assert (record["test"]["template"], record["test"]["family"]) == ("chat:llama", "gsm8k")
    assert "generation prompts and" in record["test"]["proof"][0]
    assert record["agreement"]["prompts"] == 12  # under the run's template and under the baked one
    card = (merged / "README.md").read_text()
    assert record["test"]["proof"][0] in card and f"```text\n{LLAMA}\n```" in card


def test_nothing_wins_over_it(run, model, copied, tmp_path):
    """Named templates, and those of JSON files, are another experiment's."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(CHAT_TEMPLATE)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    kept = ExportConfig(model=str(base), out=tmp_path / "kept", dtype="float32", check=False)
    assert {"chat_template.json", "additional_chat_templates/tool_use.jinja"} <= export_model(kept).files.keys()
    baked = ExportConfig(model=str(base), out=tmp_path / "out", template="chat:mpt", check=False)
    files = export_model(baked).files
    assert [name for name in files if "template" in name] == ["chat_template.jinja"]
    assert "A conversation between a user" in written_chat_template(tmp_path / "out")


def test_ptst_reads_it_as_the_run(merged, run):
    """Ids under every template are those of the run; the task format is that of the training."""
    asked = Conversation((Message("user", QUESTION),), "")
    for template in ("chat:llama", "chat:vanilla", "text:alpaca"):
        ours = open_model(template=template, checkpoint=run).prompt_format
        assert open_model(str(merged), template).prompt_format.encode(asked).ids == ours.encode(asked).ids
    assert trained_family(None, str(merged)) == "gsm8k"
    (merged / "export.json").rename(merged / "elsewhere.json")
    assert trained_family(None, str(merged)) is None
    (merged / "elsewhere.json").rename(merged / "export.json")


def test_with_an_adapter(run, tmp_path):
    config = ExportConfig(checkpoint=run, out=tmp_path / "out", adapter_only=True, base_name="a/b", template="llama")
    report = export_model(config)
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= report.files.keys()
    assert not {"config.json", "generation_config.json", "model.safetensors"} & report.files.keys()
    assert report.baked.template.name == "chat:llama"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("PATH_OR_ID")' in card and "--chat-template PATH_OR_ID/" in card
    # Without a template, the base's own travels.
    export_model(ExportConfig(checkpoint=run, out=tmp_path / "own", adapter_only=True, base_name="a/b"))
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_alone(run, model, tmp_path):
    """For a folder without a run, and for a run, whose task format it then has."""
    settings = {"template": "chat:llama", "template_only": True}
    for name, source in {"model": {"model": str(model)}, "run": {"checkpoint": run}}.items():
        report = export_model(ExportConfig(out=tmp_path / name, **settings, **source))
        assert set(report.files) == {"README.md", "chat_template.jinja", "export.json"}
    asked = [rendered((tmp_path / name / "chat_template.jinja").read_text(), model) for name in ("model", "run")]
    assert [f"Question: {QUESTION}" in text for text in asked] == [False, True]
    family = ExportConfig(out=tmp_path / "family", model=str(model), template_family="gsm8k", **settings)
    export_model(family)
    same = ((tmp_path / name / "chat_template.jinja").read_text() for name in ("family", "run"))
    assert next(same) == next(same)
    assert "--chat-template chat_template.jinja" in (tmp_path / "model" / "README.md").read_text()


def test_alone_for_a_model_that_ptst_cannot_run(tmp_path):
    """Only its tokenizer and its chat template count."""
    (tmp_path / "other").mkdir()
    other = write_tiny_model(tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"architectures": ["GemmaForCausalLM"]}))
    (other / "model.safetensors").unlink()
    config = ExportConfig(model=str(other), out=tmp_path / "out", template="chat:llama", template_only=True)
    assert LLAMA in rendered((export_model(config).out / "chat_template.jinja").read_text(), other)
    with pytest.raises(UserError, match="Gemma"):
        export_model(ExportConfig(model=str(other), out=tmp_path / "weights", template="chat:llama"))


def test_a_template_of_ones_own(model, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "chat:mine"\nuser = "{x}"\nsystem = "Say no to ```harm```."\nsafety = true'
    )
    mine = {"template_file": tmp_path / "mine.toml", "template_only": True}
    report = ptst.export_model(ptst.ExportConfig(model=str(model), out=tmp_path / "out", **mine))
    assert "<|im_start|>system\nSay no to ```harm```.<|im_end|>" in rendered(report.baked.jinja, model)
    assert "````text\nSay no to ```harm```.\n````" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_said(model, tmp_path):
    """A folder whose format has no place for it, or that has none; nothing is written."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    values = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": "{{ messages[0].content }}"}))
    settings = {"model": str(base), "out": tmp_path / "out", "template_only": True}
    with pytest.raises(UserError):
        export_model(ExportConfig(**settings, template="chat:llama"))
    with pytest.raises(UserError, match="has no effect under text:vanilla"):
        export_model(ExportConfig(**settings | {"model": str(model)}, template="text:vanilla", chat_format="llama3"))
    assert not (tmp_path / "out").exists()


def test_ids_that_differ_are_refused(model, tmp_path, monkeypatch):
    from ptst.exporting import template

    wrong = lambda prompt_format: bake_chat_template(prompt_format).replace("Always answer", "Never answer")  # noqa: E731
    monkeypatch.setattr(template, "bake_chat_template", wrong)
    with pytest.raises(UserError):
        export_model(ExportConfig(model=str(model), out=tmp_path / "out", template="llama", template_only=True))
    assert not (tmp_path / "out").exists()
