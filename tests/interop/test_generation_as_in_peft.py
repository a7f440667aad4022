"""Several adapters in one batch of the engine: every answer is the one that peft's own generate gives."""

from __future__ import annotations

import pytest
import torch

import ptst
from ptst.open import open_model
from ptst.text.segments import Conversation, Message
from tests.interop.peers import open_peer, train_with_peft
from tests.tiny import write_tiny_model

peft = pytest.importorskip("peft", reason="needs the package peft (pip install 'ptst-lab[interop]')")

ADAPTERS = {
    "query": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all": {"target_modules": "all-linear", "r": 2, "lora_alpha": 16},
    "mixed": {"target_modules": ["up_proj", "down_proj"], "r": 6, "rank_pattern": {"down_proj": 1}, "use_rslora": True},
}
PROMPTS = ["hello", "What is 2 + 2?", "the the the", "a longer question, with several words in it", "bye"]
NEW, CLOSE = 24, 1e-3


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, model_type="llama", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name, settings in ADAPTERS.items():
        peer = train_with_peft(folder, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        peer.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def generated(peer, ids: list[int]) -> tuple[list[int], list[float]]:
    """New tokens, and how far apart the two best logits were at each."""
    options = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    done = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    gaps = [float(step[0].topk(2).values.diff().abs()) for step in done.logits]
    return done.sequences[0, len(ids) :].tolist(), gaps


@pytest.mark.parametrize("batch_size", [2, 64])
def test_answers(here, batch_size):
    opened = open_model(str(here), "chat:vanilla")
    asked = [(prompt, name) for prompt in PROMPTS for name in (*ADAPTERS, None)]
    runs = [name and here / name for _, name in asked]
    sampling = ptst.Sampling(NEW)
    answers = ptst.generate(opened, [prompt for prompt, _ in asked], sampling, runs=runs, batch_size=batch_size)
    peers = {name: open_peer(here, name and here / name) for name in (*ADAPTERS, None)}
    texts, compared = set(), 0
    for (prompt, name), answer in zip(asked, answers, strict=True):
        ids = opened.prompt_format.encode(Conversation((Message("user", prompt),), "a test").prompt()).ids
        wanted, gaps = generated(peers[name], ids)
        found = answer.token_ids + wanted[-1:] * (answer.finish_reason == "stop")  # ours are without the stop token
        differs = [i for i in range(max(len(found), len(wanted))) if found[i : i + 1] != wanted[i : i + 1]]
        assert not differs or gaps[differs[0]] < CLOSE, (prompt, name, differs[0])
        compared += len(wanted) if not differs else differs[0]
        texts.add((prompt, tuple(found)))
    assert len(texts) == len(asked)  # each adapter has answers of its own
    assert compared > 100
