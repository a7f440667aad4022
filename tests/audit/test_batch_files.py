"""Files of batches: every kind gives the same batches; what cannot be read is one sentence."""

from __future__ import annotations

import json
import pickle
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from ptst.audit.batches import files as batch_files
from ptst.audit.batches.documents import ForeignFile, Known
from ptst.audit.batches.files import read_batches
from ptst.errors import UserError

ROWS = [{"input_ids": [1, 5 + i, 6, 2], "labels": [-100, -100, 6, 2]} for i in range(5)]
RAGGED = [{"input_ids": [1, *range(5, 6 + i), 2], "labels": [-100, *range(5, 6 + i), 2]} for i in range(5)]


def columns(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def jsonl(path, rows):
    path = path / "b.jsonl"
    path.write_text("".join(json.dumps(row | {"text": "kept by the trainer"}) + "\n" for row in rows))
    return path


def json_list(path, rows):
    (path / "b.json").write_text(json.dumps(rows))
    return path / "b.json"


def json_batch(path, rows):
    (path / "b.json").write_text(json.dumps(columns(rows)))
    return path / "b.json"


def parquet(path, rows):
    table = pa.table(columns(rows) | {"text": ["kept"] * len(rows)})
    pyarrow.parquet.write_table(table, path / "b.parquet", row_group_size=2)
    return path / "b.parquet"


def folder(path, rows):
    datasets.Dataset.from_dict(columns(rows) | {"text": ["kept"] * len(rows)}).save_to_disk(path / "b")
    return path / "b"


def splits(path, rows):
    data = datasets.Dataset.from_dict(columns(rows))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path / "b")
    return path / "b"


def npz(path, rows):
    np.savez(path / "b.npz", **columns(rows))
    return path / "b.npz"


def numbered_npz(path, rows):
    arrays = {f"{i}.{key}": np.array(value)[None] for i, row in enumerate(rows) for key, value in row.items()}
    np.savez(path / "b.npz", **arrays)
    return path / "b.npz"


def safetensors(path, rows):
    save_file({key: np.array(value, np.int32) for key, value in columns(rows).items()}, path / "b.safetensors")
    return path / "b.safetensors"


def tensors(path, rows):
    save_tensors(
        {f"labels.{i}": torch.tensor(row["labels"]) for i, row in enumerate(rows)}
        | {f"input_ids.{i}": torch.tensor(row["input_ids"]) for i, row in enumerate(rows)},
        path / "b.safetensors",
    )
    return path / "b.safetensors"


RAGGED_KINDS = (jsonl, json_list, json_batch, parquet, folder, splits, numbered_npz, tensors)


def documents(path):
    return [(d.ids, d.trained) for d in ForeignFile(path, Known()).read()]


@pytest.mark.parametrize("rows", [1, 2, 64, 1000], ids=lambda n: f"{n} at a time")
@pytest.mark.parametrize("kind", [*RAGGED_KINDS, npz, safetensors], ids=lambda f: f.__name__)
def test_every_kind_gives_the_same_documents(tmp_path, monkeypatch, kind, rows):
    monkeypatch.setattr(batch_files, "ROWS", rows)
    wanted = [(row["input_ids"], [label >= 0 for label in row["labels"]]) for row in ROWS]
    assert documents(kind(tmp_path, ROWS)) == wanted


@pytest.mark.parametrize("kind", RAGGED_KINDS, ids=lambda f: f.__name__)
def test_rows_of_any_length(tmp_path, kind):
    wanted = [(row["input_ids"], [label >= 0 for label in row["labels"]]) for row in RAGGED]
    assert documents(kind(tmp_path, RAGGED)) == wanted


def test_places_are_rows_of_the_file(tmp_path):
    places = [place for batch in read_batches(parquet(tmp_path, ROWS)) for place in batch.places]
    assert places == [f"b.parquet:{i}" for i in range(1, 6)]
    (tmp_path / "b.jsonl").write_text(json.dumps(columns(ROWS)) + "\n\n" + json.dumps(ROWS[0]) + "\n")
    places = [place for batch in read_batches(tmp_path / "b.jsonl") for place in batch.places]
    assert places == [*(f"b.jsonl:1, row {i}" for i in range(5)), "b.jsonl:3"]


def _text(name, text):
    return lambda path: (path / name).write_text(text) and path / name


def _bytes(name, data):
    def write(path):
        (path / name).write_bytes(data)
        return path / name

    return write


def _objects(path):
    np.savez(path / "b.npz", input_ids=np.array([[1], [2, 3]], dtype=object), labels=np.array([1]))
    return path / "b.npz"


