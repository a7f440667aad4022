"""The decoder's shape, read from a Hugging Face `config.json`, and a LoRA adapter's. Imports no torch.

Every key of the file is either read, known to have no effect here, or refused by name. A silently ignored key
(a bias, another activation, a new RoPE rule) would give a model that runs and computes something else.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ptst import reading
from ptst.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Defaults of absent keys, from transformers' LlamaConfig and MistralConfig. Sizes that determine the shape have no
# default: a file without them is broken.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": None},
    "MistralForCausalLM": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
_ROPE_THETA = 10000.0
# Upper limits, far above any published model: a damaged or hostile file is refused before memory is taken.
_LIMITS = {
    "num_hidden_layers": 1000,
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "head_dim": 2**14,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**13),
    "r": 2**14,  # a LoRA adapter's rank
}
_LARGEST = 2**40  # of every other number: positions, windows, the RoPE base
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of LoRA

# Keys without effect on what the decoder computes: bookkeeping, training settings of other tools, token ids (these are
# taken from the tokenizer and generation_config.json).
_WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "return_dict"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
        *("pretraining_tp", "_name_or_path", "name_or_path", "max_length", "is_llama_config", "problem_type"),
        *("transformers.js_config", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id"),
        *("gradient_checkpointing", "num_labels", "use_return_dict", "torchscript", "use_bfloat16", "_commit_hash"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_flash_attn_2_enabled"),
        *("_experts_implementation", "_experts_implementation_internal", "_output_attentions"),
        *("tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side", "prefix", "finetuning_task"),
        *("sep_token_id", "decoder_start_token_id", "task_specific_params", "tf_legacy_loss", "is_decoder"),
        # Names code that is never run here.
        "auto_map",
        # From Qwen2's configuration; unused by both architectures.
        *("use_sliding_window", "max_window_layers"),
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
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved", "is_encoder_decoder"), (False, None)),
    **dict.fromkeys(("add_cross_attention", "tie_encoder_decoder"), (False, None)),
    **dict.fromkeys(("quantization_config", "compression_config", "quantization", "layer_types"), (None,)),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1.0, None),
}


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the slow RoPE frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama/Mistral decoder. Sizes are in elements, `sliding_window` in tokens (None: no window)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    max_positions: int
    sliding_window: int | None
    tie_embeddings: bool

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read `folder/config.json`. Raises UserError if it is missing, broken or not supported."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> Self:
        """Build from the parsed JSON; `source` names the file in error messages. Raises UserError, naming the key, for
        what is not supported, of the wrong type, not finite, or beyond the size of any model."""
        if not isinstance(raw, dict):
            raise UserError("not a JSON object", "fetch the file again", source)
        architecture = _architecture(raw, source)
        left = {**_DEFAULTS[architecture], **{k: v for k, v in raw.items() if k not in _WITHOUT_EFFECT}}
        for key, values in _ONLY_VALUE.items():
            if key in left and left.pop(key) not in values:
                raise UserError(f"{key} = {_short(raw[key])} is not supported (only {values[0]!r} is)", where=source)

        hidden = _take(left, source, "hidden_size")
        heads = _take(left, source, "num_attention_heads")
        head_dim = _take_optional(left, source, "head_dim")
        if head_dim is None and hidden % heads:
            raise UserError(f"hidden_size {hidden} is not a multiple of the {heads} attention heads", where=source)
        # The key's name in transformers before 4.28.
        old_positions = left.pop("max_sequence_length", None)
        if old_positions is not None and "max_position_embeddings" not in raw:
            left["max_position_embeddings"] = old_positions
        positions = _take(left, source, "max_position_embeddings")
        theta, scaling = _rope(left, source, positions)
        if architecture == "LlamaForCausalLM":
            left.pop("sliding_window", None)  # Llama has none, whatever the file says
        config = cls(
            vocab_size=_take(left, source, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_take(left, source, "intermediate_size"),
            num_layers=_take(left, source, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_take_optional(left, source, "num_key_value_heads") or heads,
            head_dim=head_dim or hidden // heads,
            rms_norm_eps=_take_float(left, source, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=positions,
            sliding_window=_take_optional(left, source, "sliding_window"),
            tie_embeddings=_take_bool(left, source, "tie_word_embeddings"),
        )
        if left:
            raise UserError(f"unknown key {min(left)!r}; it may change the model, so it is not ignored", where=source)
        if config.num_heads % config.num_kv_heads:
            raise UserError(f"{config.num_heads} heads cannot share {config.num_kv_heads} key/value heads", "", source)
        if config.head_dim % 2:
            raise UserError(f"head_dim {config.head_dim} is odd; rotary embeddings need pairs", where=source)
        return config


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises UserError with the file's name if it is missing or broken."""
    try:
        return reading.read_json(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "a model folder holds config.json and *.safetensors") from None


