"""Settings from a TOML file, or from the record of an earlier run, and back to TOML."""

import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ptst.errors import UserError, unknown_name
from ptst.progress import replace_unprintable
from ptst.reading import parse_json
from ptst.settings import CommandSettings

Config = TypeVar("Config")
_OLD_SWITCHES = {"tensorboard": "log"}  # settings of earlier versions, and the list that has their names now
_OWN = {f.name for f in dataclasses.fields(CommandSettings)}


def read_config(path: str | Path, default: Config, command: str) -> Config:
    """`default` with the settings of a TOML file, or of a run.json that `command` wrote.

    Raises UserError, naming file and key, for a file that cannot be read, an unknown key (with the nearest name), and a
    value of the wrong type.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", "check the path of --config", path) from None
    except (ValueError, RecursionError) as error:  # of TOML or JSON, or of the encoding
        raise UserError(f"not valid {'JSON' if path.suffix == '.json' else 'TOML'} ({error})", where=path) from None
    if path.suffix == ".json":
        values = values if isinstance(values, dict) else {}
        written = str(values.get("kind")).removeprefix("hosted-") == command  # also by a job at an endpoint
        if not written or not isinstance(values.get("settings"), dict):
            cause = f"not the record of a ptst.{command}" + " of this version" * written
            raise UserError(cause, "give the run.json of one, or a TOML file", path)
        known = {f.name for f in dataclasses.fields(default)}  # type: ignore[arg-type]
        known -= {"out", "resume"}
        values = {k: v for k, v in _renamed(values["settings"]).items() if v is not None and k in known}
    elif "recipe" in values and getattr(default, "recipe", "") is None:
        named = merge(default, {k: v for k, v in values.items() if k in ("recipe", "quick")}, str(path))
        default = type(default)(**{k: getattr(named, k) for k in ("recipe", "quick") if k in values})
    return merge(default, values, str(path))


def merge(default: Config, values: Mapping[str, Any], where: str) -> Config:
    """A configuration with other values for some of its settings. Raises UserError as `read_config`."""
    values = _renamed(values)
    kinds = get_type_hints(type(default))
    fields = {f.name for f in dataclasses.fields(default)} - (_OWN - {"json"})  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            error = unknown_name("key", key, sorted(fields))
            raise UserError(error.cause, where=where)
        now = getattr(default, name)
        if dataclasses.is_dataclass(now):
            if not isinstance(value, Mapping):
                raise UserError(f"{key} must be a table, not {type(value).__name__}", where=where)
            changes[name] = merge(now, value, f"{where}: {key}")
        else:
            changes[name] = _typed(value, kinds[name], f"{where}: {key}")
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings as this version has them: `tensorboard = true` is `log = ["tensorboard"]`."""
    found = dict(values)
    for old, new in _OLD_SWITCHES.items():
        if isinstance(was := found.get(old), bool):
            del found[old]
            if was and old not in (listed := [*found.get(new, ())]):
                found[new] = [*listed, old]
    return found


def build(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A dataclass from the values of a file; keys that it does not have are ignored. Raises UserError, naming the key,
    for one that is missing (a field with a plain default may be) or of the wrong type."""
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            given[field.name] = _typed(values[field.name], hints[field.name], f"{where}: {field.name}")
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{field.name} is missing", "the file is damaged or incomplete", where)
    return kind(**given)


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A value of TOML or JSON as its field has it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return build(kind, value, where)
    if origin is dict and isinstance(value, dict):
        return {str(k): _typed(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1 and value is not None:
            return _typed(value, options[0], where)
        for option in arguments:
            try:
                return _typed(value, option, where)
            except UserError:
                continue
    elif origin is Literal and value in arguments:
        return value
    elif origin in (tuple, list) and isinstance(value, list):
        return origin(_typed(v, arguments[0], where) for v in value)
    elif kind is type(None) and value is None:
        return None
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number of 309 digits or more
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    wanted = f"one of {', '.join(map(str, arguments))}" if origin is Literal else _name(kind)
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    raise UserError(f"{shown} is of the wrong type", f"{wanted} is needed", where)


def _name(kind: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    if get_origin(kind) in (tuple, list, dict):
        return "a table" if get_origin(kind) is dict else "a list"
    options = [k for k in get_args(kind) if k is not type(None)]
    return " or ".join(_name(k) for k in options) if options else names.get(kind, str(kind))


def to_toml(config: Any) -> str:
    """All settings as TOML that `read_config` reads back; unset ones are comments."""
    lines, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _OWN:
            continue
        if dataclasses.is_dataclass(value):
            tables.append(f"\n[{field.name}]\n{to_toml(value)}")
        else:
            lines.append(f"# {field.name} =" if value is None else f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n" + "".join(tables)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's strings and numbers are TOML's, too.
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    return replace_unprintable(text, lambda c: f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}")
