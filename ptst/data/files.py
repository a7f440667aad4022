"""Rows of JSONL, JSON, CSV and Parquet files, each with its place, and of data sets on the hub.

Files are read by the `datasets` library, into memory; it is imported only where data are read.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ptst.errors import UserError

Row = tuple[str, dict[str, Any]]  # where it stands (file:line), its cells by name
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Hub(NamedTuple):
    """A data set on the hub: `repository`, its configuration (None: the only one) and split."""

    repository: str
    config: str | None
    split: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order. Raises UserError, with file and line, for one that is empty or cannot be read."""
    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; it needs one row per example")
    lines = _line_numbers(path) if path.suffix == ".jsonl" else None
    count = 0
    for count, row in enumerate(_rows(path, kind), 1):
        # A CSV's header is line 1; Parquet has no lines, so its rows are counted.
        yield f"{path}:{lines[count - 1] if lines else count + (kind == 'csv')}", row
    if not count:
        raise UserError(f"{path} has no rows")


def read_hub(name: str, hub: Hub, instead: str, limit: int | None = None, shuffle: bool = False) -> list[Row]:
    """The first `limit` rows of a data set on the hub (None: all), or with `shuffle` as many random ones, the same
    every time. Raises UserError, ending in the way out `instead`, when the hub does not give it."""
    import datasets

    # Five retries, each with a warning, are its way; the one sentence below says the same.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(hub.repository, hub.config, split=hub.split)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        raise UserError(
            f"{name} could not be fetched from the hub as {hub.repository} ({reason.rstrip('.')}); {instead}"
        ) from None
    if shuffle:
        rows = rows.shuffle(seed=0)
    rows = rows.select(range(min(limit, len(rows)))) if limit else rows
    if not len(rows):
        raise UserError(f"{name} on the hub ({hub.repository}, {hub.split}) has no rows; {instead}")
    return [(f"{name}/{hub.split}:{i}", row) for i, row in enumerate(rows, 1)]


def _line_numbers(path: Path) -> list[int]:
    """Line number of every row of a JSONL file (blank lines are no rows), each checked to be an object."""
    numbers = []
    with open(path, encoding="utf-8") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    if not isinstance(json.loads(line), dict):
                        raise UserError(f"{path}:{number}: the row is not an object in braces")
                    numbers.append(number)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number + 1}: not UTF-8 text") from None
    return numbers


def _rows(path: Path, kind: str) -> Iterable[dict]:
    import datasets  # slow to import, so only where a file is read

    datasets.disable_progress_bars()
    read = {"json": datasets.Dataset.from_json, "csv": datasets.Dataset.from_csv}.get(
        kind, datasets.Dataset.from_parquet
    )
    # The library writes an Arrow copy; in a folder of its own it leaves nothing behind and is never stale.
    with tempfile.TemporaryDirectory() as cache:
        try:
            return read(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"{path} cannot be read as {kind}: {reason}") from None
