"""Files that others made: pipes, archives, patterns, nesting and lines without end are one sentence, read by nobody."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ptst.data import files
from ptst.data.arc import load_arc
from ptst.data.prompt_files import read_prompts
from ptst.data.sources import load
from ptst.errors import UserError
from ptst.model.weights import load_decoder
from ptst.reading import check_regular, parse_json, read_json
from ptst.text.tokenizer import load_tokenizer
from tests.tiny import write_tiny_model

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]


def write(path: Path, mark: str) -> Path:
    """Three rows in the format of the name."""
    rows = [{k: mark + v for k, v in row.items()} for row in ROWS]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "jsonl"])
@pytest.mark.parametrize(
    ("name", "decoy"),
    [("data[1]", "data1"), ("q?", "qx"), ("a*", "ab"), ("zip:__b", "b"), ("exp[lr=1e-4]/a", "a"), ("{a,b}", "a")],
)
def test_a_name_is_no_pattern(tmp_path, kind, name, decoy):
    """Not even where another file fits it."""
    path = tmp_path / f"{name}.{kind}".replace("__", "::")
    path.parent.mkdir(exist_ok=True)
    write(path, "mine ")
    write(tmp_path / f"{decoy}.{kind}", "other ")
    source = load(str(path))
    assert [c.messages[0].content for c in source.conversations] == ["mine q0", "mine q1", "mine q2"]
    first = 2 if kind == "csv" else 1
    assert [c.source for c in source.conversations] == [f"{path}:{first + i}" for i in range(3)]
    assert source.fingerprint == load(str(write(tmp_path / f"ordinary.{kind}", "mine "))).fingerprint


def test_the_working_directory_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.csv"), "")
    assert len(load("a.csv").conversations) == 3


READERS = (lambda path: load(str(path)), read_prompts, lambda path: load_arc("arc-easy", str(path)))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("read", READERS[:2])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_pipes_devices_sockets_and_folders_are_no_data(tmp_path, monkeypatch, read, suffix):
    pipe, folder, link = (tmp_path / f"{name}{suffix}" for name in ("pipe", "folder", "link"))
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to("/dev/zero")
    for path, kind in ((pipe, "a pipe"), (folder, "a folder"), (link, "a device")):
        with pytest.raises(UserError, match=f"{path.name}: is {kind}, not a file"):
            read(path)
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        server.bind("s")
        with pytest.raises(UserError, match="is a socket"):
            check_regular(Path("s"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
)
def test_a_pipe_in_a_model_folder_blocks_nobody(tmp_path, name):
    write_tiny_model(tmp_path)
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()  # which would serve in its place
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a pipe, not a file"):
        (load_tokenizer if name.startswith("tokenizer") else load_decoder)(tmp_path)


def archives() -> dict[str, bytes]:
    text = b"question,answer\nq,a\n"
    packed, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a.csv", text)
    with tarfile.open(fileobj=tarred, mode="w") as file:
        member = tarfile.TarInfo("a.csv")
        member.size = len(text)
        file.addfile(member, io.BytesIO(text))
    return {
        "zip": packed.getvalue(),
        "tar": tarred.getvalue(),
        "gzip": gzip.compress(text),
        "bzip2": bz2.compress(text),
        "xz": lzma.compress(text),
    }


@pytest.mark.parametrize("kind", ["zip", "tar", "gzip", "bzip2", "xz"])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet", ".txt"])
def test_archives_are_not_unpacked(tmp_path, kind, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(archives()[kind])
    for read in READERS:
        if (suffix == ".txt") == (read is read_prompts):
            with pytest.raises(UserError, match=rf"a{suffix}: the file is an archive \({kind}\); unpack it first"):
                read(path)


@pytest.mark.parametrize("read", READERS[:2])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_nesting_without_end(tmp_path, read, suffix):
    path = tmp_path / f"deep{suffix}"
    path.write_text('[{"prompt": ' + "[" * 5000 + "]" * 5000 + "}]" if suffix == ".json" else '{"a":' * 5000)
    with pytest.raises(UserError, match=r"deep\.json.*(nested|valid JSON|cannot be read)") as caught:
        read(path)
    assert len(str(caught.value)) < 500


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    path = tmp_path / "long.jsonl"
    row = json.dumps(ROWS[0]).encode()
    path.write_bytes(row + b"\n" + row.ljust(1 << 20) + b"\n" + row)
    with pytest.raises(UserError, match=r"long\.jsonl:2: the line has more than 1 MB"):
        load(str(path))
    path.write_bytes(row.ljust((1 << 20) - 1) + b"\n" + row)
    assert len(load(str(path)).conversations) == 2


def test_json_that_python_itself_refuses():
    for text, cause in (("[" * 100_000, "nested too deeply"), ("9" * 5000, "thousands of digits")):
        with pytest.raises(ValueError, match=cause):
            parse_json(text)
    assert sys.get_int_max_str_digits() == 4300


def test_a_name_that_comes_twice_in_a_settings_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": {"hidden_size": 1, "hidden_size": 2}}')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON \('hidden_size' comes twice, with different"):
        read_json(path)
    path.write_text('{"a": 1, "b": [2], "a": 1}')
    assert read_json(path) == {"a": 1, "b": [2]}


def test_names_that_cannot_be_paths():
    for name in ("a\0b", "a\ud800"):
        with pytest.raises(UserError, match="cannot be the name of a file"):
            check_regular(Path(name))
