"""config.json of every family: absent keys, which layers have a window and which rotary embedding, what is refused.

The values are those of transformers' configuration classes; where it is installed, they are compared with the models
that it builds.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from ptst.errors import UserError
from ptst.kernels.rope import frequencies
from ptst.model.config import DecoderConfig
from tests.model.test_config import DUMP_OF_4, LLAMA, MISTRAL, figures, read_by_transformers, transformers_config

QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 8}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SMOLLM3 = {**LLAMA, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_hidden_layers": 9}
OLMO2 = {**LLAMA, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
OLMO3 = {**OLMO2, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "num_hidden_layers": 5}
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, OLMO2, OLMO3)
FULL, SLIDING = "full_attention", "sliding_attention"
ASKED = {"use_sliding_window": True, "sliding_window": 7}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


def by_layer(config: DecoderConfig) -> list:
    """(window, frequencies of the rotary embedding or None without one, its factor) of each layer."""
    out = []
    for layer in range(config.num_layers):
        rope = config.rope(layer)
        numbers = rope and frequencies(config.head_dim, rope.theta, rope.scaling).tolist()
        out.append((config.window(layer), numbers, getattr(rope and rope.scaling, "attention_factor", 1.0)))
    return out


def by_layer_in_transformers(raw: dict) -> list:
    """The same of the model that transformers builds."""
    from transformers import AutoModelForCausalLM

    c = transformers_config({**raw, "pad_token_id": 0})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(c).model
    rotary, out = type(model.rotary_emb)(c), []  # not on meta
    types = getattr(c, "layer_types", None) or [None] * c.num_hidden_layers
    for layer, kind in zip(model.layers, types, strict=True):
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        rope = getattr(rotary, f"{prefix}inv_freq").tolist(), getattr(rotary, f"{prefix}attention_scaling", 1.0)
        if not getattr(layer.self_attn, "use_rope", True):
            rope = None, 1.0
        window = c.sliding_window if c.model_type == "mistral" else getattr(layer.self_attn, "sliding_window", None)
        out.append((window, *rope))
    return out


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [  # kv heads, head_dim, eps, theta, positions, tied
        (QWEN2, (8, 2, 1e-6, 1e4, 32768, False)),
        (QWEN2 | {"head_dim": None, "rope_scaling": None}, (8, 2, 1e-6, 1e4, 32768, False)),
        (QWEN2 | {"num_key_value_heads": None, "attention_bias": True}, (16, 2, 1e-6, 1e4, 32768, False)),
        (QWEN3, (8, 128, 1e-6, 1e4, 32768, False)),
        (QWEN3 | {"head_dim": 6, "tie_word_embeddings": True}, (8, 6, 1e-6, 1e4, 32768, True)),
        (SMOLLM3, (4, 2, 1e-6, 2e6, 32768, True)),
        (SMOLLM3 | {"tie_word_embeddings": False, "rope_theta": 5e6}, (4, 2, 1e-6, 5e6, 32768, False)),
        (OLMO2, (16, 2, 1e-5, 1e4, 2048, False)),
        (OLMO3, (16, 2, 1e-5, 5e5, 2048, False)),
    ],
)
def test_absent_keys(raw, wanted):
    c = DecoderConfig.from_dict(raw)
    assert wanted == (c.num_kv_heads, c.head_dim, c.rms_norm_eps, c.rope_theta, c.max_positions, c.tie_embeddings)
    if find_spec("transformers"):
        ours, theirs = figures(c), read_by_transformers(raw)
        assert [*ours[:11], ours[12]] == [*theirs[:11], theirs[12]]


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (LLAMA | {"layer_types": [FULL, FULL]}, [None, None]),
        (LLAMA | ASKED, [None, None]),
        (MISTRAL | {"use_sliding_window": False}, [4096, 4096]),
        (MISTRAL | {"sliding_window": 7, "layer_types": [FULL, SLIDING], "head_dim": 2}, [None, 7]),
        (MISTRAL | {"sliding_window": 7, "layer_types": None, "head_dim": 2}, [7, 7]),
        (QWEN2 | {"sliding_window": 7}, [None, None]),
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}, [None, None]),
        (QWEN2 | ASKED, [None, None]),  # from layer 28 on
        (QWEN2 | ASKED | {"max_window_layers": 1}, [None, 7]),
        (QWEN2 | ASKED | {"max_window_layers": 0}, [7, 7]),
        (QWEN2 | ASKED | {"layer_types": [SLIDING, FULL]}, [7, None]),
        (QWEN3 | {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL, FULL]}, [None, None]),
        (QWEN3 | ASKED | {"max_window_layers": 1}, [None, 7]),
        (SMOLLM3 | {"sliding_window": 7}, [None] * 9),
        (SMOLLM3 | ASKED, [*[None] * 3, 7, *[None] * 3, 7, None]),
        (OLMO2 | ASKED, [None, None]),
        (OLMO3, [4096, 4096, 4096, None, 4096]),
        (OLMO3 | {"sliding_window": 7, "layer_types": [FULL, SLIDING, FULL, FULL, SLIDING]}, [None, 7, None, None, 7]),
        (OLMO3 | {"layer_types": [FULL] * 5}, [None] * 5),
    ],
)
def test_which_layers_have_a_window(raw, windows):
    c = DecoderConfig.from_dict(raw)
    assert [c.window(layer) for layer in range(c.num_layers)] == windows
    assert (c.sliding_window is None) == (set(windows) == {None})
    if find_spec("transformers"):
        assert [w for w, *_ in by_layer_in_transformers(raw)] == windows


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({}, (3, 7)),
        ({"no_rope_layer_interval": 3}, (2, 5, 8)),
        ({"no_rope_layer_interval": 1}, tuple(range(9))),
        ({"no_rope_layers": [1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]}, (1, 8)),  # it may be longer
        ({"no_rope_layers": None, "no_rope_layer_interval": 10}, ()),
    ],
)
def test_layers_without_a_rotary_embedding(changes, without):
    raw = SMOLLM3 | changes
    c = DecoderConfig.from_dict(raw)
    assert c.no_rope == without == tuple(i for i in range(9) if c.rope(i) is None)
    if find_spec("transformers"):
        assert tuple(i for i, (_, f, _) in enumerate(by_layer_in_transformers(raw)) if f is None) == without


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}},
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        MISTRAL | {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 1e6, "head_dim": 64},
        QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        QWEN3 | {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2.0}},
        QWEN3 | {"rope_scaling": {**YARN, "attention_factor": None, "beta_fast": None, "truncate": False}},
        QWEN3 | {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}},
        QWEN3 | {"rope_scaling": {**YARN, "mscale": 0.707}},
        QWEN3 | {"rope_scaling": {**YARN, "factor": None}},
        QWEN3 | {"rope_scaling": YARN, "original_max_position_embeddings": 128},
        SMOLLM3 | {"rope_scaling": YARN, "hidden_size": 1024},
        OLMO3,
        OLMO3 | {"rope_scaling": {**YARN, "attention_factor": 1.2, "beta_fast": 32.0}, "rope_theta": 500000},
        OLMO3 | {"rope_parameters": {FULL: {**YARN, "rope_theta": 3e5}, SLIDING: {"rope_theta": 7.0}}},
    ],
)
def test_rotary_embeddings_are_those_of_transformers(raw):
    config = DecoderConfig.from_dict(raw)
    assert config.rope_scaling is not None or raw is OLMO3
    pytest.importorskip("transformers", reason="test_parity.py has recorded logits of each kind")
    for ours, theirs in zip(by_layer(config), by_layer_in_transformers(raw), strict=True):
        assert ours[1] == (theirs[1] and pytest.approx(theirs[1], rel=1e-5))
        assert ours[2] == pytest.approx(theirs[2])


@pytest.mark.parametrize(("truncate", "fifth", "sixth"), [(True, 0.0075, 0.00158114), (False, 0.00757121, 0.0014094)])
def test_yarn(truncate, fifth, sixth):
    """Against transformers' figures: only between the ends of the range does it matter whether these are rounded."""
    scaling = {**YARN, "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "truncate": truncate}
    ((_, numbers, factor), _) = by_layer(DecoderConfig.from_dict(QWEN3 | {"head_dim": 16, "rope_scaling": scaling}))
    wanted = [1.0, 0.316228, 0.1, 0.0316228, fifth, sixth, 0.00025, 7.90569e-05]
    assert numbers == pytest.approx(wanted, rel=1e-5)
    assert factor == pytest.approx(1.138629436)


def test_the_layers_of_olmo_3_with_a_window_have_a_rotary_embedding_of_their_own():
    c = DecoderConfig.from_dict(OLMO3 | {"rope_scaling": YARN})
    assert [c.rope(i).scaling is None for i in range(5)] == [True, True, True, False, True]
    assert DecoderConfig.from_dict(OLMO3).sliding_rope is None
    with pytest.raises(ValueError, match=r"rope_theta = 7\.0 is not supported \(only 500000 is, outside of"):
        DecoderConfig.from_dict(OLMO3 | {"rope_theta": 7.0})
    with pytest.raises(ValueError, match="rope_parameters has 'rope_type'"):
        DecoderConfig.from_dict(OLMO3 | {"rope_parameters": YARN})


@pytest.mark.parametrize("raw", FAMILIES)
def test_whole_dumps_of_transformers(raw):
    """What `config.to_dict()` gives, of version 4 with all its settings of generation, and of the installed one."""
    changes = {"attention_bias": True} if raw["model_type"] == "qwen2" else {}
    assert DecoderConfig.from_dict(
        {**raw, **DUMP_OF_4, "tie_word_embeddings": raw is SMOLLM3, **changes}
    ) == DecoderConfig.from_dict(raw)
    if find_spec("transformers"):
        dump = json.loads(json.dumps(transformers_config(raw).to_dict()))
        assert DecoderConfig.from_dict(dump) == DecoderConfig.from_dict(raw)


@pytest.mark.parametrize("raw", FAMILIES)
def test_what_every_family_is_refused_for(raw):
    layers, bias = raw["num_hidden_layers"], raw["model_type"] != "qwen2"  # which always has them
    for change, message in (
        ({"attention_bias": bias}, f"attention_bias = {bias} is not supported"),
        ({"layer_types": ["linear_attention"] * layers}, "layer_types has 'linear_attention'; only full_attention and"),
        ({"layer_types": [FULL]}, f"a list of {layers} names is needed"),
        ({"layer_types": [SLIDING] * layers, "sliding_window": None}, "sliding_window does not say how long"),
        ({"clip_qkv": 8.0}, "unknown key 'clip_qkv'.*; remove it if it changes nothing"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ):
        with pytest.raises(UserError, match=message):
            DecoderConfig.from_dict(raw | change)


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (QWEN2, {"num_key_value_heads": 32}, "16 heads cannot share 32"),
        (QWEN2, {"use_mrope": True}, "use_mrope = True is not supported"),
        (QWEN2, {**ASKED, "max_window_layers": "x"}, "max_window_layers is 'x'"),
        (QWEN3, {"head_dim": None}, "head_dim is None; a number is needed"),
        (QWEN3, {"use_sliding_window": 1}, "use_sliding_window is 1; true or false is needed"),
        (QWEN3, {"layer_types": FULL}, "layer_types is 'full_attention'; a list of 2 names is needed"),
        (QWEN3, {"layer_types": [[], {}]}, r"layer_types has \[\]; only"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; it must be positive"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "a 0 or 1 for each of 9 layers is needed"),
        (SMOLLM3, {"no_rope_layers": [2] * 9}, "a 0 or 1 for each of 9 layers is needed"),
        (LLAMA, {"no_rope_layers": [1, 0]}, "unknown key 'no_rope_layers'"),
        (OLMO3, {"rope_parameters": {FULL: [1]}}, "an object each for full_attention and sliding_attention is needed"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is None; a number is needed"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not.*; use another model"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "RoPE scaling 'longrope' is not supported"),
        (LLAMA, {"rope_scaling": {"type": ["yarn"]}}, r"RoPE scaling \['yarn'\] is not supported"),
        (LLAMA, {"rope_scaling": {**YARN, "beta_fast": -1.0}}, r"beta_fast is -1\.0; it must be positive"),
        (LLAMA, {"rope_scaling": YARN, "rope_theta": 1}, r"rope_theta is 1\.0; yarn RoPE scaling needs one above 1"),
        (LLAMA, {"rope_scaling": {**YARN, "truncate": 1}}, "truncate is 1; true or false is needed"),
        (LLAMA, {"rope_scaling": {**YARN, "mrope_section": [1]}}, "unknown RoPE key 'mrope_section'"),
        (LLAMA, {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "embeddings is 0; it must be"),
    ],
)
def test_mistakes(raw, change, message):
    with pytest.raises(UserError, match=f"^mine.json: .*{message}"):
        DecoderConfig.from_dict({**raw, **change}, "mine.json")


@pytest.mark.parametrize(
    ("architecture", "keys", "what"),
    [
        ("MixtralForCausalLM", {"model_type": "mixtral", "num_local_experts": 8}, "this is a mixture of experts"),
        ("Qwen3MoeForCausalLM", {"model_type": "qwen3_moe", "num_experts": 128}, "this is a mixture of experts"),
        ("DeepseekV3ForCausalLM", {"n_routed_experts": 256}, "this is a mixture of experts"),
        ("FalconH1ForCausalLM", {"mamba_d_state": 256}, "this is a hybrid with layers other than attention"),
        ("Qwen3NextForCausalLM", {"linear_num_key_heads": 16}, "this is a hybrid with layers other than attention"),
        ("Mistral3ForConditionalGeneration", {"vision_config": {"a": 1}}, "this is a model of images or sound"),
        ("Gemma2ForCausalLM", {"model_type": "gemma2"}, "use one of LlamaForCausalLM, Mistral"),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(architecture, keys, what):
    with pytest.raises(UserError, match=f"architecture {architecture} is not supported.*{what}"):
        DecoderConfig.from_dict({**LLAMA, "architectures": [architecture], **keys})
    with pytest.raises(UserError, match=r"model_type 'other' is not supported.*use one of llama, mistral"):
        DecoderConfig.from_dict({**LLAMA, "model_type": "other"})


@pytest.mark.parametrize(
    "keys",
    [
        {"activation": "swiglu", "bias": False},  # Falcon 3, copies of InternLM as Llama
        {"use_flash_attention_2": True, "model_max_length": 4096, "seq_length": 4096},
        {"dual_chunk_attention_config": {"chunk_size": 262144}},  # Qwen2.5-1M
        {"clip_qkv": None, "hidden_activation": None},
    ],
)
def test_keys_of_published_files_that_change_nothing(keys):
    assert DecoderConfig.from_dict({**LLAMA, **keys}) == DecoderConfig.from_dict(LLAMA)


def test_yarn_of_a_model_that_was_trained_with_it():
    """As the Yarn-Llama-2 and Yarn-Mistral files have it."""
    scaling = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    files = ({**LLAMA, "rope_scaling": {**scaling, **more}} for more in ({}, {"finetuned": True}))
    without, with_it = map(DecoderConfig.from_dict, files)
    assert with_it == without
    assert with_it.rope_scaling.factor == 16.0


def test_quantized_weights_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"quantization_config = .*'awq'.*use the folder of the unquantized model"):
        DecoderConfig.from_dict({**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(UserError, match=r"compression_config = .*; use the folder of the unquantized model"):
        DecoderConfig.from_dict({**LLAMA, "compression_config": {"quant_method": "compressed-tensors"}})


def test_code_of_the_folder_is_noted_once_and_not_run(tmp_path, capsys):
    raw = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for _ in range(2):
        assert DecoderConfig.from_folder(tmp_path) == DecoderConfig.from_dict(LLAMA)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("names code of its own (auto_map), which is never run") == 1
