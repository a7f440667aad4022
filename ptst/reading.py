"""Files that others made, opened and parsed within limits; below text, data and model alike.

A FIFO blocks its reader for ever, a deeply nested value overflows the stack, and a number of a million digits takes
minutes: each is refused here, in one sentence.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ptst.errors import UserError

MAX_BYTES = 256 << 20  # of a file that is read whole: settings, records, prompts


def check_regular(path: Path) -> None:
    """Raise UserError for a FIFO, a device, a socket, a folder or what cannot be a path, and OSError for a path that
    cannot be followed."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a zero byte, a lone surrogate
        raise UserError(f"{str(path)!r} cannot be the name of a file") from None
    if not stat.S_ISREG(mode):
        kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        kind = next((name for name, test in kinds.items() if test(mode)), "a device")
        raise UserError(f"is {kind}, not a file", "give a file", path)


def open_regular(path: Path) -> BinaryIO:
    """The file, opened for bytes. Raises as `check_regular`."""
    check_regular(path)
    return open(path, "rb")


def read_text(path: Path) -> str:
    """The text of a small file. Raises UserError for one of more than 256 MB, ValueError where it is not UTF-8, and
    as `check_regular`."""
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"holds more than {MAX_BYTES >> 20} MB", "is it the right file?", path)
    refuse_pointer(data, path)
    return data.decode("utf-8")


def refuse_pointer(data: bytes, path: Path) -> None:
    """Raise UserError for what `git clone` without Git LFS leaves in the place of a large file."""
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError("is only a pointer of Git LFS to the file", "run git lfs pull in its folder", path)


class _Twice(ValueError):
    """A name that comes twice in an object, with two values."""


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, as `object_pairs_hook` of `json`. Raises ValueError where a name has two values: Python
    would take the last of them, and another reader the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise _Twice(f"{name!r} comes twice, with different values")
    return found


def parse_json(text: str, unique: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError (JSONDecodeError where there is a place) for anything else, for
    nesting beyond what Python's stack holds, for a whole number of more than 4,300 digits, and where asked for, as
    `unique_names`."""
    try:
        return json.loads(text, object_pairs_hook=unique_names if unique else None)
    except (json.JSONDecodeError, _Twice):
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("a number of thousands of digits") from None


def read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """What a safetensors file, open at its beginning, says of its tensors: by name, with `__metadata__`. Of two tensors
    of one name, the library takes the last and other readers the first: UserError. Raises ValueError or OverflowError
    for what is no header; of one that the library has opened, the length is known to be that of a header."""
    try:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique_names)
    except _Twice as error:
        raise UserError(f"two tensors of one name ({error})", "fetch the file again", path) from None


def check_header(path: Path) -> None:
    """Raise as `read_header`."""
    with open_regular(path) as file:
        read_header(file, path)


def read_json(path: Path) -> Any:
    """The value in a JSON file of a model folder. Raises UserError, with the file's name, for a broken one, and OSError
    for one that cannot be opened."""
    try:
        return parse_json(read_text(path), unique=True)
    except UserError:
        raise
    except ValueError as error:  # of JSON, or of the encoding
        raise UserError(f"not valid JSON ({error})", "fetch the file again", path) from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises as `read_json`, and UserError for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError("not a JSON object", "fetch the file again", path)
    return value
