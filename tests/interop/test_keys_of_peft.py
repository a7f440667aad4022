"""Every key that peft writes into adapter_config.json is read, has no effect, or is refused by its name when it is on.

The keys are those of the installed peft, so that one of a new version is noticed here and not in somebody's results."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from ptst.errors import UserError
from ptst.model.adapter_files import read_lora_config

peft = pytest.importorskip("peft", reason="needs the package peft (pip install 'ptst-lab[interop]')")

READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "bias"),
}
# On or off, answers are the same: bookkeeping, and settings of what another key turns on.
NO_EFFECT = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # init_lora_weights
    "qalora_group_size",  # use_qalora
    "ensure_weight_tying",  # modules_to_save, trainable_token_indices, target_modules of the embedding
}
# A value of every other key that is on.
ON: dict[str, object] = {
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "megatron_config": {"hidden_size": 8},
    "trainable_token_indices": [3],
    "use_dora": True,
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "target_parameters": ["mlp.up_proj.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1},
}


@pytest.fixture
def written(tmp_path):
    """The configuration that peft writes where nothing is asked of it."""
    peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path)
    return tmp_path / "adapter_config.json"


def change(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_peft_writes_is_read(written):
    found = read_lora_config(written.parent)
    assert (found.rank, found.alpha, found.targets) == (8, 8, ("q_proj",))


FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]


@pytest.mark.parametrize("key", sorted({*FIELDS} - READ - NO_EFFECT))
def test_a_key_that_is_neither_read_nor_without_effect(written, key):
    if key not in ON:
        warnings.warn(f"peft {peft.__version__} has a new key, {key}: refused where it is on, until read", stacklevel=1)
    change(written, **{key: ON.get(key, "on")})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} = .* is not supported; (merge it|give a plain)"):
        read_lora_config(written.parent)


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_mapping", {"base_model_class": "LlamaForCausalLM"}), ("peft_version", "9.9"), ("revision", "v1"),
     ("inference_mode", True), ("runtime_config", {"ephemeral_gpu_offload": True}), ("megatron_core", "megatron"),
     ("loftq_config", {"loftq_bits": 4}), ("eva_config", {"rho": 2.0}), ("corda_config", {"corda_method": "ipm"}),
     ("lora_ga_config", {"direction": "ArB2r"}), ("qalora_group_size", 32), ("ensure_weight_tying", True)],
)  # fmt: skip
def test_a_key_without_effect(written, key, value):
    before = read_lora_config(written.parent)
    change(written, **{key: value})
    assert read_lora_config(written.parent) == before
    assert key in NO_EFFECT


@pytest.mark.parametrize(
    ("key", "value", "attribute"),
    [("base_model_name_or_path", "org/name", "base"), ("r", 3, "rank"), ("lora_alpha", 5.5, "alpha"),
     ("lora_dropout", 0.25, "dropout"), ("use_rslora", True, "rslora"), ("target_modules", ["v_proj"], "targets"),
     ("exclude_modules", ["o_proj"], "exclude"), ("layers_to_transform", [1], "layers"),
     ("rank_pattern", {"q_proj": 2}, "rank_pattern"), ("alpha_pattern", {"q_proj": 2.5}, "alpha_pattern")],
)  # fmt: skip
def test_a_key_that_is_read(written, key, value, attribute):
    change(written, **{key: value})
    found = getattr(read_lora_config(written.parent), attribute)
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert key in READ


def test_no_key_is_here_that_peft_no_longer_has():
    gone = (READ | NO_EFFECT | {*ON}) - {*FIELDS}
    if gone:
        warnings.warn(f"peft {peft.__version__} no longer has {', '.join(sorted(gone))}", stacklevel=1)
    assert not gone & READ
