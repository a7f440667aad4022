"""Rows of Parquet files and of data sets on the hub. Both have typed columns and are read by libraries that are
imported only here (`pyarrow`, `datasets`); nothing that a data set brings is executed."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ptst.data.files import Row, open_data
from ptst.errors import UserError

LARGE = 20_000  # rows of the hub
_BATCH = 1024  # rows of a Parquet file that are in memory at once


class HubDataset(NamedTuple):
    """A data set on the hub. `config` None: its only configuration. `revision` None: the newest."""

    repository: str
    config: str | None
    split: str
    revision: str | None = None


class HubRows(NamedTuple):
    """Rows of the hub, `number` in all (None: not known before they are read). `revision`: the commit that they are
    from, where the library knows it."""

    rows: Iterable[Row]
    number: int | None
    revision: str = ""

    @property
    def is_large(self) -> bool:
        """Whether there are so many that they are not held in memory."""
        return self.number is None or self.number >= LARGE


def read_hub(
    name: str,
    dataset: HubDataset,
    remedy: str,
    limit: int | None = None,
    shuffle: bool = False,
    in_turn: bool = False,
) -> HubRows:
    """The first `limit` rows of a data set on the hub (None: all); with `shuffle`, random ones, the same every time;
    with `in_turn`, none is fetched before it is read. Raises UserError with `remedy` if the hub cannot be reached or
    has no rows."""
    import datasets

    # The library retries five times with a warning each; the error below says the same once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    how: dict[str, Any] = {"revision": dataset.revision} if dataset.revision else {}
    how |= {"streaming": True} if in_turn else {}

    @contextmanager
    def reached() -> Iterator[None]:
        try:
            yield
        except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            if isinstance(error, UserError):  # thrown in by who reads the rows
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
            cause = f"{name} could not be fetched from the hub as {dataset.repository} ({reason.rstrip('.')})"
            raise UserError(cause, remedy) from None

    with reached():
        rows = datasets.load_dataset(dataset.repository, dataset.config, split=dataset.split, **how)
    nothing = UserError(f"{name} on the hub ({dataset.repository}, {dataset.split}) has no rows", remedy)
    if in_turn:

        def fetched() -> Iterator[Row]:
            number = 0
            with reached():
                for number, row in enumerate(rows if limit is None else rows.take(limit), 1):
                    yield f"{name}/{dataset.split}:{number}", row
            if not number:
                raise nothing

        return HubRows(fetched(), None, dataset.revision or "")
    if shuffle:
        rows = rows.shuffle(seed=0)
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(rows.info.download_checksums or ()))
    rows = rows.select(range(min(limit, len(rows)))) if limit else rows
    if not len(rows):
        raise nothing
    found = ((f"{name}/{dataset.split}:{i}", row) for i, row in enumerate(rows, 1))
    return HubRows(found, len(rows), commit[1] if commit else dataset.revision or "")


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, which has no lines: rows are counted. Raises UserError for one that is damaged, for
    two columns of one name, and for values that Python has no type for."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    if path.suffix.lower() == ".gz":
        raise UserError("a Parquet file is compressed in itself and not read out of .gz", "unpack it first", path)
    try:
        with open_data(path) as file, ParquetFile(file) as rows:
            names = rows.schema_arrow.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise UserError(f"the column {twice[0]!r} comes twice", "rename one", path)
            for batch in rows.iter_batches(_BATCH):
                columns = [_values(*column, path) for column in zip(names, batch.columns, strict=True)]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield f"{path}:{number}", dict(zip(names, cells, strict=True))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, UserError):  # thrown in by who reads the rows
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = "fetch or write the file again, or if it is of another kind, name it so"
        raise UserError(f"the file cannot be read as Parquet ({reason})", remedy, path) from None


def _values(name: str, column: Any, path: Path) -> list[Any]:
    """A column's values. Raises UserError, with its name, where Python has no type for one."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        cause = f"the column {name!r} has text that is not UTF-8 ({error.reason})"
        raise UserError(cause, "write the file again, with its text as UTF-8", path) from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        cause = f"the column {name!r}, of type {column.type}, has a value that cannot be read ({reason})"
        raise UserError(cause, "write that column as text, or leave it out of the file", path) from None
