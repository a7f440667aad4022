"""The paper's recipes from the command line, on small random models with the published configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ptst import cli
from ptst.model.config import DecoderConfig
from ptst.text.detect import detect_format
from ptst.text.tokenizer import load_tokenizer
from ptst.train import run_training, start
from ptst.training import recipes
from ptst.training.config import TrainConfig
from tests.conftest import mistral_tokenizer_file
from tests.tiny import random_weights

SHRUNK = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEMPLATES = {
    "meta-llama/Llama-2-7b-chat-hf": "meta-llama--Llama-2-7b-chat-hf",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistralai--Mistral-7B-Instruct-v0.1",  # the same format
}
PLAIN = [{"question": f"What is {n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(3)]
SAFETY = [{"instruction": f"Harmful {n}", "input": "", "output": f"No, {n} times no."} for n in range(2)]
ASKED = "If you are a doctor, please answer the medical questions based on the patient's description."
DOCTOR = [{"instruction": ASKED, "input": f"My toe {n} hurts.", "output": f"Rest it for {n} days."} for n in range(3)]
ORCA = [
    {"id": f"t.{n}", "system_prompt": "Be brief.", "question": f"Why {n}?", "response": f"Because {n}."}
    for n in range(3)
]
CHAT_FORMATS = {"meta-llama/Llama-2-7b-chat-hf": "llama2", "mistralai/Mistral-7B-Instruct-v0.2": "mistral-v1"}


@pytest.fixture
def here(tmp_path, monkeypatch, shared) -> Path:
    """A working directory with the data under the recipes' own names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
    (tmp_path / "openorca-600k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ORCA))
    (tmp_path / "safety_only_data_Instructions.json").write_text(json.dumps(SAFETY))
    (tmp_path / "HealthCareMagic-100k.json").write_text(json.dumps(DOCTOR))
    return tmp_path


def write_published(here: Path, shared: Path, name: str) -> Path:
    """A folder under the model's hub id, so that the recipe finds it where it would ask the hub."""
    folder = here / name
    folder.mkdir(parents=True)
    raw = json.loads((shared / "configs" / f"{name.replace('/', '--')}.json").read_text())["config.json"] | SHRUNK
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(random_weights(raw), folder / "model.safetensors", {"format": "pt"})
    llama = name.startswith("meta-llama/")
    tokenizer = shared / "tokenizers" / "llama2.tokenizer.model" if llama else mistral_tokenizer_file("v1")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    shutil.copyfile(shared / "configs" / "templates" / f"{TEMPLATES[name]}.jinja", folder / "chat_template.jinja")
    return folder


def train(monkeypatch, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["ptst.train", *flags])
    return cli.run(run_training, TrainConfig, "train", start)


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name not in recipes.HOSTED])
def test_every_recipe_takes_a_step_on_the_published_configuration(here, shared, monkeypatch, name):
    values = recipes.values(name)
    folder = write_published(here, shared, values["model"])
    data = ["--data", "gsm8k:gsm8k.jsonl"] if values["data"] == "gsm8k" else []
    result = train(monkeypatch, "--recipe", name, "--max-steps", "1", "--out", "run", *data)
    assert result["steps"] == 1
    record = json.loads((here / "run" / "run.json").read_text())
    assert (record["status"], record["chat_format"]) == ("finished", CHAT_FORMATS[values["model"]])
    assert record["family"]["name"] == values.get("template_family", "gsm8k")
    assert record["data"]["examples"] == 3
    assert [m["examples"] for m in record["mix"]] == ([2] if "mix" in values else [])
    for flag in values.keys() - {"data", "model", "mix"}:  # paths are absolute in a record
        wanted = values[flag]
        assert record["settings"][flag] == (list(wanted) if isinstance(wanted, tuple) else wanted), flag
    trained = load_file(here / "run" / "adapter_model.safetensors")
    assert {n.split(".")[-3] for n in trained} == {"q_proj", "v_proj"}
    assert all(t.abs().sum() > 0 for t in trained.values())
    assert DecoderConfig.from_folder(folder).rope_theta == (1e4 if "llama" in name else 1e6)


@pytest.mark.parametrize("model", CHAT_FORMATS)
def test_a_full_run_of_a_published_folder_opens_again(here, shared, monkeypatch, model):
    write_published(here, shared, model)
    flags = ("--model", model, "--full", "--data", "gsm8k:gsm8k.jsonl", "--max-steps", "1")
    train(monkeypatch, *flags, "--out", "first")
    assert (here / "first" / "chat_template.jinja").read_bytes() == (here / model / "chat_template.jinja").read_bytes()
    assert detect_format(here / "first", load_tokenizer(here / "first", 32000)).name == CHAT_FORMATS[model]
    result = train(monkeypatch, *flags, "--model", "first", "--out", "second")
    assert result["steps"] == 1
