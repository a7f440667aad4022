"""Values of a config.json, each taken by its key and checked: type, sign, size. Imports no torch."""

import math
from typing import Any

from ptst.errors import UserError

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


def shown(value: object) -> str:
    """A value of the file, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def take_number(left: dict[str, Any], source: str, key: str, *, whole: bool = True, signed: bool = False) -> Any:
    """Remove and return the number at `key`, int if `whole`, else float. Raises UserError for another type, a number
    that is not finite, not positive (unless `signed`), or larger than any model's."""
    value = left.pop(key, None)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        wanted = "whole number" if whole and isinstance(value, float) else "number"
        raise UserError(f"{key} is {shown(value)}; a {wanted} is needed", where=source)
    if not whole and not (isinstance(value, int) or math.isfinite(value)):
        raise UserError(f"{key} is {value!r}; a finite number is needed", where=source)
    if value <= 0 and not signed:
        raise UserError(f"{key} is {shown(value)}; it must be positive", where=source)
    if abs(value) > (limit := _LIMITS.get(key, _LARGEST)):
        raise UserError(f"{key} is {shown(value)}; at most {limit} is supported", "is the file damaged?", source)
    return value if whole else float(value)


def take(left: dict[str, Any], source: str, key: str) -> int:
    return take_number(left, source, key)


def take_float(left: dict[str, Any], source: str, key: str) -> float:
    return take_number(left, source, key, whole=False)


def take_optional(left: dict[str, Any], source: str, key: str) -> int | None:
    """Like `take`; None if the key is absent or null."""
    return take(left, source, key) if left.get(key) is not None else left.pop(key, None)


def take_bool(left: dict[str, Any], source: str, key: str, default: bool = False) -> bool:
    """`default` if the key is absent or null."""
    value = left.pop(key, None)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key} is {shown(value)}; true or false is needed", where=source)
    return default if value is None else value
