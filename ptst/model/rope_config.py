"""The rotary embedding of a config.json: its base and how long contexts stretch it (maths in kernels/rope.py).

Read from `rope_theta` and `rope_scaling`, or from `rope_parameters` (today's format). Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ptst.errors import UserError
from ptst.model.architectures import ONLY_VALUE, Architecture
from ptst.model.config_values import shown, take, take_bool, take_float


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor` (`rope_type: linear`)."""

    kind: ClassVar = "linear"
    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the slow RoPE frequencies (`rope_type: llama3`)."""

    kind: ClassVar = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071; `rope_type: yarn`): pairs that turn `beta_fast` times within the
    original context keep their frequency, those that turn `beta_slow` times have it divided by `factor`.
    `attention_factor` multiplies queries and keys. `truncate`: the ends of that range are rounded to whole pairs."""

    kind: ClassVar = "yarn"
    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class Rope:
    """Base and scaling of a rotary embedding."""

    theta: float
    scaling: Scaling | None = None


def take_ropes(
    left: dict[str, Any], source: str, architecture: Architecture, positions: int
) -> tuple[Rope, Rope | None]:
    """The rotary embedding, and that of the layers with a sliding window where it may be another one (OLMo-3)."""
    parameters, scaling = left.pop("rope_parameters", None) or {}, left.pop("rope_scaling", None) or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise UserError("rope_scaling and rope_parameters must be objects", where=source)
    outer = {"rope_theta": left.pop("rope_theta", architecture.rope_theta)}
    original = left.pop("original_max_position_embeddings", None)  # takes precedence over the key inside
    if original is not None:
        outer["original_max_position_embeddings"] = original
    if architecture.windows != "every fourth not":
        # If both are present, transformers reads rope_scaling only.
        return _rope(dict(scaling or parameters), outer, source, positions), None
    for kind in parameters:
        if kind not in ("full_attention", "sliding_attention") or not isinstance(parameters[kind], dict | None):
            cause = f"rope_parameters has {kind!r}; an object each for full_attention and sliding_attention is needed"
            raise UserError(cause, where=source)
    full, sliding = (dict(parameters.get(k) or {}) for k in ("full_attention", "sliding_attention"))
    if outer["rope_theta"] != architecture.rope_theta and "rope_theta" not in sliding:
        # The versions of transformers do not agree on what it means for the layers with a window.
        wanted = f"only {architecture.rope_theta:g} is, outside of rope_parameters"
        raise UserError(f"rope_theta = {shown(outer['rope_theta'])} is not supported ({wanted})", where=source)
    return _rope({**full, **scaling}, outer, source, positions), _rope(sliding, outer, source, positions)


def _rope(found: dict[str, Any], outer: dict[str, Any], source: str, positions: int) -> Rope:
    """From the object `found` and the keys outside of it."""
    theta = take_float({**outer, **found}, source, "rope_theta")
    found.pop("rope_theta", None)
    if (partial := found.pop("partial_rotary_factor", None)) not in ONLY_VALUE["partial_rotary_factor"]:
        cause = f"partial_rotary_factor = {shown(partial)} is not supported (only 1.0 is)"
        raise UserError(cause, "use another model", source)
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    scaling: Scaling | None = None
    if kind == "yarn" and theta <= 1:
        raise UserError(f"rope_theta is {theta}; yarn RoPE scaling needs one above 1", where=source)
    if kind in ("llama3", "yarn"):
        inner = found.pop("original_max_position_embeddings", positions)
        found["original_max_position_embeddings"] = outer.get("original_max_position_embeddings", inner)
        scaling = (_llama3 if kind == "llama3" else _yarn)(found, source, positions)
    elif kind == "linear":
        scaling = LinearScaling(take_float(found, source, "factor"))
    elif kind != "default":
        supported = "default, linear, llama3 and yarn are"
        raise UserError(f"RoPE scaling {shown(kind)} is not supported ({supported})", "use another model", source)
    if found:
        raise UserError(f"unknown RoPE key {min(found)!r}", "remove it if it changes nothing", source)
    return Rope(theta, scaling)


def _llama3(found: dict[str, Any], source: str, _positions: int) -> Llama3Scaling:
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        if key not in found:
            raise UserError(f"llama3 RoPE scaling lacks {key!r}", where=source)
    result = Llama3Scaling(
        factor=take_float(found, source, "factor"),
        low_freq_factor=take_float(found, source, "low_freq_factor"),
        high_freq_factor=take_float(found, source, "high_freq_factor"),
        original_max_positions=take(found, source, "original_max_position_embeddings"),
    )
    if result.high_freq_factor <= result.low_freq_factor:
        raise UserError("high_freq_factor must be above low_freq_factor", where=source)
    return result


def _yarn(found: dict[str, Any], source: str, positions: int) -> YarnScaling:
    keys = ("factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "attention_factor", "truncate")
    found.pop("finetuned", None)  # that the weights were trained with the scaling
    given = {key: found.pop(key) for key in keys if key in found}
    given = {key: value for key, value in given.items() if value is not None or key == "truncate"}
    original = take(found, source, "original_max_position_embeddings")
    factor = take_float({"factor": positions / original, **given}, source, "factor")
    scales = [take_float(given, source, key) for key in ("mscale", "mscale_all_dim") if key in given]
    attention = _mscale(factor, scales[0]) / _mscale(factor, scales[1]) if len(scales) == 2 else _mscale(factor)
    given = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": attention, "truncate": True, **given}
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=take_float(given, source, "beta_fast"),
        beta_slow=take_float(given, source, "beta_slow"),
        attention_factor=take_float(given, source, "attention_factor"),
        truncate=take_bool(given, source, "truncate"),
    )


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
