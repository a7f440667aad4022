"""Files of token batches, whoever wrote them, as batches of arrays: JSONL and JSON, Parquet, npz, safetensors, and the
Arrow folders of `datasets.save_to_disk`.

A file is read a few rows at a time. Nothing in it is executed: pickled objects are refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptst.audit.batches.arrays import KEYS
from ptst.data.files import kind_of, numbered_lines
from ptst.errors import UserError
from ptst.reading import check_header, check_regular, parse_json, read_json, refuse_pointer

ROWS = 64  # that are read and judged together
MAX_BYTES = 16 << 30  # of an npz file, unpacked
_NAMES = tuple(spelling for spellings in KEYS.values() for spelling in spellings)
# A key of several batches in one file: 0.input_ids, batch_3/labels, labels.17.
_PREFIXED = re.compile(rf"(?P<batch>.+?)[./](?P<key>{'|'.join(_NAMES)})")
_NUMBERED = re.compile(rf"(?P<key>{'|'.join(_NAMES)})[._](?P<batch>\d+)")
_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class FileBatch:
    """Some rows of a file: their places (`file:row`, counted from 1) and arrays by their keys."""

    places: list[str]
    arrays: Mapping[str, Any]


def read_batches(path: Path) -> Iterator[FileBatch]:
    """The batches of a file or folder, in order. Raises UserError for one that cannot be read, is empty or holds no
    tokens."""
    if path.is_dir():
        read: Callable[[Path], Iterator[FileBatch]] | None = _folder
    else:
        if not path.exists():
            raise UserError("there is no such file", "give a file of batches, or a folder of save_to_disk", path)
        check_regular(path)
        kind = kind_of(path)
        if kind in _PICKLED:
            remedy = "save the batch with safetensors.torch.save_file, or its lists as JSONL"
            raise UserError(f"{kind} files are pickled, and loading one would run its code", remedy, path)
        read = _READERS.get(kind)
        if read is None:
            kinds = ", ".join(_READERS)
            raise UserError("unknown kind of file", f"use {kinds}, or a folder of datasets.save_to_disk", path)
        with open(path, "rb") as file:
            head = file.read(64)
        if not head:
            raise UserError("the file is empty", "it needs at least one batch", path)
        refuse_pointer(head, path)
    batch = None
    assert read is not None
    for batch in read(path):
        yield batch
    if batch is None:
        raise UserError("there are no rows", "it needs at least one batch", path)


def _grouped(rows: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[FileBatch]:
    """Rows with the same keys together, ROWS at a time; a row that is a batch of its own stays alone."""
    places: list[str] = []
    kept: list[Mapping[str, Any]] = []
    for place, row in rows:
        alone = any(_is_nested(row[key]) for key in ("input_ids", "tokens", "input") if key in row)
        if kept and (alone or len(kept) == ROWS or row.keys() != kept[0].keys()):
            yield _columns(places, kept)
            places, kept = [], []
        if alone:
            number = len(next(row[key] for key in ("input_ids", "tokens", "input") if key in row))
            yield FileBatch([f"{place}, row {i}" for i in range(number)] if number > 1 else [place], row)
        else:
            places.append(place)
            kept.append(row)
    if kept:
        yield _columns(places, kept)


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (list, tuple))


def _columns(places: list[str], rows: list[Mapping[str, Any]]) -> FileBatch:
    if len(rows) == 1:
        return FileBatch(places, rows[0])
    return FileBatch(places, {key: [row[key] for row in rows] for key in rows[0]})


def _jsonl(path: Path) -> Iterator[FileBatch]:
    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, line in numbered_lines(path):
            if line.strip():
                try:
                    value = parse_json(line)
                except ValueError as error:
                    raise UserError(
                        f"not valid JSON ({error})", "each line is one object", f"{path}:{number}"
                    ) from None
                yield f"{path.name}:{number}", _object(value, f"{path}:{number}")

    return _grouped(rows())


def _json(path: Path) -> Iterator[FileBatch]:
    value = read_json(path)
    if isinstance(value, list):
        return _grouped((f"{path.name}:{i}", _object(row, f"{path}:{i}")) for i, row in enumerate(value, 1))
    return _grouped(iter([(path.name, _object(value, str(path)))]))


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"a {type(value).__name__} is no row of tokens", "give an object with input_ids", where)
    return {key: entry for key, entry in value.items() if entry is not None}


def _parquet(path: Path) -> Iterator[FileBatch]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = _read_names(file.schema_arrow.names, path)
            done = 0
            for rows in file.iter_batches(ROWS, columns=names):
                yield _table(pyarrow.Table.from_batches([rows]), path, path.name, done)
                done += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged("Parquet", error, path) from None


def _folder(path: Path) -> Iterator[FileBatch]:
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"not a folder of datasets.save_to_disk ({reason})", "give one, or a file", path) from None
    name = path.name
    if isinstance(found, datasets.DatasetDict):
        split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
        if split is None:
            raise UserError(f"the folder has the splits {', '.join(found)}", "give the folder of one of them", path)
        found, name = found[split], f"{name}/{split}"
    names = _read_names(found.column_names, path)
    done = 0
    for rows in found.select_columns(names).with_format("arrow").iter(ROWS):
        yield _table(rows, path, name, done)
        done += len(rows)


def _read_names(names: list[str], path: Path) -> list[str]:
    """The columns that are read. Text and the like, which trainers leave in their data sets, is not."""
    found = [name for name in names if name in _NAMES]
    if not any(name in KEYS["input_ids"] for name in found):
        raise UserError("there is no column input_ids", f"it has {', '.join(names) or 'no columns'}", path)
    return found


def _table(table: Any, path: Path, name: str, done: int) -> FileBatch:
    """Rows of an Arrow table as arrays, without a Python object per token."""
    import pyarrow

    places = [f"{name}:{done + i}" for i in range(1, len(table) + 1)]
    arrays: dict[str, Any] = {}
    for key in table.column_names:
        column = table[key].combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):
            column = pyarrow.concat_arrays(column.chunks)
        if column.null_count == len(column):
            continue
        if column.null_count:
            row = next(i for i, value in enumerate(column) if not value.is_valid)
            raise UserError(f"the row has no {key}", "give every row the same columns", f"{path}:{done + row + 1}")
        kind = column.type
        if pyarrow.types.is_fixed_size_list(kind):
            column = column.cast(pyarrow.list_(kind.value_type))
        elif not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
            raise UserError(f"the column {key} has values of type {kind}", "give a list of ids in each row", path)
        if pyarrow.types.is_nested(column.type.value_type):
            arrays[key] = column.to_pylist()
            continue
        values = column.flatten().to_numpy(zero_copy_only=False)
        lengths = np.diff(np.asarray(column.offsets))
        arrays[key] = np.split(values, np.cumsum(lengths)[:-1])
    if any(_is_nested(arrays.get(key, [[0]])[0]) for key in KEYS["input_ids"]):
        raise UserError("a row holds rows of its own", "write one row of tokens per row", path)
    if len(places) == 1:
        arrays = {key: rows[0] for key, rows in arrays.items()}
    return FileBatch(places, arrays)


def _npz(path: Path) -> Iterator[FileBatch]:
    import zipfile

    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > MAX_BYTES:
            raise UserError(f"its arrays take {size >> 30} GB", "save it in parts, or as safetensors", path)
        with np.load(path, allow_pickle=False) as found:
            yield from _arrays({name: partial(found.__getitem__, name) for name in found.files}, path)
    except UserError:
        raise
    except ValueError as error:
        if "Object arrays" in str(error) or "pickle" in str(error):
            remedy = "pad the rows to one length, or save lists as JSONL"
            raise UserError("an array holds pickled objects, which are never loaded", remedy, path) from None
        raise _damaged("npz", error, path) from None
    # KeyError: a member is missing; NotImplementedError: a compression that zipfile has not; SyntaxError: in a header.
    except (OSError, EOFError, zipfile.BadZipFile, KeyError, NotImplementedError, SyntaxError) as error:
        raise _damaged("npz", error, path) from None


def _safetensors(path: Path) -> Iterator[FileBatch]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            check_header(path)
            yield from _arrays({name: partial(file.get_tensor, name) for name in file.keys()}, path)  # noqa: SIM118
    except (TypeError, AttributeError) as error:  # of a type that numpy has not
        raise UserError(f"an array is of no type of whole numbers ({error})", "save ids as int64", path) from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged("safetensors", error, path) from None


def _arrays(found: Mapping[str, Callable[[], np.ndarray]], path: Path) -> Iterator[FileBatch]:
    """Named arrays: one batch, or several whose keys have its name before or behind them."""
    batches: dict[str, dict[str, Callable[[], np.ndarray]]] = {}
    for name, get in found.items():
        match = _PREFIXED.fullmatch(name) or _NUMBERED.fullmatch(name)
        batch, key = (match["batch"], match["key"]) if match and name not in _NAMES else ("", name)
        batches.setdefault(batch, {})[key] = get
    for batch in sorted(batches, key=lambda name: [int(n) if n.isdecimal() else 0 for n in re.split(r"(\d+)", name)]):
        if not any(key in batches[batch] for key in KEYS["input_ids"]):
            if batch == "" and len(batches) > 1:
                continue  # notes beside numbered batches
            raise UserError("there is no array input_ids", f"it has {', '.join(found) or 'none'}", path)
        arrays = {key: get() for key, get in batches[batch].items()}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise UserError("an entry is no array", "save the file with numpy.savez", path)
        yield from _by_rows(arrays, f"{path.name}{f'[{batch}]' if batch else ''}")


def _by_rows(arrays: dict[str, np.ndarray], name: str) -> Iterator[FileBatch]:
    """A batch of many rows, ROWS at a time where every array has one entry per row."""
    ids = next(arrays[key] for key in KEYS["input_ids"] if key in arrays)
    number = len(ids) if ids.ndim > 1 else 1
    if not number:
        return
    places = [f"{name}:{i}" for i in range(1, number + 1)]
    whole = {key for key, array in arrays.items() if array.ndim < 2 or len(array) != number}
    if number <= ROWS or any(key in _NAMES for key in whole):
        yield FileBatch(places, arrays)
        return
    for start in range(0, number, ROWS):
        part = {key: array if key in whole else array[start : start + ROWS] for key, array in arrays.items()}
        yield FileBatch(places[start : start + ROWS], part)


def _damaged(kind: str, error: BaseException, path: Path) -> UserError:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return UserError(f"the file cannot be read as {kind} ({reason})", "is it damaged?", path)


_READERS: dict[str, Callable[[Path], Iterator[FileBatch]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".npz": _npz,
    ".safetensors": _safetensors,
}
KINDS = tuple(_READERS)
