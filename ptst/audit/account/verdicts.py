"""The gate's verdicts, remembered in the user's cache: runs of a grid over the same data check them once.

A verdict is found again by a key over all that it depends on: every row and example, the prompt format with the
tokenizer's files, the settings that decide what is trained, and the code of the audit, the text layer and the data
layer. Only verdicts without an error are kept. The cache saves time alone: a damaged entry is as good as none.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from ptst.data.example_arrays import Columns, ExampleArrays
from ptst.data.kept_rows import identity_of
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.fingerprints import code_fingerprint
from ptst.storage import LOCKS, cache_home, lock, write_atomically
from ptst.text.encode import Example

FOLDER = "audit-verdicts"
VERSION = 2  # of the format
MOST = 500  # entries; the oldest are removed
_CODE = ("audit", "text", "data")


class Warning(NamedTuple):
    """The findings of one rule of warning level: their number, and the first one's row and cause."""

    rule: str
    number: int
    row: str
    cause: str


def verdict_key(data: Iterable[tuple[Source, Sequence[Example]]], *others: Any) -> str:
    """The key of data under a setup. `others`: everything else that the verdict depends on, as JSON has it."""
    digest = hashlib.sha256(
        json.dumps([VERSION, code_fingerprint(*_CODE), others], sort_keys=True, default=str).encode()
    )
    for source, examples in data:
        digest.update(json.dumps([source.name, len(source.conversations), len(examples)]).encode())
        digest.update(identity_of(source.conversations).encode())
        arrays = examples if isinstance(examples, ExampleArrays) else ExampleArrays((Columns.of(examples), 0))
        for block in arrays.blocks():
            for column in (block.rows, block.offsets, block.ids, block.trained):
                digest.update(column.tobytes())
    return digest.hexdigest()


def recall(key: str) -> list[Warning] | None:
    """The warnings of a remembered verdict; None where there is none."""
    try:
        entry = json.loads((cache_home() / FOLDER / f"{key}.json").read_text(encoding="utf-8"))
        if entry["key"] != key:
            return None
        warnings = [Warning(*warning) for warning in entry["warnings"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = (str, int, str, str)
    return warnings if all(tuple(map(type, w)) == kinds for w in warnings) else None


@contextmanager
def one_at_a_time(key: str) -> Iterator[None]:
    """Inside, this process alone works out a verdict; ranks and other runs that want the same one wait for it."""
    with ExitStack() as held:
        with suppress(OSError, UserError):  # as without a cache
            held.enter_context(lock(cache_home() / FOLDER / LOCKS, key, wait=True))
        yield


def remember(key: str, warnings: Sequence[Warning]) -> None:
    """Keep a verdict without an error."""
    folder = cache_home() / FOLDER
    with suppress(OSError, UserError):  # a cache that cannot be written saves no time, and does no harm
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{key}.json", json.dumps({"key": key, "warnings": warnings}, indent=1).encode())
        old = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-MOST]
        for path in old:
            path.unlink(missing_ok=True)
