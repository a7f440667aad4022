"""What a config.json may say: the supported architectures with the values of absent keys, and the keys that are known.

The values are those of transformers' configuration classes. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

QkNorm = Literal["head", "projection"]


@dataclass(frozen=True)
class Architecture:
    """Which switches of the decoder (ptst/model/config.py) an architecture sets by its name alone, and which keys of
    config.json it reads beside those that all have.

    `defaults`: the values of absent keys. Sizes that determine the shape have none: a file without them is broken.
    `windows`: how the layers with a sliding window are found: "all" of them; "types" by `layer_types` alone, by default
    all; "every fourth not" the same, by default without every fourth; "from" the layer `max_window_layers` on, or
    "no rope", if `use_sliding_window` asks for it; None: the architecture has no window, whatever the file says."""

    defaults: Mapping[str, Any]
    rope_theta: float = 10000.0
    windows: Literal["all", "types", "every fourth not", "from", "no rope"] | None = None
    qkv_bias: bool = False
    qk_norm: QkNorm | None = None
    post_norm: bool = False


_COMMON = {"rms_norm_eps": 1e-6, "num_key_value_heads": None, "tie_word_embeddings": False}
_MISTRAL = {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN = {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_QWEN |= {"max_window_layers": 28}
_SMOLLM3 = {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True}
_OLMO = {**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}

# By the `model_type` of config.json.
ARCHITECTURES = {
    "llama": Architecture({**_COMMON, "max_position_embeddings": 2048}),
    "mistral": Architecture(_MISTRAL, windows="all"),
    "ministral": Architecture(_MISTRAL, windows="types"),
    "qwen2": Architecture(_QWEN, windows="from", qkv_bias=True),
    "qwen3": Architecture({**_QWEN, "head_dim": 128}, windows="from", qk_norm="head"),
    "smollm3": Architecture({**_SMOLLM3, "no_rope_layer_interval": 4}, 2000000.0, "no rope"),
    "olmo2": Architecture(_OLMO, qk_norm="projection", post_norm=True),
    "olmo3": Architecture(
        {**_OLMO, "sliding_window": 4096}, 500000.0, "every fourth not", qk_norm="projection", post_norm=True
    ),
}
# By the names of `architectures`.
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # as the first conversions of Llama 1 spell it
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
}
# What a model is that has such a key, for the message that it is not supported.
OTHER_KINDS = {
    "a mixture of experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"),
    "a hybrid with layers other than attention": (
        *("mamba_d_state", "mamba_d_conv", "ssm_cfg", "linear_num_key_heads", "linear_conv_kernel_dim", "conv_L_cache"),
        *("layers_block_type", "hybrid_override_pattern", "block_types"),
    ),
    "a model of images or sound with text": ("vision_config", "audio_config", "text_config"),
}

# Keys without effect on what the decoder computes: bookkeeping, training settings of other tools, token ids (these are
# taken from the tokenizer and generation_config.json).
WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "return_dict"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
        *("pretraining_tp", "_name_or_path", "name_or_path", "max_length", "is_llama_config", "problem_type"),
        *("transformers.js_config", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
        "model_name",  # of unsloth
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id"),
        *("gradient_checkpointing", "num_labels", "use_return_dict", "torchscript", "use_bfloat16", "_commit_hash"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_flash_attn_2_enabled"),
        *("_experts_implementation", "_experts_implementation_internal", "_output_attentions", "xla_device"),
        *("use_flash_attention_2", "model_max_length", "seq_length"),
        "dual_chunk_attention_config",  # of vLLM; full attention within a chunk (262144 tokens of Qwen2.5-1M)
        *("tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side", "prefix", "finetuning_task"),
        *("sep_token_id", "decoder_start_token_id", "task_specific_params", "tf_legacy_loss", "is_decoder"),
        *("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop"),
        # Names code that is never run here.
        "auto_map",
        # Generation settings, which older files keep here.
        *("min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"),
        *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "output_logits"),
        *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "max_new_tokens", "min_new_tokens", "cache_implementation"),
        *("max_time", "stop_strings", "guidance_scale", "low_memory", "renormalize_logits", "force_words_ids"),
        *("constraints", "sequence_bias", "token_healing", "prompt_lookup_num_tokens", "generation_config"),
    }
)
# Keys of which only these values are supported.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "activation": ("swiglu", "silu", None),  # Falcon 3's other word for it
    **dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved", "is_encoder_decoder"), (False, None)),
    **dict.fromkeys(("add_cross_attention", "tie_encoder_decoder", "use_mrope", "bias"), (False, None)),
    **dict.fromkeys(("quantization_config", "compression_config", "quantization"), (None,)),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1.0, None),
}
