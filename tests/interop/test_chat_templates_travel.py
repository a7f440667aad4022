"""A model's chat templates are in every folder that comes of it, whichever way the model's folder has them.

`transformers`, where it is installed, says what a folder's templates are; ours must find the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptst.hub.locate import locate_adapter, locate_model
from ptst.model.weights import load_decoder, save_full
from ptst.open import open_model
from ptst.text.chat_template import copy_chat_templates, read_chat_template
from ptst.text.segments import Conversation, Message
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.tiny import CHAT_TEMPLATE, write_tiny_model

TOOLS, RAG = "{# tools #}" + CHAT_TEMPLATE, "{# documents #}" + CHAT_TEMPLATE
NAMED = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": TOOLS}]
# Files of a folder, and all its chat templates by name.
LAYOUTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "text in tokenizer_config.json": ({}, {"default": CHAT_TEMPLATE}),
    "named ones in tokenizer_config.json": ({}, {"default": CHAT_TEMPLATE, "tool_use": TOOLS}),
    "chat_template.jinja": ({"chat_template.jinja": CHAT_TEMPLATE}, {"default": CHAT_TEMPLATE}),
    "chat_template.jinja and others": (
        {
            "chat_template.jinja": CHAT_TEMPLATE,
            "additional_chat_templates/tool_use.jinja": TOOLS,
            "additional_chat_templates/rag.jinja": RAG,
        },
        {"default": CHAT_TEMPLATE, "tool_use": TOOLS, "rag": RAG},
    ),
    "chat_template.json": (
        {"chat_template.json": json.dumps({"chat_template": CHAT_TEMPLATE})},
        {"default": CHAT_TEMPLATE},
    ),
}
ENTRIES = {"text in tokenizer_config.json": CHAT_TEMPLATE, "named ones in tokenizer_config.json": NAMED}
QUESTION = Conversation((Message("user", "What is 2 + 2?"),), "a test")


def write_layout(folder: Path, layout: str) -> Path:
    folder.mkdir(parents=True)
    write_tiny_model(folder, model_type="llama", pad_token_id=0)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    settings |= {"chat_template": ENTRIES[layout]} if layout in ENTRIES else {}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in LAYOUTS[layout][0].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def as_files(folder: Path) -> dict[str, str]:
    """The chat templates that are files, by name."""
    found = {path.stem: path.read_text() for path in folder.glob("additional_chat_templates/*.jinja")}
    own = folder / "chat_template.jinja"
    return found | ({"default": own.read_text()} if own.exists() else {})


def by_transformers(folder: Path) -> dict[str, str]:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder).chat_template
    return {"default": found} if isinstance(found, str) else found or {}


def check_whole(folder: Path, layout: str) -> None:
    """A folder with a tokenizer: what we and transformers read in it is what the model's folder had."""
    assert read_chat_template(folder) == CHAT_TEMPLATE
    if find_spec("transformers") and layout != "chat_template.json":  # that of processors, not of tokenizers
        assert by_transformers(folder) == LAYOUTS[layout][1]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def here(layout, tmp_path_factory) -> Path:
    """A model and two runs of it: an adapter, with checkpoints after half of the training, and all weights."""
    here = tmp_path_factory.mktemp("here")
    model = write_layout(here / "model", layout)
    config = TrainConfig(model=str(model), data="word-problems:4", examples_per_step=2, rank=2, keep=5, save_every=1)
    config = replace(config, epochs=1.0, at_epochs=(0.5,), out=here / "adapter")
    fine_tune(config)
    fine_tune(replace(config, full=True, out=here / "full"))
    return here


def test_of_an_adapter(here, layout):
    """As files, also where the model had them in a JSON file; of every folder that holds weights of the run."""
    expected = LAYOUTS[layout][1]
    assert as_files(here / "adapter") == as_files(here / "adapter/epoch-0.5") == expected
    assert read_chat_template(here / "adapter") == read_chat_template(here / "model")


def test_of_all_the_weights(here, layout):
    for folder in (here / "full", here / "full/epoch-0.5"):
        check_whole(folder, layout)
        again = open_model(str(folder), "chat:plain").prompt_format
        assert (
            again.encode(QUESTION).ids
            == open_model(str(here / "model"), "chat:plain").prompt_format.encode(QUESTION).ids
        )


def test_of_a_checkpoint_to_resume_from(here):
    """It has none: its run knows the model's folder, and the prompts are those of its chat template."""
    wanted = open_model(str(here / "model"), "chat:plain").prompt_format
    for run in ("adapter", "full"):
        for checkpoint in sorted((here / run / "state").glob("step-*")):
            found = open_model(checkpoint=checkpoint, template="chat:plain").prompt_format
            assert found.chat_format == wanted.chat_format and found.encode(QUESTION).ids == wanted.encode(QUESTION).ids


def test_of_what_is_saved_anew(here, layout, tmp_path):
    """`save_full` is what training, alignment and export write a model with; its own output is a model again."""
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    save_full(load_decoder(here / "model"), here / "model", tmp_path / "once")
    save_full(load_decoder(tmp_path / "once"), tmp_path / "once", tmp_path / "twice")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        check_whole(folder, layout)


def test_of_what_the_hub_has(here, layout, tmp_path, monkeypatch):
    """Every file that is one is fetched, with a model and with an adapter."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def download(name, *, allow_patterns, ignore_patterns, **_others):
        source, out = here / name.partition("/")[2], tmp_path / name
        files = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, out / file)
        return str(out)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    check_whole(locate_model("org/model"), layout)
    check_whole(locate_model("org/full"), layout)
    assert as_files(locate_adapter("org/adapter")) == LAYOUTS[layout][1]


@pytest.mark.skipif(not find_spec("transformers"), reason="needs the package transformers")
def test_of_a_folder_that_transformers_saved(here, layout, tmp_path):
    """Its save_pretrained moves them; we find the same as before."""
    if layout == "chat_template.json":
        pytest.skip("transformers reads that file with a processor alone")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(here / "model").save_pretrained(tmp_path)
    assert read_chat_template(tmp_path) == CHAT_TEMPLATE and by_transformers(tmp_path) == LAYOUTS[layout][1]


def test_a_name_that_cannot_be_a_files(tmp_path, capsys):
    entry = [*NAMED, {"name": "../evil", "template": "x"}, {"name": "", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    (tmp_path / "out").mkdir()
    copy_chat_templates(tmp_path, tmp_path / "out")
    assert as_files(tmp_path / "out") == {"default": CHAT_TEMPLATE, "tool_use": TOOLS}
    assert not list(tmp_path.glob("*.jinja"))
    assert "its chat template '../evil' is left out" in capsys.readouterr().err


def test_a_folder_without_one(tmp_path):
    (tmp_path / "out").mkdir()
    copy_chat_templates(tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
