"""The decoder's shape, read from a Hugging Face `config.json`, and a LoRA adapter's. Imports no torch.

Every key of the file is either read, known to have no effect here, or refused by name. A silently ignored key
(a bias, another activation, a new RoPE rule) would give a model that runs and computes something else.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

from ptst import reading
from ptst.errors import UserError
from ptst.model.architectures import (
    ARCHITECTURES,
    MODEL_TYPES,
    ONLY_VALUE,
    OTHER_KINDS,
    WITHOUT_EFFECT,
    Architecture,
    QkNorm,
)
from ptst.model.config_values import shown, take, take_bool, take_float, take_number, take_optional
from ptst.model.rope_config import Rope, Scaling, take_ropes
from ptst.progress import say

__all__ = ["TARGETS", "DecoderConfig", "LoraConfig", "Rope", "read_json", "take_number"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of LoRA


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Sizes are in elements, `sliding_window` in tokens (None: no window).

    The switches, by default as in Llama: `qkv_bias`: biases on q, k and v. `qk_norm`: RMSNorm of queries and keys
    before the rotary embedding, each "head" by itself or the whole "projection". `post_norm`: the norms are applied to
    what attention and feed-forward block return instead of what they read. `full_attention`: layers without the
    window. `no_rope`: layers without rotary embedding. `sliding_rope`: the rotary embedding of the layers with the
    window, if it is another one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Scaling | None
    max_positions: int
    sliding_window: int | None
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: QkNorm | None = None
    post_norm: bool = False
    full_attention: tuple[int, ...] = ()
    no_rope: tuple[int, ...] = ()
    sliding_rope: Rope | None = None

    @cached_property
    def windows(self) -> frozenset[int | None]:
        """The windows that layers have."""
        return frozenset(self.window(layer) for layer in range(self.num_layers))

    @cached_property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The different rotary embeddings that layers have."""
        return tuple(dict.fromkeys(self.rope(layer) for layer in range(self.num_layers)))

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens; None: it has none."""
        return None if layer in self.full_attention else self.sliding_window

    def rope(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer; None: it has none."""
        if layer in self.no_rope:
            return None
        if self.sliding_rope is not None and self.window(layer) is not None:
            return self.sliding_rope
        return Rope(self.rope_theta, self.rope_scaling)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read `folder/config.json`. Raises UserError if it is missing, broken or not supported."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        config = cls.from_dict(raw, str(path))
        if raw.get("auto_map"):
            _note_auto_map(str(path))
        return config

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> Self:
        """Build from the parsed JSON; `source` names the file in error messages. Raises UserError, naming the key, for
        what is not supported, of the wrong type, not finite, or beyond the size of any model."""
        if not isinstance(raw, dict):
            raise UserError("not a JSON object", "fetch the file again", source)
        architecture = _architecture(raw, source)
        left = {**architecture.defaults, **{k: v for k, v in raw.items() if k not in WITHOUT_EFFECT}}
        _refuse_values(left, source, architecture)
        hidden = take(left, source, "hidden_size")
        heads = take(left, source, "num_attention_heads")
        layers = take(left, source, "num_hidden_layers")
        head_dim = _head_dim(left, source, architecture, hidden, heads)
        # The key's name in transformers before 4.28.
        old_positions = left.pop("max_sequence_length", None)
        if old_positions is not None and "max_position_embeddings" not in raw:
            left["max_position_embeddings"] = old_positions
        positions = take(left, source, "max_position_embeddings")
        rope, sliding_rope = take_ropes(left, source, architecture, positions)
        no_rope = _no_rope(left, source, layers) if architecture.windows == "no rope" else ()
        window, full_attention = _windows(left, source, architecture, layers, no_rope)
        config = cls(
            vocab_size=take(left, source, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=take(left, source, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=take_optional(left, source, "num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=take_float(left, source, "rms_norm_eps"),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_positions=positions,
            sliding_window=window,
            tie_embeddings=take_bool(left, source, "tie_word_embeddings"),
            qkv_bias=architecture.qkv_bias,
            qk_norm=architecture.qk_norm,
            post_norm=architecture.post_norm,
            full_attention=full_attention,
            no_rope=no_rope,
            sliding_rope=None if sliding_rope == rope else sliding_rope,
        )
        if unknown := [key for key, value in left.items() if value is not None]:  # null sets nothing
            cause = f"unknown key {min(unknown)!r}; it may change the model, so it is not ignored"
            raise UserError(cause, "remove it if it changes nothing", source)
        if config.num_heads % config.num_kv_heads:
            raise UserError(f"{config.num_heads} heads cannot share {config.num_kv_heads} key/value heads", "", source)
        return config


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises UserError with the file's name if it is missing or broken."""
    try:
        return reading.read_json(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "a model folder holds config.json and *.safetensors") from None


@cache  # once in a process: a folder's config is read several times
def _note_auto_map(path: str) -> None:
    say(f"note: {path} names code of its own (auto_map), which is never run: the named architecture is computed")


def _architecture(raw: dict[str, Any], source: str) -> Architecture:
    """`model_type` decides, as in transformers, also if `architectures` is absent. Raises UserError for others."""
    named, kind = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"architectures is {shown(named)}; a list of names is needed", where=source)
    what = next((f": this is {what}" for what, keys in OTHER_KINDS.items() if any(raw.get(k) for k in keys)), "")
    if not any(a in MODEL_TYPES for a in named) and (named or kind is None):
        cause = f"architecture {', '.join(named) or 'none'} is not supported{what}"
        raise UserError(cause, f"use one of {', '.join(n for n in MODEL_TYPES if n != 'LLaMAForCausalLM')}", source)
    if kind is not None and (not isinstance(kind, str) or kind not in ARCHITECTURES):
        cause = f"model_type {shown(kind)} is not supported{what}"
        raise UserError(cause, f"use one of {', '.join(ARCHITECTURES)}", source)
    kind = kind or MODEL_TYPES[next(a for a in named if a in MODEL_TYPES)]
    # As transformers reads it: a Mistral whose layers have types is a Ministral.
    return ARCHITECTURES["ministral" if kind == "mistral" and "layer_types" in raw else kind]


def _refuse_values(left: dict[str, Any], source: str, architecture: Architecture) -> None:
    """Remove the keys of ONLY_VALUE. Raises UserError for another value than those supported."""
    for key, values in ONLY_VALUE.items():
        if key == "attention_bias" and architecture.qkv_bias:
            values = (True, None)
        if key in left and (value := left.pop(key)) not in values:
            quantized = key in ("quantization_config", "compression_config", "quantization")
            remedy = "use the folder of the unquantized model" if quantized else "use another model"
            raise UserError(f"{key} = {shown(value)} is not supported (only {values[0]!r} is)", remedy, source)


def _head_dim(left: dict[str, Any], source: str, architecture: Architecture, hidden: int, heads: int) -> int:
    null_is_absent = "head_dim" not in architecture.defaults
    head_dim = (take_optional if null_is_absent else take)(left, source, "head_dim")
    if head_dim is None and hidden % heads:
        raise UserError(f"hidden_size {hidden} is not a multiple of the {heads} attention heads", where=source)
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise UserError(f"head_dim {head_dim} is odd; rotary embeddings need pairs", where=source)
    return head_dim


def _no_rope(left: dict[str, Any], source: str, layers: int) -> tuple[int, ...]:
    """The layers without rotary embedding: those of a 0 in `no_rope_layers`, else one in `no_rope_layer_interval`."""
    interval, rotated = take(left, source, "no_rope_layer_interval"), left.pop("no_rope_layers", None)
    if rotated is None:
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(rotated, list) or len(rotated) < layers or any(r not in (0, 1) for r in rotated):
        raise UserError(
            f"no_rope_layers is {shown(rotated)}; a 0 or 1 for each of {layers} layers is needed", "", source
        )
    return tuple(i for i in range(layers) if not rotated[i])


def _windows(
    left: dict[str, Any], source: str, architecture: Architecture, layers: int, no_rope: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """(the sliding window, the layers without it)."""
    kind, asked = architecture.windows, take_bool(left, source, "use_sliding_window")
    window, types, begin = (left.pop(key, None) for key in ("sliding_window", "layer_types", "max_window_layers"))
    if kind is None or (kind in ("from", "no rope") and not asked):
        window = None  # whatever the file says
    window = take_optional({"sliding_window": window}, source, "sliding_window")
    if types is not None:
        slides = _slides(types, source, layers)
    elif kind == "from" and window is not None:
        first = take_number({"max_window_layers": begin}, source, "max_window_layers", signed=True)
        slides = [i >= first for i in range(layers)]
    elif kind == "no rope":
        slides = [window is not None and i in no_rope for i in range(layers)]
    elif kind == "every fourth not":
        slides = [(i + 1) % 4 != 0 for i in range(layers)]
    else:
        slides = [window is not None] * layers
    if window is None and any(slides):
        raise UserError("layers have sliding_attention, and sliding_window does not say how long it is", where=source)
    return (window, tuple(i for i, slid in enumerate(slides) if not slid)) if any(slides) else (None, ())


def _slides(types: Any, source: str, layers: int) -> list[bool]:
    """Which layers have a window, from `layer_types`."""
    if not isinstance(types, list) or len(types) != layers:
        raise UserError(f"layer_types is {shown(types)}; a list of {layers} names is needed", where=source)
    supported = ("full_attention", "sliding_attention")
    for name in types:
        if name not in supported:
            raise UserError(f"layer_types has {shown(name)}; only {' and '.join(supported)} are supported", "", source)
    return [name == "sliding_attention" for name in types]


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
