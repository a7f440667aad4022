"""Adapters of others: the same projections, ranks, scales and logits as in peft, or a refusal that names the key."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ptst.errors import UserError
from ptst.generation.multi_lora import read_adapter
from ptst.generation.score import token_log_probabilities
from ptst.model import adapter_files, patterns
from ptst.model.decoder import LoraLinear
from ptst.model.lora import load_adapter, merge_lora, read_lora_config, target_weights
from ptst.model.weights import load_decoder
from tests.model.peft_cases import (
    ALL,
    CASES,
    DUMP,
    FIGURES,
    PROBE,
    TOKENS,
    config_of,
    peft_places,
    write_adapter,
    write_base,
)

RECORDED = json.loads(FIGURES.read_text())
RANKS = {f"layers.{i}.self_attn.q_proj": 2 for i in range(2)}
PREFIX = "base_model.model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def decoder(base):
    return load_decoder(base)


def ranks_of(name: str) -> dict[str, int]:
    return {key: rank for key, (rank, _) in RECORDED[name]["places"].items()}


@pytest.mark.parametrize("name", CASES)
def test_as_in_peft(decoder, tmp_path, name):
    """Against recorded figures: places, then logits unmerged, merged, and as one of several adapters."""
    folder = write_adapter(tmp_path, config_of(name), ranks_of(name))
    places = read_lora_config(folder).places(target_weights(decoder))
    assert {key: list(place) for key, place in places.items()} == RECORDED[name]["places"]
    attached = copy.deepcopy(decoder)
    load_adapter(attached, folder)
    merged = copy.deepcopy(attached)
    merge_lora(merged)
    assert not any(isinstance(m, LoraLinear) for m in merged.modules())
    wanted = torch.tensor(RECORDED[name]["probe"], dtype=torch.float64)
    tokens = torch.tensor(TOKENS)
    logits = attached.logits(tokens)
    for found in (logits, merged.logits(tokens)):
        assert (found.double() @ PROBE - wanted).abs().max() <= 1e-3  # the probe sums 300 logits
    assert (decoder.logits(tokens).double() @ PROBE - wanted).abs().max() > 1
    row = [(TOKENS, [False] + [True] * (len(TOKENS) - 1))]
    ours = torch.tensor(token_log_probabilities(decoder, row, read_adapter(decoder, folder))[0])
    theirs = logits.log_softmax(-1)[range(len(TOKENS) - 1), TOKENS[1:]]
    assert (ours - theirs).abs().max() < 1e-4


def test_live(base, decoder, tmp_path):
    """Against peft itself: the recorded places, and folders that it wrote, also over the model without its head."""
    pytest.importorskip("peft", reason="needs transformers and peft, which wrote the figures")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM

    from benchmarks.parity import peer_logits

    tokens = torch.tensor(TOKENS)
    for name in CASES:
        assert peft_places(base, config_of(name)) == RECORDED[name]["places"]
    for kind, name in (
        (AutoModelForCausalLM, "patterns rslora"),
        (AutoModelForCausalLM, "unsloth"),
        (AutoModel, "dump"),
    ):
        folder = tmp_path / f"{kind.__name__}-{name}"
        known = {k: v for k, v in config_of(name).items() if k not in ("peft_type", "auto_mapping", "peft_version")}
        known["task_type"] = "CAUSAL_LM" if kind is AutoModelForCausalLM else None
        model = get_peft_model(kind.from_pretrained(base), LoraConfig(**{**known, "init_lora_weights": False}))
        model.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is False
        attached = copy.deepcopy(decoder)
        load_adapter(attached, folder)
        if kind is AutoModelForCausalLM:
            wanted = peer_logits(base, TOKENS, folder)
        else:
            with torch.no_grad():
                wanted = model.eval()(tokens[None]).last_hidden_state[0] @ decoder.head_VE.t()
        assert (attached.logits(tokens) - wanted).abs().max() <= 1e-4
        assert (decoder.logits(tokens) - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace(".weight", ".my-adapter_2.weight"),
        lambda k: k.removeprefix("base_model.model."),
        lambda k: k.removeprefix(PREFIX),
        lambda k: k.replace(PREFIX, "base_model.model."),
        lambda k: k.replace(PREFIX, "module._orig_mod.base_model.model.model."),
        lambda k: "_fsdp_wrapped_module." + k.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    ],
)
def test_names_of_tensors(decoder, tmp_path, rename):
    config = config_of("names") | {"target_modules": ["q_proj"]}
    plain = read_adapter(decoder, write_adapter(tmp_path / "plain", config, RANKS))
    other = read_adapter(decoder, write_adapter(tmp_path / "other", config, RANKS, rename))
    for name, pair in plain.matrices.items():
        assert all(map(torch.equal, pair, other.matrices[name]))


def test_tensors_that_are_not_of_this_adapter(decoder, tmp_path):
    config = config_of("names") | {"target_modules": ["q_proj"]}
    for rename, message in (
        (lambda k: k.replace("lora_A.weight", "lora_magnitude_vector"), r"no A or B of a projection: merge it"),
        (lambda k: k.replace("lora_A.weight", "lora_B.bias"), "has no place in this model"),
        (lambda k: k.replace("layers.1", "layers.7"), "was it trained on another model"),
        (lambda k: k.replace(PREFIX, "base_model.model.vision_tower."), "was it trained on another model"),
        (lambda k: k.replace(f"{PREFIX}layers.1.", "layers.0."), r"q_proj\.lora_A is there twice"),
    ):
        folder = write_adapter(tmp_path, config, RANKS, rename)
        with pytest.raises(UserError, match=rf"adapter_model\.safetensors: .*{message}"):
            read_adapter(decoder, folder)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"in adapter_model\.bin, which is pickled and is not loaded; load it"):
        read_adapter(decoder, tmp_path)
    with pytest.raises(UserError, match=r"is not an adapter folder \(it has no adapter_config\.json\)"):
        read_lora_config(tmp_path / "nothing")


def test_an_adapter_without_some_of_its_tensors(decoder, tmp_path):
    folder = write_adapter(tmp_path, config_of("names") | {"target_modules": ["q_proj"]}, {next(iter(RANKS)): 2})
    with pytest.raises(UserError, match=r"lacks 2 tensors that adapter_config\.json names.*; fetch or save both"):
        read_adapter(decoder, folder)


def test_bfloat16_matrices_are_scaled_in_float32(decoder, tmp_path):
    config = config_of("names") | {"target_modules": ["q_proj"], "lora_alpha": 0.7}
    for pattern in ({}, {"alpha_pattern": {"q_proj": 0.3}}):
        folder = write_adapter(tmp_path, config | pattern, RANKS, dtype=torch.bfloat16)
        attached = copy.deepcopy(decoder)
        load_adapter(attached, folder)
        row = [(TOKENS, [False] + [True] * (len(TOKENS) - 1))]
        ours, theirs = (
            token_log_probabilities(d, row, a) for d, a in ((decoder, read_adapter(decoder, folder)), (attached, None))
        )
        assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"init_lora_weights": v}, f"init_lora_weights = '{v}' is not supported; merge it into its base")
          for v in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga")),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, r"modules_to_save = \['embed_tokens', 'lm_head'\] is not"),
        ({"lora_bias": True}, "lora_bias = True is not"), ({"bias": "all"}, "bias = 'all' is not"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens = \[1, 2\] is not supported; give a"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices = "),
        ({"layer_replication": [[0, 2]]}, "layer_replication = "),
        ({"target_parameters": ["w"]}, "target_parameters = "),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = "), ({"enable_lora": [True, False]}, "enable_lora = "),
        ({"use_qalora": True}, "use_qalora = "), ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = "),
        ({"megatron_config": {"a": 1}}, "megatron_config = "), ({"kasa_config": {"beta": 1}}, "kasa_config = "),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' is not"),
        ({"peft_type": "ADALORA"}, r"peft_type 'ADALORA' is not supported \(LORA is\); merge it into its base"),
        ({"peft_type": "PREFIX_TUNING"}, r"'PREFIX_TUNING' is not supported \(LORA is\); give a LoRA adapter"),
        ({"of_a_later_version": "on"}, "of_a_later_version = 'on' is not supported"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names model.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names lm_head"),
        ({"target_modules": ".*"}, "target_modules names model.embed_tokens"),
        ({"target_modules": ["c_attn"]}, r"target_modules = \('c_attn',\) names no projection .* choose from q_proj"),
        ({"target_modules": "q_proj"}, "target_modules = 'q_proj' names no projection"),  # a regular expression
        ({"target_modules": []}, r"target_modules is \[\]; a list of names"),
        ({"target_modules": None}, "is None; a list"),
        ({"target_modules": "(q_proj"}, r"has a pattern that is no regular expression \(missing \)"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern: q_proj is 0; it must be positive"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern: q_proj is 2\.5; a whole number is needed"),
        ({"rank_pattern": ["q_proj"]}, "an object of names and numbers is needed"),
        ({"alpha_pattern": {"*": 1}}, "has a pattern that is no regular expression"),
        ({"layers_to_transform": "1"}, "a list of the indices of layers is needed"),
        ({"layers_to_transform": [True]}, "a list of the indices of layers is needed"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "layers_to_transform cannot restrict a regular"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "names no projection"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1\.5; it must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_refused_by_name(decoder, tmp_path, change, message):
    folder = write_adapter(tmp_path, config_of("dump") | change, {f"layers.0.self_attn.{t}": 2 for t in ALL[:4]})
    with pytest.raises(UserError, match=rf"adapter_config\.json.*: .*{message}"):
        read_adapter(decoder, folder)


def test_options_that_are_off_are_no_reason_to_refuse(decoder, tmp_path):
    """Dumps of every version of peft, of ms-swift, and keys of later versions, at values that are off."""
    old = {"enable_lora": None, "merge_weights": False, "modules_to_save": None, "fan_in_fan_out": False}
    swift = {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "use_qa_lora": False}
    later = {"of_a_later_version": None, "another": False, "lists": [], "objects": {}, "texts": ""}
    odd = {"runtime_config": {"ephemeral_gpu_offload": False}, "revision": "main", "inference_mode": False}
    starts = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "ipm"}}
    more = {"modules_to_save": [], "megatron_core": None, "task_type": None}
    for extra in (DUMP, old, swift, later, odd, starts, {"init_lora_weights": "orthogonal"}, more):
        folder = write_adapter(tmp_path, config_of("names") | extra, ranks_of("names"))
        assert len(read_adapter(decoder, folder).matrices) == 4


def test_a_pattern_of_layers_may_have_groups(decoder, tmp_path):
    config = config_of("one layer") | {"layers_pattern": "(layers|h)"}
    folder = write_adapter(tmp_path, config, {"layers.0.self_attn.q_proj": 2})
    assert list(read_adapter(decoder, folder).matrices) == ["layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_pattern_that_backtracks_for_ever(decoder, tmp_path, monkeypatch, key):
    """It ends with one sentence: no thread and no signal could stop it inside this process."""
    slow = "((([a-z_.0-9]+)+)+)+!"
    for module in (adapter_files, patterns):
        monkeypatch.setattr(module, "SECONDS", 1)
    value = {"rank_pattern": {slow: 2}}.get(key, slow)
    folder = write_adapter(tmp_path, config_of("names") | {key: value}, RANKS)
    with pytest.raises(
        UserError, match=r"adapter_config\.json: its regular expressions take more than 1 s .* one by one"
    ):
        read_adapter(decoder, folder)


def test_mere_names_need_no_other_process(decoder, monkeypatch):
    monkeypatch.setattr(patterns, "_in_child", None)
    keys = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head")
    names = (("whole", "lm_head"), ("end", "q_proj"), ("end", r"layers\.0.mlp\.up_proj"), ("layer", ""), ("layer", "h"))
    found = patterns.match_all(names, keys)
    assert [[*found[name].values()] for name in names] == [
        *([None, None, True], [None, True, None], [True, None, None], ["0", "1", None], [None, None, None])
    ]


def test_names_that_a_model_lacks(decoder, tmp_path):
    config = read_lora_config(write_adapter(tmp_path, config_of("names that a model lacks"), {}))
    assert config.without_place(target_weights(decoder)) == ["c_attn", "w1", "query_key_value"]
