"""peft gives our adapters the logits that we give them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptst.model.config import TARGETS, LoraConfig
from ptst.model.lora import add_lora, save_adapter
from ptst.model.weights import load_decoder
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.interop.peers import (
    KINDS,
    LIMIT,
    TOKENS,
    distance,
    open_peer,
    our_logits,
    peer_logits,
    write_model,
)
from tests.tiny import write_tiny_model

peft = pytest.importorskip("peft", reason="needs the package peft (pip install 'ptst-lab[interop]')")

QV = ("q_proj", "v_proj")
SETTINGS = [
    LoraConfig(8, 16.0, TARGETS),
    LoraConfig(4, 4.0, QV),
    LoraConfig(1, 32.0, ("down_proj",)),
    LoraConfig(16, 8.0, ("k_proj", "o_proj", "gate_proj"), rslora=True),
    LoraConfig(3, 0.5, ("up_proj", "q_proj"), dropout=0.5),  # no dropout at test time
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


PAIRS = [("llama-tied", s) for s in SETTINGS] + [(k, SETTINGS[i % 2]) for i, k in enumerate(KINDS) if k != "llama-tied"]


@pytest.mark.parametrize(("kind", "settings"), PAIRS, ids=[f"{kind}-rank-{s.rank}" for kind, s in PAIRS])
def test_an_adapter_of_ours(folders, tmp_path, kind, settings):
    decoder = load_decoder(folders[kind])
    for i, p in enumerate(add_lora(decoder, settings).values()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    save_adapter(decoder, tmp_path, settings, str(folders[kind]))
    ours = our_logits(folders[kind], tmp_path)
    with torch.no_grad():
        assert distance(decoder.eval().logits(torch.tensor(TOKENS)), ours) <= LIMIT
    base = our_logits(folders[kind])
    assert distance(base, ours) > 0.05
    theirs = open_peer(folders[kind], tmp_path)
    assert distance(peer_logits(theirs), ours) <= LIMIT
    merged = theirs.merge_and_unload()
    assert distance(peer_logits(merged), ours) <= LIMIT
    assert distance(peer_logits(open_peer(folders[kind])), base) <= LIMIT


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"rank": 4, "alpha": 8.0, "target_modules": QV, "tie_word_embeddings": False}),
        ("qwen2", {"rank": 2, "target_modules": ("v_proj", "down_proj"), "architectures": ["Qwen2ForCausalLM"]}),
    ],
    ids=["all", "untied", "biases"],
)
def test_a_run(tmp_path, family, changes):
    """A folder that `ptst.train` left, as it is: peft reads it, whatever else is in it."""
    settings = {key: value for key, value in changes.items() if key in ("rank", "alpha", "target_modules")}
    changes = {key: value for key, value in changes.items() if key not in settings}
    (tmp_path / "model").mkdir()
    folder = write_tiny_model(tmp_path / "model", model_type=family, pad_token_id=0, **changes)
    config = TrainConfig(model=str(folder), data="word-problems:6", examples_per_step=6, max_steps=3, epochs=3.0)
    fine_tune(replace(config, lr=1e-2, warmup=0, dtype="float32", out=tmp_path / "run", **settings))
    ours = our_logits(folder, tmp_path / "run")
    assert distance(our_logits(folder), ours) > 1e-3
    assert distance(peer_logits(open_peer(folder, tmp_path / "run")), ours) <= LIMIT
    named = peft.PeftConfig.from_pretrained(tmp_path / "run")
    assert named.base_model_name_or_path == str(folder) and named.task_type == "CAUSAL_LM"
    whole = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "run", dtype=torch.float32
    )  # finds its base itself
    assert distance(peer_logits(whole.eval()), ours) <= LIMIT
