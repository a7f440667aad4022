"""Rows of Parquet files and of data sets on the hub. Both have typed columns and are read by the `datasets` library,
which is imported only here; nothing that a data set brings is executed."""

import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ptst.data.files import Row
from ptst.errors import UserError


class HubDataset(NamedTuple):
    """A data set on the hub. `config` None: its only configuration. `revision` None: the newest."""

    repository: str
    config: str | None
    split: str
    revision: str | None = None


class HubRows(NamedTuple):
    """Rows of the hub. `revision`: the commit that they are from, where the library knows it."""

    rows: list[Row]
    revision: str = ""


def read_hub(name: str, dataset: HubDataset, remedy: str, limit: int | None = None, shuffle: bool = False) -> HubRows:
    """The first `limit` rows of a data set on the hub (None: all); with `shuffle`, random ones, the same every time.
    Raises UserError with `remedy` if the hub cannot be reached or has no rows."""
    import datasets

    # The library retries five times with a warning each; the error below says the same once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    pinned = {"revision": dataset.revision} if dataset.revision else {}
    try:
        rows = datasets.load_dataset(dataset.repository, dataset.config, split=dataset.split, **pinned)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        cause = f"{name} could not be fetched from the hub as {dataset.repository} ({reason.rstrip('.')})"
        raise UserError(cause, remedy) from None
    if shuffle:
        rows = rows.shuffle(seed=0)
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(rows.info.download_checksums or ()))
    rows = rows.select(range(min(limit, len(rows)))) if limit else rows
    if not len(rows):
        raise UserError(f"{name} on the hub ({dataset.repository}, {dataset.split}) has no rows", remedy)
    found = [(f"{name}/{dataset.split}:{i}", row) for i, row in enumerate(rows, 1)]
    return HubRows(found, commit[1] if commit else dataset.revision or "")


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, which has no lines: rows are counted. Raises UserError for one that is damaged."""
    import datasets
    from pyarrow.parquet import ParquetFile

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # the error below says the same, once
    # The library writes an Arrow copy; in a temporary folder it leaves nothing behind and is never stale. It takes the
    # path for a pattern ([1], ?, ::), so it gets one without signs, which leads to the file.
    with tempfile.TemporaryDirectory() as cache:
        plain = Path(cache) / "rows.parquet"
        plain.symlink_to(path.absolute())
        try:
            if not ParquetFile(plain).metadata.num_rows:  # which the library cannot read
                return
            rows = datasets.Dataset.from_parquet(str(plain), cache_dir=cache, keep_in_memory=True).to_list()
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            lines = str(error.__cause__ or error).splitlines()
            reason = lines[0] if lines else type(error.__cause__ or error).__name__
            raise UserError(f"the file cannot be read as parquet: {reason}", where=path) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row
