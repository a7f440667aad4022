"""Fields of a request's JSON object, each read with its type and range; what has not been read is refused by name."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptst.serving.errors import ApiError


class Fields:
    """The fields of `value`, a JSON object; null counts as absent. Every method raises ApiError for a wrong value.
    `where`: the object's own name, for messages."""

    def __init__(self, value: Any, where: str = ""):
        self.where = where
        if not isinstance(value, dict):
            raise ApiError(f"{where or 'the body'} must be a JSON object, not {_kind(value)}", where or None)
        self._values: Mapping[str, Any] = value
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """A field as messages name it."""
        return f"{self.where}.{key}" if self.where else key

    def wrong(self, key: str, must: str, **options: Any) -> ApiError:
        """The error for a field that must be something else."""
        return ApiError(f"{self.name(key)} {must}", self.name(key), **options)

    def raw(self, key: str) -> Any:
        """Any value; None where it is absent."""
        self._read.add(key)
        return self._values.get(key)

    def integer(self, key: str, least: int, most: int | None = None) -> int | None:
        """A whole number in a range."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, f"must be a whole number, not {_kind(value)}", code="invalid_type")
        if value < least or (most is not None and value > most):
            upper = "" if most is None else f" and at most {most}"
            raise self.wrong(key, f"must be at least {least}{upper}", code="invalid_value")
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        """A finite number in a range."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, f"must be a number, not {_kind(value)}", code="invalid_type")
        if not least <= value <= most:
            raise self.wrong(key, f"must be at least {least:g} and at most {most:g}", code="invalid_value")
        return float(value)

    def boolean(self, key: str) -> bool | None:
        """True or false."""
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, f"must be true or false, not {_kind(value)}", code="invalid_type")
        return value

    def text(self, key: str) -> str | None:
        """A text that is Unicode."""
        value = self.raw(key)
        return None if value is None else self.as_text(key, value)

    def as_text(self, key: str, value: Any) -> str:
        """A value, of this field or a part of it, as a text."""
        if not isinstance(value, str):
            raise self.wrong(key, f"must be a text, not {_kind(value)}", code="invalid_type")
        if not is_unicode(value):
            raise self.wrong(key, "holds a lone surrogate, which is not valid Unicode", code="invalid_value")
        return value

    def neutral(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Fields that are not supported: only values that change nothing pass."""
        for key, same in values.items():
            value = self.raw(key)
            if value is not None and not any(type(value) is type(each) and value == each for each in same):
                allowed = f"; only {' or '.join(map(_spelled, same))} is" if same else ""
                raise self.wrong(key, f"is not supported here{allowed}", code="unsupported_parameter")

    def ignore(self, keys: Iterable[str]) -> None:
        """Fields that cannot change an answer."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise ApiError for what has not been read."""
        for key in self._values:
            if key not in self._read:
                named = key if is_unicode(key) and len(key) <= 100 else "a field"
                raise ApiError(
                    f"{self.name(named)} is not a field of this request",
                    self.name(named),
                    code="unknown_parameter",
                )


def is_unicode(text: str) -> bool:
    """Whether a text is without lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _spelled(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, f"{value!r}") if isinstance(value, bool) else f"{value!r}"


def _kind(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    return {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}[type(value)]
