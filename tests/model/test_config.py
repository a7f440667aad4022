"""config.json is read as transformers reads it: published files, absent keys, keys that mean nothing or too much.

`python -m tests.model.test_config --record` writes published_configs.json anew from transformers: of each published
file the figures that the decoder needs, in the order of DecoderConfig's fields.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.model.config import DecoderConfig
from tests.conftest import SHARED
from tests.tiny import CONFIG

RECORD = Path(__file__).with_name("published_configs.json")
FIGURES = json.loads(RECORD.read_text()) if RECORD.exists() else {}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, **SIZES}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_NULL = (
    *("bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "decoder_start_token_id"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
    *("pad_token_id", "prefix", "problem_type", "sep_token_id", "suppress_tokens", "task_specific_params"),
    *("tokenizer_class", "torch_dtype", "rope_scaling"),
)
_FALSE = (
    *("add_cross_attention", "do_sample", "early_stopping", "is_decoder", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "output_scores", "remove_invalid_values", "return_dict_in_generate", "tf_legacy_loss"),
    *("tie_encoder_decoder", "torchscript", "use_bfloat16", "attention_bias", "mlp_bias", "tie_word_embeddings"),
)
_ZERO = ("chunk_size_feed_forward", "diversity_penalty", "encoder_no_repeat_ngram_size", "min_length")
_ONE = ("length_penalty", "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty", "temperature")
DUMP_OF_4 = {
    **dict.fromkeys(_NULL),
    **dict.fromkeys(_FALSE, False),
    **dict.fromkeys((*_ZERO, "no_repeat_ngram_size", "attention_dropout"), 0),
    **dict.fromkeys((*_ONE, "top_p", "typical_p"), 1.0),
    "_name_or_path": "",
    "max_length": 20,
    "top_k": 50,
    "pruned_heads": {},
    "return_dict": True,
    "use_cache": True,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "transformers_version": "4.45.0",
}


def figures(config: DecoderConfig) -> list:
    """Without the switches of other families, which test_config_families.py compares."""
    values = list(dataclasses.asdict(config).values())[:13]
    return [list(v.values()) if isinstance(v, dict) else v for v in values]


def transformers_config(raw: dict):
    from transformers import CONFIG_MAPPING

    kind = "ministral" if raw["model_type"] == "mistral" and "layer_types" in raw else raw["model_type"]
    return CONFIG_MAPPING[kind].from_dict(copy.deepcopy({**raw, "model_type": kind}))  # it writes into it


def read_by_transformers(raw: dict) -> list:
    c = transformers_config(raw)
    rope = getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta, **(c.rope_scaling or {})}
    rope = rope.get("full_attention", rope)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = [rope[k] for k in keys] if rope.get("rope_type") == "llama3" else None
    window = c.sliding_window if raw["model_type"] == "mistral" else None
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return [
        *(c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads),
        *(c.num_key_value_heads, head_dim, c.rms_norm_eps),
        *(rope["rope_theta"], scaling, c.max_position_embeddings, window, c.tie_word_embeddings),
    ]


def published(folder: Path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text())["config.json"] for p in sorted((folder / "configs").glob("*.json"))}


def test_published_configs_give_the_figures_of_transformers(shared):
    files = published(shared)
    assert files.keys() == FIGURES.keys()
    for name, raw in files.items():
        assert figures(DecoderConfig.from_dict(raw, name)) == FIGURES[name], name


def test_the_recorded_figures_are_still_those_of_transformers(shared):
    pytest.importorskip("transformers", reason="needs transformers, which wrote the figures")
    for name, raw in published(shared).items():
        assert read_by_transformers(raw) == FIGURES[name], name


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [  # kv heads, eps, theta, positions, window, tied
        (LLAMA, (16, 1e-6, 10000.0, 2048, None, False)),
        (MISTRAL, (8, 1e-6, 10000.0, 131072, 4096, False)),
        (LLAMA | {"num_key_value_heads": None}, (16, 1e-6, 10000.0, 2048, None, False)),
        (MISTRAL | {"sliding_window": None}, (8, 1e-6, 10000.0, 131072, None, False)),
        (MISTRAL | {"sliding_window": 64}, (8, 1e-6, 10000.0, 131072, 64, False)),
        (LLAMA | {"sliding_window": 64}, (16, 1e-6, 10000.0, 2048, None, False)),
        (LLAMA | {"rope_scaling": {"rope_theta": 7.0}, "rope_theta": 5.0}, (16, 1e-6, 7.0, 2048, None, False)),
        (LLAMA | {"rope_parameters": {"rope_type": "default"}}, (16, 1e-6, 10000.0, 2048, None, False)),
        (
            LLAMA | {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 3.0}},
            (16, 1e-6, 10000.0, 2048, None, False),
        ),
        (LLAMA | {"tie_word_embeddings": True}, (16, 1e-6, 10000.0, 2048, None, True)),
        # model_type decides, as it does for transformers' AutoModelForCausalLM.
        (LLAMA | {"architectures": ["LLaMAForCausalLM"]}, (16, 1e-6, 10000.0, 2048, None, False)),
        (LLAMA | {"architectures": None}, (16, 1e-6, 10000.0, 2048, None, False)),
        (LLAMA | {"model_type": "mistral"}, (8, 1e-6, 10000.0, 131072, 4096, False)),
    ],
)
def test_what_absent_and_null_keys_mean(raw, wanted):
    c = DecoderConfig.from_dict(raw)
    assert wanted == (
        *(c.num_kv_heads, c.rms_norm_eps, c.rope_theta, c.max_positions, c.sliding_window, c.tie_embeddings),
    )
    if find_spec("transformers"):
        assert figures(c) == read_by_transformers(raw)


def test_a_null_is_no_absent_key():
    """Of key/value heads, null means one for each head, in either architecture."""
    assert DecoderConfig.from_dict({**MISTRAL, "num_key_value_heads": None}).num_kv_heads == 16


@pytest.mark.parametrize("outside", [{}, {"original_max_position_embeddings": 77}])
@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 64}])
def test_where_the_length_before_scaling_stands(inside, outside):
    raw = {**LLAMA, "max_position_embeddings": 512, "rope_scaling": {**LLAMA3, **inside}, **outside}
    length = DecoderConfig.from_dict(raw).rope_scaling.original_max_positions
    assert length == (77 if outside else 64 if inside else 512)


def test_the_old_name_of_the_positions():
    assert DecoderConfig.from_dict({**LLAMA, "max_sequence_length": 4096}).max_positions == 4096
    both = {**LLAMA, "max_sequence_length": 4096, "max_position_embeddings": 1024}
    assert DecoderConfig.from_dict(both).max_positions == 1024


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_class": "LlamaTokenizer", "_flash_attn_2_enabled": True, "use_sliding_window": False},
        {"auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}},
        {"pruned_heads": {}, "is_decoder": True, "torchscript": False, "tie_encoder_decoder": False},
        {"top_k": 50, "repetition_penalty": 1.1, "exponential_decay_length_penalty": None, "bad_words_ids": None},
        {"hidden_act": "swish", "quantization_config": None, "max_window_layers": 28},
    ],
)
def test_keys_without_effect(keys):
    assert DecoderConfig.from_dict({**CONFIG, **keys}) == DecoderConfig.from_dict(CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({key: None}, f"{key} is None") for key in ("vocab_size", *SIZES, "rms_norm_eps")),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"architectures": [], "model_type": None}, "architecture none is not supported"),
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of the 5 attention heads"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0\.5 is not supported"),
        ({"rope_scaling": [1]}, "must be objects"),
        ({"quantization": {"bits": 4}}, "quantization = "),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = "),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = "),
        ({"attn_logit_softcapping": 30.0}, "unknown key 'attn_logit_softcapping'"),
    ],
)
def test_what_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict({**LLAMA, **change})


@pytest.mark.parametrize("key", ["vocab_size", *SIZES])
def test_sizes_that_decide_the_shape_have_no_default(key):
    with pytest.raises(ValueError, match=f"{key} is None; a number is needed"):
        DecoderConfig.from_dict({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({key: 0}, f"{key} is 0; it must be positive") for key in ("vocab_size", *SIZES)),
        *(({key: 10**9}, f"{key} is 1000000000; at most") for key in ("vocab_size", *SIZES)),
        *(({key: value}, f"{key} is {value}; a finite number is needed")
          for key in ("rms_norm_eps", "rope_theta") for value in (float("nan"), float("inf"))),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; at most 1000 is supported"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0; a whole number is needed"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; a number is needed"),
        ({"num_key_value_heads": "x"}, "num_key_value_heads is 'x'; a number is needed"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1; it must be positive"),
        ({"head_dim": -8}, "head_dim is -8; it must be positive"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings is inf; a whole number is needed"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; a number is needed"),
        ({"rope_theta": True}, "rope_theta is True; a number is needed"),
        ({"rope_scaling": {**LLAMA3, "factor": float("nan")}}, "factor is nan; a finite number is needed"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8'; a number is needed"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be above low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "x"}}, "embeddings is 'x'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false is needed"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0; true or false is needed"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; a list of names is needed"),
        ({"architectures": [{}]}, "a list of names is needed"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    ],
)  # fmt: skip
def test_numbers_are_finite_and_of_a_size_that_models_have(change, message):
    with pytest.raises(UserError, match=f"^mine.json: .*{message}"):
        DecoderConfig.from_dict({**LLAMA, **change}, "mine.json")


def test_a_config_that_is_no_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: not a JSON object"):
        DecoderConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"config\.json: not valid JSON \(nested too deeply\)"):
        DecoderConfig.from_folder(tmp_path)


def test_a_window_of_no_tokens():
    with pytest.raises(ValueError, match="sliding_window is 0; it must be positive"):
        DecoderConfig.from_dict({**MISTRAL, "sliding_window": 0})


if __name__ == "__main__" and "--record" in sys.argv:
    lines = (f"{json.dumps(n)}: {json.dumps(read_by_transformers(raw))}" for n, raw in published(SHARED).items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