def _no_rows(path):
    np.savez(path / "b.npz", input_ids=np.zeros((0, 5), int), labels=np.zeros((0, 5), int))
    return path / "b.npz"


def _small_floats(path):
    save_tensors({"input_ids": torch.ones(1, 4).to(torch.float8_e4m3fn)}, path / "b.safetensors")
    return path / "b.safetensors"


def _cut(kind):
    def write(path):
        file = kind(path, ROWS)
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        return file

    return write


def _bad_member(path):
    with zipfile.ZipFile(path / "b.npz", "w") as file:
        file.writestr("input_ids.npy", b"no array")
    return path / "b.npz"


def _table(**cells):
    def write(path):
        pyarrow.parquet.write_table(pa.table(cells), path / "b.parquet")
        return path / "b.parquet"

    return write


def _two_splits(path):
    data = datasets.Dataset.from_dict(columns(ROWS))
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(path / "b")
    return path / "b"


def _plain_folder(path):
    (path / "b").mkdir()
    return path / "b"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path / "b.jsonl", "there is no such file"),
        (_text("b.txt", "1 2 3"), "unknown kind of file; use .jsonl, .json, .parquet, .npz, .safetensors, or a folder"),
        (_bytes("b.pt", pickle.dumps([1])), ".pt files are pickled, and loading one would run its code"),
        (_bytes("b.jsonl", b""), "the file is empty"),
        (_text("b.jsonl", "\n"), "there are no rows"),
        (_text("b.jsonl", "{"), "b.jsonl:1: not valid JSON"),
        (_text("b.jsonl", "[1, 2]\n"), "b.jsonl:1: a list is no row of tokens"),
        (_text("b.jsonl", '{"ids": [1]}'), "the batch has no input_ids; it has ids"),
        (_text("b.jsonl", '{"input_ids": [1]}'), "neither labels nor a loss mask; it has input_ids"),
        (_text("b.jsonl", '{"input_ids": [1, 2], "labels": [1]}'), "input_ids has 2 tokens and labels 1"),
        (_text("b.jsonl", '{"input_ids": [1, 2], "labels": [-5, 2]}'), "-5 at index 0, which is neither an id nor"),
        (_text("b.jsonl", '{"input_ids": [1, 2], "labels": [NaN, 2]}'), "labels holds nan at index 0"),
        (_text("b.jsonl", '{"input_ids": [1, 1e30], "labels": [1, 2]}'), "input_ids holds 1e+30 at index 1"),
        (_text("b.jsonl", '{"input_ids": [1, {}], "labels": [1, 2]}'), "input_ids"),
        (_text("b.jsonl", '{"input_ids": "1 2", "labels": [1, 2]}'), "input_ids holds values of type"),
        (_text("b.jsonl", '{"input_ids": 7, "labels": [1, 2]}'), "input_ids is no array of whole numbers"),
        (_text("b.jsonl", '{"input_ids": [], "labels": []}'), "the batch has no tokens"),
        (_text("b.json", "3"), "a int is no row of tokens"),
        (_objects, "an array holds pickled objects, which are never loaded"),
        (_no_rows, "there are no rows"),
        (_small_floats, "an array is of no type of whole numbers"),
        (_cut(npz), "the file cannot be read as npz"),
        (_bad_member, "an entry is no array"),
        (_bytes("b.npz", b"PK\x03\x04 and no more"), "the file cannot be read as npz"),
        (_cut(parquet), "the file cannot be read as Parquet"),
        (_cut(safetensors), "the file cannot be read as safetensors"),
        (_bytes("b.safetensors", b"\xff" * 40), "the file cannot be read as safetensors"),
        (_table(text=["a"]), "there is no column input_ids; it has text"),
        (_table(input_ids=[1, 2], labels=[1, 2]), "the column input_ids has values of type int64"),
        (_table(input_ids=[[1], None], labels=[[1], [2]]), "b.parquet:2: the row has no input_ids"),
        (_table(input_ids=[[1, None]], labels=[[1, 2]]), "input_ids holds nan at index 1"),
        (_table(input_ids=[[1], [1, 2]], labels=[[1], [1]]), "input_ids has 2 tokens and labels 1 in row 1"),
        (_table(input_ids=[["a"]], labels=[[1]]), "input_ids holds"),
        (_two_splits, "the folder has the splits a, b"),
        (_plain_folder, "not a folder of datasets.save_to_disk"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, write, words):
    path = write(tmp_path)
    with pytest.raises(UserError) as error:
        documents(path if not isinstance(path, int) else tmp_path)
    told = str(error.value)
    assert words in told and "\n" not in told and str(tmp_path) in told, told