def _architecture(raw: dict[str, Any], source: str) -> str:
    """One of ARCHITECTURES. `model_type` decides, as in transformers, also if `architectures` is absent."""
    named, kind = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"architectures is {_short(named)}; a list of names is needed", where=source)
    if not any(a in ARCHITECTURES for a in named) and (named or kind is None):
        supported = f"models of {' or '.join(ARCHITECTURES)} are"
        raise UserError(f"architecture {', '.join(named) or 'none'} is not supported; {supported}", where=source)
    if kind is not None and (not isinstance(kind, str) or kind not in _MODEL_TYPES):
        raise UserError(f"model_type {_short(kind)} is not supported; {' and '.join(_MODEL_TYPES)} are", where=source)
    return _MODEL_TYPES[kind] if kind is not None else next(a for a in named if a in ARCHITECTURES)


def _short(value: object) -> str:
    """A value of the file, for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def take_number(left: dict[str, Any], source: str, key: str, *, whole: bool = True, signed: bool = False) -> Any:
    """Remove and return the number at `key`, int if `whole`, else float. Raises UserError for another type, a number
    that is not finite, not positive (unless `signed`), or larger than any model's."""
    value = left.pop(key, None)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        wanted = "whole number" if whole and isinstance(value, float) else "number"
        raise UserError(f"{key} is {_short(value)}; a {wanted} is needed", where=source)
    if not whole and not (isinstance(value, int) or math.isfinite(value)):
        raise UserError(f"{key} is {value!r}; a finite number is needed", where=source)
    if value <= 0 and not signed:
        raise UserError(f"{key} is {_short(value)}; it must be positive", where=source)
    if abs(value) > (limit := _LIMITS.get(key, _LARGEST)):
        raise UserError(f"{key} is {_short(value)}; at most {limit} is supported", "is the file damaged?", source)
    return value if whole else float(value)


def _take(left: dict[str, Any], source: str, key: str) -> int:
    return take_number(left, source, key)


def _take_float(left: dict[str, Any], source: str, key: str) -> float:
    return take_number(left, source, key, whole=False)


def _take_optional(left: dict[str, Any], source: str, key: str) -> int | None:
    """Like `_take`; None if the key is absent or null."""
    return _take(left, source, key) if left.get(key) is not None else left.pop(key, None)


def _take_bool(left: dict[str, Any], source: str, key: str) -> bool:
    """false if the key is absent or null."""
    value = left.pop(key, None)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key} is {_short(value)}; true or false is needed", where=source)
    return bool(value)


def _rope(left: dict[str, Any], source: str, positions: int) -> tuple[float, Llama3Scaling | None]:
    """RoPE's base and scaling, from `rope_theta` and `rope_scaling`, or from `rope_parameters` (today's format)."""
    parameters, scaling = left.pop("rope_parameters", None) or {}, left.pop("rope_scaling", None) or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise UserError("rope_scaling and rope_parameters must be objects", where=source)
    scaling = dict(scaling or parameters)  # if both are present, transformers reads rope_scaling only
    outer = left.pop("rope_theta", _ROPE_THETA)
    theta = _take_float({"rope_theta": outer, **scaling}, source, "rope_theta")
    scaling.pop("rope_theta", None)
    original = left.pop("original_max_position_embeddings", None)  # takes precedence over the key inside
    if (partial := scaling.pop("partial_rotary_factor", None)) not in _ONLY_VALUE["partial_rotary_factor"]:
        raise UserError(f"partial_rotary_factor = {_short(partial)} is not supported (only 1.0 is)", where=source)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    result = None
    if kind == "llama3":
        inner = scaling.pop("original_max_position_embeddings", positions)
        numbers = {"original_max_position_embeddings": inner if original is None else original}
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            if key not in scaling:
                raise UserError(f"llama3 RoPE scaling lacks {key!r}", where=source)
            numbers[key] = scaling.pop(key)
        result = Llama3Scaling(
            factor=_take_float(numbers, source, "factor"),
            low_freq_factor=_take_float(numbers, source, "low_freq_factor"),
            high_freq_factor=_take_float(numbers, source, "high_freq_factor"),
            original_max_positions=_take(numbers, source, "original_max_position_embeddings"),
        )
        if result.high_freq_factor <= result.low_freq_factor:
            raise UserError("high_freq_factor must be above low_freq_factor", where=source)
    elif kind != "default":
        raise UserError(f"RoPE scaling {_short(kind)} is not supported (default and llama3 are)", where=source)
    if scaling:
        raise UserError(f"unknown RoPE key {sorted(scaling)[0]!r}", where=source)
    return theta, result


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and target projections of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685).

    `scale` = alpha / rank, or alpha / sqrt(rank) with rslora. `dropout`: probability that an input of A is zeroed in
    training (kernels/lora_layer.py). Raises UserError for a rank below 1, a dropout outside [0, 1), and unknown
    targets."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank is {self.rank}", "it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout is {self.dropout}", "it must be at least 0 and below 1")
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            what = f"LoRA target {unknown[0]!r} is unknown" if unknown else "the list of LoRA targets is empty"
            raise UserError(what, f"choose from {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
