"""Fingerprints of model files: every byte counts, and large files are read once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ptst import fingerprints, runs
from ptst.errors import UserError
from ptst.fingerprints import sampled_fingerprint, tokenizer_fingerprint, weights_fingerprint
from ptst.open import check_base
from tests.test_runs import a_record

MIB = 2**20
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in ((A, os.urandom(3 * MIB)), (B, b"x"), ("config.json", b"{}")):
        (folder / name).write_bytes(content)
        settle(folder / name)
    return folder


def settle(path: Path) -> None:
    os.utime(path, ns=(10**18, path.stat().st_mtime_ns - 10**11))


def change(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))


@pytest.mark.parametrize("at", [0, 5000, MIB - 1, MIB + 4096, 3 * MIB - 1])
@pytest.mark.parametrize("segment", [2**28, MIB // 2])
def test_every_byte_counts(folder, monkeypatch, at, segment):
    monkeypatch.setattr(fingerprints, "_SEGMENT", segment)
    before = weights_fingerprint(folder)
    assert before == weights_fingerprint(folder) and before.startswith("xxh3:")
    change(folder / A, at)
    assert weights_fingerprint(folder) != before
    change(folder / A, at)
    assert weights_fingerprint(folder) == before


def test_names_shape_and_adapter_count(folder):
    found = {weights_fingerprint(folder)}
    (folder / "config.json").write_text('{"rope_theta": 1}')
    found.add(weights_fingerprint(folder))
    (folder / "adapter_config.json").write_text('{"lora_alpha": 1}')
    found.add(weights_fingerprint(folder))
    for name in (A, B):
        (folder / name).rename(folder / name.replace("model-", "part-"))
    index = {"weight_map": {"a": A.replace("model-", "part-"), "b": B.replace("model-", "part-")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found.add(weights_fingerprint(folder))
    (folder / "README.md").write_text("no weights")
    found.add(weights_fingerprint(folder))
    assert len(found) == 4


@pytest.mark.parametrize("name", fingerprints.TOKENIZER)
def test_all_files_that_make_prompts_and_end_answers_count(folder, name):
    before = tokenizer_fingerprint(folder)
    path = folder / name.replace("*", "tool_use")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    assert tokenizer_fingerprint(folder) != before


def test_the_files_that_are_read_count_and_no_others(folder):
    before = weights_fingerprint(folder)
    for name in ("consolidated.safetensors", "optimizer.safetensors", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"other")
    assert weights_fingerprint(folder) == before
    (folder / "adapter_model.safetensors").write_bytes(b"an adapter")
    assert weights_fingerprint(folder) != before
    (folder / "model.safetensors").write_bytes(b"all")
    (folder / "adapter_model.safetensors").unlink()
    one = weights_fingerprint(folder)
    (folder / A).unlink()
    assert weights_fingerprint(folder) == one != before


def test_a_large_file_is_read_once_until_it_changes(folder, monkeypatch):
    read, real = [], fingerprints._read_segment
    monkeypatch.setattr(fingerprints, "_SETTLED", -1.0)
    monkeypatch.setattr(fingerprints, "_read_segment", lambda path, at: read.append(path.name) or real(path, at))
    before = weights_fingerprint(folder)
    read.clear()
    assert weights_fingerprint(folder) == before and A not in read
    stat = (folder / A).stat()
    change(folder / A, 7)
    os.utime(folder / A, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as it was, and so is the size
    assert weights_fingerprint(folder) != before


def test_a_file_that_changed_just_now_is_read_again(folder):
    weights_fingerprint(folder)
    assert not (folder.parent / "home").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "null", '{"a": [1, 2, 3, 4, 5]}', "\x00"])
def test_a_damaged_cache_does_no_harm(folder, monkeypatch, content):
    monkeypatch.setattr(fingerprints, "_SETTLED", -1.0)
    before = weights_fingerprint(folder)
    cache = folder.parent / "home" / fingerprints.CACHE
    assert str(folder / A) in json.loads(cache.read_text())
    cache.write_text(content)
    assert weights_fingerprint(folder) == before
    assert str(folder / A) in json.loads(cache.read_text())


def test_without_a_cache_folder_files_are_read(folder, monkeypatch):
    monkeypatch.setattr(fingerprints, "_SETTLED", -1.0)
    (folder.parent / "home").write_text("a file")
    assert weights_fingerprint(folder) == weights_fingerprint(folder)


def test_records_of_earlier_versions_name_the_same_weights(folder, tmp_path):
    now = weights_fingerprint(folder)
    assert now.matches(sampled_fingerprint(folder)) and now.matches(str(now))
    assert not now.matches(None) and not now.matches("0" * 64) and not now.matches("xxh3:0")
    check_base(tmp_path, a_record(weights=sampled_fingerprint(folder)), folder)
    with pytest.raises(UserError, match="was trained on other weights"):
        check_base(tmp_path, a_record(weights="0" * 64), folder)
    old = a_record(weights=sampled_fingerprint(folder))
    assert not runs.differences(old, a_record(weights=now))
    change(folder / A, 0)
    with pytest.raises(
        UserError, match=r"other settings: weights was .*, now xxh3:.*; put those back, or give another"
    ):
        runs.check_same(tmp_path, old, a_record(weights=weights_fingerprint(folder)))
