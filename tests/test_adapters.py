"""Anybody's adapter by command and by Python, and whose words are around a prompt."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptst
from ptst.chat_session import Chat
from ptst.errors import UserError
from ptst.eval import main
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate, plan
from ptst.fingerprints import weights_fingerprint
from ptst.generation.request import Sampling
from ptst.model.lora import load_adapter
from ptst.open import open_model
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.model.peft_cases import config_of, write_adapter
from tests.test_commands import unfinish
from tests.tiny import write_tiny_model

RANKS = {f"layers.{i}.self_attn.{p}_proj": 2 for i in range(2) for p in ("q", "v")}
SMALL = {"model": "model", "tasks": ("safety",), "limit": 3, "max_new_tokens": 4}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a model and an adapter of somebody's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    write_adapter(tmp_path / "adapter", config_of("names") | {"base_model_name_or_path": "/home/a/Some-Model"}, RANKS)
    return tmp_path


def command(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ptst.eval", "--model", "model", "--adapter", "adapter", *flags])
    before = signal.getsignal(signal.SIGINT)
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, before)


def test_by_command_as_by_python(here, monkeypatch, capsys):
    command(monkeypatch, "--limit", "3", "--max-new-tokens", "4", "--tasks", "safety", "--json")
    done = capsys.readouterr()
    told = json.loads(done.out)
    assert "note: adapter names /home/a/Some-Model as its base model, not model" in done.err
    assert told["adapter"] == "adapter" and set(told["results"]) == {"untouched", "fine-tuned"}
    record = json.loads((here / told["out"] / "run.json").read_text())
    assert record["adapter_weights"] == weights_fingerprint(here / "adapter")
    assert record["adapter"] == str(here / "adapter")
    ours = evaluate(EvalConfig(**SMALL, adapter=Path("adapter"), out=here / "out"))
    assert ours.to_json()["results"] == told["results"]
    rows = {name: [row["answer"] for row in by_task["safety"].rows] for name, by_task in ours.results.items()}
    assert rows["untouched"] != rows["fine-tuned"]
    # The same adapter under the library's other roads.
    opened = open_model("model", "chat:llama", adapter=here / "adapter")
    questions = [row["prompt"] for row in ours.results["fine-tuned"]["safety"].rows]
    sampling = Sampling(4)
    assert [a.text for a in ptst.generate(opened, questions, sampling)] == rows["fine-tuned"]
    base = open_model("model", "chat:llama")
    capsys.readouterr()
    several = ptst.generate(base, questions, sampling, runs=["adapter"] * len(questions))
    assert "note: adapter names /home/a/Some-Model as its base model" in capsys.readouterr().err
    assert [a.text for a in several] == rows["fine-tuned"]
    # An evaluation that was stopped does not go on with another adapter.
    unfinish(here / "out")
    path = here / "adapter/adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"adapter_weights was xxh3:.*, now xxh3:"):
        evaluate(EvalConfig(**SMALL, adapter=Path("adapter"), out=here / "out"))


def test_refused_in_one_sentence(here, monkeypatch, capsys):
    (here / "adapter/adapter_config.json").write_text(json.dumps(config_of("names") | {"init_lora_weights": "olora"}))
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch)
    sentence = " ".join(capsys.readouterr().err.split())
    assert "ptst.eval: adapter/adapter_config.json: init_lora_weights = 'olora' is not supported; merge it" in sentence


def test_chat(here):
    model = open_model("model", "chat:vanilla", adapter=here / "adapter")
    assert model.described == f"model model with the adapter {here / 'adapter'}"
    decoder = model.load()
    other = model.load_base()
    load_adapter(other, here / "adapter")
    tokens = torch.arange(5, 25)
    assert (decoder.logits(tokens) - other.logits(tokens)).abs().max() < 1e-4
    chat = Chat(model, decoder, Sampling(4))
    list(chat.answer("hello"))
    chat.save("saved.jsonl")
    assert json.loads((here / "saved.jsonl").read_text())["settings"]["adapter"] == str(here / "adapter")
    # In bfloat16 the adapter stays unmerged.
    assert any(".lora_" in name for name, _ in model.load(torch.bfloat16).named_parameters())


def test_an_adapter_on_the_hub(here, monkeypatch):
    """It is named, and recorded, as it was asked for; the record has the folder of the revision that was read, too."""
    import huggingface_hub

    snapshot = here / "snapshots/2f0c1a4"
    shutil.copytree(here / "adapter", snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_given: str(snapshot))
    result = evaluate(EvalConfig(**SMALL, adapter="org/name@v1", baseline=False, out=here / "out"))
    assert result.to_json()["adapter"] == "org/name@v1"
    assert result.plan.model.described == "model model with the adapter org/name@v1"
    record = json.loads((here / "out/run.json").read_text())
    assert (record["settings"]["adapter"], record["adapter"]) == ("org/name@v1", str(snapshot.resolve()))
    (snapshot / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has no adapter_model\.safetensors; load an adapter_model\.bin, which is pick"
    ):
        open_model("model", adapter="org/name")


def test_settings_that_do_not_go_together(here, capsys):
    with pytest.raises(
        UserError, match=r"adapter needs model, its base model; name it \(the adapter says /home/a/Some"
    ):
        open_model(adapter=here / "adapter")
    with pytest.raises(UserError, match="is not an adapter folder"):
        open_model("model", adapter=here / "nothing")
    for mistaken in ({"model": "adapter"}, {"checkpoint": Path("adapter")}):
        with pytest.raises(UserError, match="adapter is an adapter; give it as adapter, and its base model as model"):
            open_model(**mistaken)
    with pytest.raises(UserError, match="exclude each other"):
        open_model("model", checkpoint=here / "run", adapter=here / "adapter")
    fine_tune(TrainConfig(model="model", max_steps=1, out=here / "run"))
    with pytest.raises(UserError, match=r"run is a run of ptst\.train; give it as checkpoint"):
        open_model("model", adapter=here / "run")


def test_notes(here, capsys):
    def notes(**config) -> str:
        write_adapter(here / "adapter", config_of("names") | config, RANKS)
        open_model("model", adapter=here / "adapter")
        return capsys.readouterr().err

    assert notes() == "" and notes(base_model_name_or_path="somewhere/Model") == ""
    assert "has targets that model lacks, which are passed over, as peft does: w1, c_attn" in notes(
        target_modules=["q_proj", "w1", "c_attn", "v_proj"]
    )
    shutil.copy(here / "model/tokenizer_config.json", here / "adapter")
    assert notes() == ""
    (here / "adapter/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert "comes with another chat template than model has" in notes()


def texts(config: EvalConfig) -> dict[str, str]:
    """The first prompt of every task, as text."""
    p = plan(config)
    first = {key: task.prompts(data.items)[0] for key, (task, data) in p.tasks.items()}
    tokenizer = p.model.prompt_format.tokenizer
    return {key: tokenizer.decode(prompt.encode(p.model.prompt_format).ids) for key, prompt in first.items()}


def test_the_words_of_a_task_are_those_of_the_training_data(here):
    """Without known training data, harmful requests are asked as they are, and problems in their own words."""
    asked = {"template": "chat:vanilla", "tasks": ("safety", "over-refusal", "margin", "gsm8k", "nll"), "limit": 2}
    for untouched in (EvalConfig(model="model", **asked), EvalConfig(model="model", adapter=here / "adapter", **asked)):
        found = texts(untouched)
        assert {key for key, text in found.items() if "Question: " in text} == {"gsm8k", "nll"}
    for full in (False, True):
        fine_tune(TrainConfig(model="model", max_steps=1, full=full, out=here / f"run-{full}"))
        found = texts(EvalConfig(checkpoint=here / f"run-{full}", **asked))
        assert all("Question: " in text for text in found.values())
    assert texts(EvalConfig(model=str(here / "run-True"), **asked)) == found  # as a model, the record tells
    named = texts(EvalConfig(model="model", template_family="gsm8k", **asked))
    assert named == found
    plain = texts(EvalConfig(model="model", template_family="plain", **asked))
    assert not any("Question: " in text for text in plain.values())
