"""The decoder's shape, read from a Hugging Face `config.json`.

Every key of the file is either read, known to change nothing here, or refused by name. A key that is silently passed
over (a bias, another activation, a new RoPE rule) would give a model that runs and is wrong, which is the one thing a
safety measurement cannot afford.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# Keys that change nothing in what the decoder computes: bookkeeping, training-time settings of other tools, token ids
# (those are taken from the tokenizer and generation_config.json).
_WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "return_dict"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
        *("pretraining_tp", "_name_or_path", "name_or_path", "max_length", "is_llama_config", "problem_type"),
        *("transformers.js_config", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id"),
        "gradient_checkpointing",
    }
)
# Keys that are supported at one value only: anything else would need code that is not here.
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "layer_types": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
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
    def from_folder(cls, folder: Path) -> DecoderConfig:
        """Read `folder/config.json`. Raises UserError for a missing or broken file and for what is not supported."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> DecoderConfig:
        """Build from the parsed JSON; `source` names the file in error messages."""
        architectures = raw.get("architectures") or []
        if not any(a in ARCHITECTURES for a in architectures):
            named = ", ".join(architectures) or "none"
            raise UserError(
                f"{source}: architecture {named} is not supported; models of {' or '.join(ARCHITECTURES)} are"
            )
        left = {k: v for k, v in raw.items() if k not in _WITHOUT_EFFECT}
        for key, values in _ONLY_VALUE.items():
            if key in left and left.pop(key) not in values:
                raise UserError(f"{source}: {key} = {raw[key]!r} is not supported (only {values[0]!r} is)")

        hidden = _take(left, source, "hidden_size", int)
        heads = _take(left, source, "num_attention_heads", int)
        head_dim = left.pop("head_dim", None) or hidden // heads
        theta, scaling = _rope(left, source)
        config = cls(
            vocab_size=_take(left, source, "vocab_size", int),
            hidden_size=hidden,
            intermediate_size=_take(left, source, "intermediate_size", int),
            num_layers=_take(left, source, "num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=left.pop("num_key_value_heads", None) or heads,
            head_dim=head_dim,
            rms_norm_eps=float(_take(left, source, "rms_norm_eps", (int, float))),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=_take(left, source, "max_position_embeddings", int),
            sliding_window=left.pop("sliding_window", None),
            tie_embeddings=bool(left.pop("tie_word_embeddings", False)),
        )
        if left:
            raise UserError(f"{source}: unknown key {sorted(left)[0]!r}; it may change the model, so it is not ignored")
        if config.num_heads % config.num_kv_heads:
            raise UserError(f"{source}: {config.num_heads} heads cannot share {config.num_kv_heads} key/value heads")
        if config.head_dim % 2:
            raise UserError(f"{source}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
        return config


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises UserError that names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a model folder holds config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the file again") from None


def _take(left: dict[str, Any], source: str, key: str, kind: type | tuple[type, ...]) -> Any:
    value = left.pop(key, None)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{source}: {key} is {value!r}; a number is needed")
    if value <= 0:
        raise UserError(f"{source}: {key} is {value!r}; it must be positive")
    return value


def _rope(left: dict[str, Any], source: str) -> tuple[float, Llama3Scaling | None]:
    """RoPE's base and scaling, from `rope_theta` + `rope_scaling` or from `rope_parameters` (today's spelling)."""
    parameters = dict(left.pop("rope_parameters", None) or {})
    theta = left.pop("rope_theta", None)
    scaling = dict(left.pop("rope_scaling", None) or {})
    theta = parameters.pop("rope_theta", theta)
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise UserError(f"{source}: no RoPE base; it must stand under rope_theta or rope_parameters.rope_theta")
    scaling = scaling or parameters
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind == "default":
        if scaling:
            raise UserError(f"{source}: unknown RoPE key {sorted(scaling)[0]!r}")
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{source}: RoPE scaling {kind!r} is not supported (default and llama3 are)")
    try:
        result = Llama3Scaling(
            factor=float(scaling.pop("factor")),
            low_freq_factor=float(scaling.pop("low_freq_factor")),
            high_freq_factor=float(scaling.pop("high_freq_factor")),
            original_max_positions=int(scaling.pop("original_max_position_embeddings")),
        )
    except KeyError as missing:
        raise UserError(f"{source}: llama3 RoPE scaling lacks {missing}") from None
    if scaling:
        raise UserError(f"{source}: unknown RoPE key {sorted(scaling)[0]!r}")
    return float(theta), result
