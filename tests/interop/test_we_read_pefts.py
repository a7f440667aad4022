"""Adapters that peft made and trained: the same logits here, or a refusal that names what stands in the way."""

from __future__ import annotations

import json
import re

import pytest
import torch

from ptst.errors import UserError
from ptst.model.config import TARGETS
from ptst.model.lora import load_adapter, merge_lora, read_lora_config
from ptst.model.weights import load_decoder
from tests.interop.peers import (
    KINDS,
    LIMIT,
    TOKENS,
    count_adapters,
    distance,
    open_peer,
    our_logits,
    peer_logits,
    train_with_peft,
    write_model,
)

peft = pytest.importorskip("peft", reason="needs the package peft (pip install 'ptst-lab[interop]')")

LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind: str = "llama-tied"):
        if kind not in made:
            made[kind] = write_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


def config(**changes) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], **changes}
    )


# How peft was configured, and how many projections of three layers have an adapter then.
READ: dict[str, tuple[dict, int]] = {
    **{name: ({"target_modules": [name]}, 3) for name in TARGETS},
    "a pair": ({"target_modules": ["q_proj", "v_proj"]}, 6),
    "another pair": ({"target_modules": ["gate_proj", "down_proj"], "lora_dropout": 0.3}, 6),
    "by architecture": ({"target_modules": None}, 6),
    "all-linear": ({"target_modules": "all-linear"}, 21),
    "all-linear but": ({"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]}, 17),
    "paths": ({"target_modules": ["layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]}, 2),
    "regex": ({"target_modules": r".*\.(0|2)\.self_attn\.[qk]_proj|.*layers\.1\.mlp\.up_proj"}, 5),
    "regex but": ({"target_modules": r".*_proj", "exclude_modules": r".*layers\.[01]\..*|.*\.mlp\..*"}, 4),
    "layers": ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}, 4),
    "layers by name": ({"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, 1),
    "ranks": ({"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7}}, 6),
    "alphas": ({"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"up_proj": 1, "0.self_attn.q_proj": 9}}, 6),
    "ranks and alphas": ({"target_modules": "all-linear", "rank_pattern": {"^model.layers.2.mlp.down_proj": 1},
                          "alpha_pattern": {"k_proj": 0.5, r".*\.mlp\..*": 33}, "use_rslora": True}, 21),
    "rslora": ({"target_modules": ["o_proj", "k_proj"], "use_rslora": True}, 6),
    "gaussian": ({"init_lora_weights": "gaussian"}, 3),
    "random B": ({"init_lora_weights": False}, 3),
    # Initializations that leave the base as it is: A and B alone say what was learned.
    "orthogonal": ({"init_lora_weights": "orthogonal", "target_modules": ["q_proj", "down_proj"]}, 6),
    "mica": ({"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj"]}, 6),
    "eva": ({"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}, 3),
    "settings of an initialization that is not in use": ({"corda_config": peft.tuners.lora.config.CordaConfig()}, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_read(folders, tmp_path, name):
    changes, places = READ[name]
    peer = train_with_peft(folders(), config(**changes))
    peer.save_pretrained(tmp_path)
    wanted = peer_logits(peer)
    decoder = load_decoder(folders())
    load_adapter(decoder, tmp_path)
    assert (
        count_adapters(decoder)
        == places
        == sum(n.endswith("lora_A.default.weight") for n, _ in peer.named_parameters())
    )
    with torch.no_grad():
        assert distance(decoder.logits(torch.tensor(TOKENS)), wanted) <= LIMIT
        merge_lora(decoder)
        assert distance(decoder.logits(torch.tensor(TOKENS)), wanted) <= LIMIT
    assert distance(our_logits(folders()), wanted) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama-tied"])
def test_of_every_kind_of_model(folders, tmp_path, kind):
    peer = train_with_peft(folders(kind), config(target_modules="all-linear"))
    peer.save_pretrained(tmp_path)
    assert distance(our_logits(folders(kind), tmp_path), peer_logits(peer)) <= LIMIT
    assert distance(our_logits(folders(kind)), peer_logits(peer)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_of_half_width(folders, tmp_path, dtype):
    peer = train_with_peft(folders(), config(target_modules="all-linear"))
    for name, p in peer.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype)
    peer.save_pretrained(tmp_path)
    assert distance(our_logits(folders(), tmp_path), peer_logits(peer.float())) <= LIMIT


def test_one_adapter_of_several(folders, tmp_path):
    """peft saves every adapter but the first in a folder of its name."""
    peer = train_with_peft(folders(), config())
    peer.add_adapter("second", config(target_modules=["v_proj"], init_lora_weights=False))
    peer.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        peer.set_adapter(name)
        assert distance(our_logits(folders(), folder), peer_logits(peer.eval())) <= LIMIT


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialization_that_changes_the_base(folders, tmp_path, init):
    """Refused by name; read once peft has saved it as plain LoRA, and once it is merged, as the refusal says."""
    peer = train_with_peft(folders(), config(init_lora_weights=init, target_modules=["q_proj", "up_proj"]), steps=0)
    peer.peft_config["default"].init_lora_weights = True
    peer.save_pretrained(tmp_path / "untrained")
    peer.peft_config["default"].init_lora_weights = init
    learn(peer)
    peer.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match=rf"init_lora_weights = '{init}' is not supported; merge it into its base"):
        our_logits(folders(), tmp_path / "own")
    wanted = peer_logits(peer.eval())
    peer.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "untrained"))
    assert read_lora_config(tmp_path / "plain").rank == 8  # what was learned, and what was taken from the base
    assert distance(our_logits(folders(), tmp_path / "plain"), wanted) <= 10 * LIMIT
    peer.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert distance(our_logits(tmp_path / "merged"), wanted) <= 10 * LIMIT
    assert distance(our_logits(folders()), wanted) > 1e-3


def learn(peer, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=5e-2)
    tokens = torch.tensor([TOKENS])
    for _ in range(steps):
        peer.train()(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# How peft was configured, and what the refusal says. All of these can be merged into their base.
REFUSED: dict[str, tuple[dict, str]] = {
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, r"modules_to_save = \['embed_tokens', 'lm_head"),
    "head saved": ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
    "norms saved": ({"modules_to_save": ["input_layernorm"]}, r"modules_to_save = \['input_layernorm'\] is not"),
    "embedding adapted": ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names model.embed_tokens:"),
    "head adapted": ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names lm_head: only"),
    "dora": ({"use_dora": True}, "use_dora = True is not supported"),
    "biases": ({"bias": "all"}, "bias = 'all' is not supported"),
    "biases of lora": ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
    "bias of B": ({"lora_bias": True}, "lora_bias = True is not supported"),
    "tokens": ({"trainable_token_indices": [5, 7]}, r"trainable_token_indices = \[5, 7\] is not supported"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, r"target_parameters = \['mlp.up_proj.weight'\]"),
    "kasa": ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "kasa_config = "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_read_when_merged(folders, tmp_path, name):
    changes, message = REFUSED[name]
    base = folders("qwen2" if "bias" in name else "llama")
    peer = train_with_peft(base, config(**changes))
    peer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"adapter_config\.json: {message}.*; merge it into its base"):
        our_logits(base, tmp_path / "adapter")
    wanted = peer_logits(peer)
    peer.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert distance(our_logits(tmp_path / "merged"), wanted) <= 10 * LIMIT


def test_a_vocabulary_that_grew(folders, tmp_path):
    """peft then saves embedding and head with the adapter, whatever its configuration says."""
    peer = train_with_peft(folders("llama"), config())
    peer.get_base_model().resize_token_embeddings(310)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        peer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"(lm_head|embed_tokens)\S*' has no place .*no A or B of a projection: merge it"
    ):
        our_logits(folders("llama"), tmp_path)


def test_what_cannot_be_merged_is_not_sent_there(folders, tmp_path):
    """Activated LoRA, which peft refuses to merge; replicated layers, whose common weights it changes twice."""
    peer = train_with_peft(folders(), config(alora_invocation_tokens=[88, 12]))
    peer.save_pretrained(tmp_path / "activated")
    with pytest.raises(NotImplementedError):
        peer.merge_and_unload()
    with pytest.raises(UserError, match=r"alora_invocation_tokens = \[88, 12\] is not supported; give a plain LoRA"):
        our_logits(folders(), tmp_path / "activated")
    peer = train_with_peft(folders(), config(layer_replication=[[0, 2], [1, 3]]))
    peer.save_pretrained(tmp_path / "replicated")
    wanted = peer_logits(peer)
    assert distance(peer_logits(peer.merge_and_unload()), wanted) > 0.01
    with pytest.raises(
        UserError, match=r"layer_replication = \[\[0, 2\], \[1, 3\]\] is not supported; give a plain LoRA"
    ):
        our_logits(folders(), tmp_path / "replicated")


def make(kind: str, **settings):
    types = {t.value: c for t, c in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return types[kind](task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("LOHA", {"target_modules": ["q_proj"]}), ("LOKR", {"target_modules": ["q_proj"]}),
        ("ADALORA", {"target_modules": ["q_proj"], "total_step": 9}),
        ("OFT", {"target_modules": ["q_proj"], "oft_block_size": 8}),
        ("VERA", {"target_modules": ["q_proj"]}), ("HRA", {"target_modules": ["q_proj"]}),
        ("LN_TUNING", {}), ("TRAINABLE_TOKENS", {"token_indices": [3, 4]}),
    ],
)  # fmt: skip
def test_other_adapters_are_refused_and_read_when_merged(folders, tmp_path, kind, settings):
    peer = peft.get_peft_model(open_peer(folders()), make(kind, **settings)).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    peer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"peft_type '{kind}' is not supported \(LORA is\); merge it into its base"):
        our_logits(folders(), tmp_path / "adapter")
    wanted = peer_logits(peer)
    assert distance(our_logits(folders()), wanted) > 1e-4
    peer.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert distance(our_logits(tmp_path / "merged"), wanted) <= 10 * LIMIT


@pytest.mark.parametrize(
    ("kind", "settings"), [("PREFIX_TUNING", {"num_virtual_tokens": 3}), ("PROMPT_TUNING", {"num_virtual_tokens": 3})]
)
def test_prompts_of_vectors_are_refused_without_a_way_that_leads_nowhere(folders, tmp_path, kind, settings):
    peer = peft.get_peft_model(open_peer(folders()), make(kind, **settings))
    peer.save_pretrained(tmp_path)
    assert not hasattr(peer.base_model, "merge_and_unload")
    with pytest.raises(UserError, match=rf"peft_type '{kind}' is not supported \(LORA is\); give a LoRA adapter"):
        our_logits(folders(), tmp_path)


def test_every_kind_of_peft_is_refused_by_its_name(tmp_path):
    """Those that put vectors before the prompt, or choose among adapters, are not sent to merge_and_unload."""
    from peft.config import PromptLearningConfig

    for kind, described in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value == "LORA":
            continue
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind.value}))
        with pytest.raises(UserError, match=rf"peft_type '{re.escape(kind.value)}' is not supported") as refusal:
            read_lora_config(tmp_path)
        if issubclass(described, PromptLearningConfig):
            assert "merge" not in str(refusal.value), kind
