"""Rows of data files and of data sets on the hub, each with its place.

JSONL is read here, for training data and prompt sets alike. Other training data are read by the `datasets` library
(imported only where it is needed), which types their cells: a number in a CSV is no text, and NA is an empty cell.
"""

import logging
import tempfile
from collections.abc import Iterator
from itertools import count
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from ptst.errors import Setting, UserError
from ptst.reading import open_regular, parse_json

Row = tuple[str, dict[str, Any]]  # place ("file:line"), cells by name
KINDS = (".jsonl", ".json", ".csv", ".parquet")
MAX_LINE = 64 << 20  # bytes of a line
# How archives begin. They are not unpacked: 50 MB of one can hold 100 GB.
_ARCHIVES = {
    "gzip": b"\x1f\x8b",
    "zip": b"PK\x03\x04",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "rar": b"Rar!\x1a\x07",
}
_TAR = slice(257, 262), b"ustar"


class HubDataset(NamedTuple):
    """A data set on the hub. `config` None: its only configuration."""

    repository: str
    config: str | None
    split: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order. Raises UserError, with file and line, for one that is empty or cannot be read."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError("unknown kind of file", f"use {', '.join(KINDS)}", path)
    with open_data(path) as file:
        if not file.peek(1):
            raise UserError("the file is empty", "it needs one row per example", path)
    row = None
    for row in read_jsonl(path) if kind == ".jsonl" else _read_typed(path, kind.removeprefix(".")):
        yield row
    if row is None:
        raise UserError("the file has no rows", where=path)


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file; blank lines are skipped. Raises UserError, with file and line, for a line that is
    not an object in UTF-8, or has more than 64 MB, and for a file that cannot be opened."""
    with open_data(path) as file:
        for number in count(1):
            line, place = file.readline(MAX_LINE + 1), f"{path}:{number}"
            if not line:
                return
            if len(line) > MAX_LINE:
                raise UserError(f"the line has more than {MAX_LINE >> 20} MB", "each line holds one object", place)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = parse_json(text) if text.strip() else None
            except UnicodeDecodeError:
                raise not_utf8(place) from None
            except ValueError as error:
                cause = f"not valid JSON ({json_mistake(error)})"
                raise UserError(cause, "each line holds one object", place) from None
            if text.strip():
                yield place, check_object(row, place)


def check_limit(limit: int | None, what: str) -> None:
    """Raise UserError for a limit on rows below 1."""
    if limit is not None and limit < 1:
        remedy = (f"at least 1 {what} is needed (leave ", Setting("limit"), " out for all)")
        raise UserError(("the ", Setting("limit"), f" is {limit}"), remedy)


def json_mistake(error: ValueError) -> str:
    """What `parse_json` refused, without the line."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, JSONDecodeError) else str(error)


def open_data(path: Path) -> Any:
    """The file, opened for bytes. Raises UserError where that fails, for a pipe or device, and for an archive, whatever
    its name."""
    try:
        file: Any = open_regular(path)
        head = file.peek(512)
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", "check the path", path) from None
    kind = next((kind for kind, magic in _ARCHIVES.items() if head.startswith(magic)), None)
    if kind or head[_TAR[0]] == _TAR[1]:
        file.close()
        raise UserError(f"the file is an archive ({kind or 'tar'})", "unpack it first", path)
    return file


def not_utf8(place: str) -> UserError:
    return UserError("not UTF-8 text", "save the file as UTF-8", place)


def check_object(row: Any, place: str) -> dict[str, Any]:
    """Returns `row`. Raises UserError if it is not a JSON object."""
    if not isinstance(row, dict):
        raise UserError("the row is not an object", 'write it in braces, as in {"prompt": "..."}', place)
    return row


def read_hub(name: str, dataset: HubDataset, remedy: str, limit: int | None = None, shuffle: bool = False) -> list[Row]:
    """The first `limit` rows of a data set on the hub (None: all); with `shuffle`, random ones, the same every time.
    Raises UserError with `remedy` if the hub cannot be reached or has no rows."""
    import datasets

    # The library retries five times with a warning each; the error below says the same once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(dataset.repository, dataset.config, split=dataset.split)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        cause = f"{name} could not be fetched from the hub as {dataset.repository} ({reason.rstrip('.')})"
        raise UserError(cause, remedy) from None
    if shuffle:
        rows = rows.shuffle(seed=0)
    rows = rows.select(range(min(limit, len(rows)))) if limit else rows
    if not len(rows):
        raise UserError(f"{name} on the hub ({dataset.repository}, {dataset.split}) has no rows", remedy)
    return [(f"{name}/{dataset.split}:{i}", row) for i, row in enumerate(rows, 1)]


def _read_typed(path: Path, kind: str) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # the errors below say the same, once
    read = getattr(datasets.Dataset, f"from_{kind}")
    # The library writes an Arrow copy; in a temporary folder it leaves nothing behind and is never stale. It takes the
    # path for a pattern ([1], ?, ::), so it gets one without signs, which leads to the file.
    with tempfile.TemporaryDirectory() as cache:
        plain = Path(cache) / f"rows.{kind}"
        plain.symlink_to(path.absolute())
        try:
            rows = read(str(plain), cache_dir=cache, keep_in_memory=True).to_list()
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            lines = str(error.__cause__ or error).splitlines()
            reason = lines[0] if lines else type(error.__cause__ or error).__name__
            raise UserError(f"the file cannot be read as {kind}: {reason}", where=path) from None
    # A CSV's header is line 1; Parquet has no lines, so its rows are counted.
    for number, row in enumerate(rows, 2 if kind == "csv" else 1):
        yield f"{path}:{number}", row
