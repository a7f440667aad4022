"""Large data: rows on disk and examples in mapped files are what they are in memory; the cache is never stale, damaged
or half-written."""

from __future__ import annotations

import errno
import gc
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ptst import array_folder, forked
from ptst.array_folder import find_or_make
from ptst.audit.account import chunks
from ptst.audit.account.document_check import document_hash, example_hashes
from ptst.audit.account.gate import Prepared, check_start
from ptst.audit.setup import Setup
from ptst.data import encode_rows, kept_rows, order, sources
from ptst.data.columns import ColumnRules
from ptst.data.example_arrays import Columns, ExampleArrays, lengths_of, rows_of, trained_of
from ptst.data.examples import TrainingSource, fingerprint, mix
from ptst.data.kept_rows import KeptRows, place_of
from ptst.data.order import SourcePlan, plan
from ptst.data.selection import select
from ptst.data.sources import load
from ptst.data.steps import Steps
from ptst.errors import UserError
from ptst.text.encode import Example, Lossy
from ptst.text.prompt_format import open_prompt_format
from ptst.text.templates import find_template

ROWS = 23


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache; parts of four rows, and two processes."""
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(encode_rows, "AT_ONCE", 4)
    monkeypatch.setattr(forked, "num_processes", lambda: 2)
    return tmp_path / "home"


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(kept_rows, "LARGE", 0)


@pytest.fixture(scope="module")
def prompt_format(tiny_folder):
    return open_prompt_format(tiny_folder, find_template("vanilla"), "gsm8k")


def write(folder, name: str = "rows.jsonl", rows: int = ROWS):
    folder.mkdir(exist_ok=True)
    found = [{"question": f"What is {i} + é?", "answer": f"It\n is {i}.\n#### {i}" * (i % 5 + 1)} for i in range(rows)]
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(found, indent=1))
    elif name.endswith(".csv"):
        lines = ["question,answer", *(f'{r["question"]},"{r["answer"]}"' for r in found)]
        path.write_text("\n".join(lines))
    else:
        text = "".join(json.dumps(row) + "\n" for row in found)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_rows_on_disk_are_those_in_memory(tmp_path, name, monkeypatch):
    path = str(write(tmp_path, name))
    for given in ({}, {"limit": 7}, {"holdout": 0.6}, {"holdout": 0.6, "limit": 2, "split": "validation"}):
        plain = load(path, **given)
        with monkeypatch.context() as patch:
            patch.setattr(kept_rows, "LARGE", 0)
            for _ in range(2):  # the second time they are in the cache
                kept = load(path, **given)
                assert isinstance(kept.conversations, KeptRows)
                assert tuple(kept.conversations) == plain.conversations and kept.fingerprint == plain.fingerprint
                assert (kept.family, kept.unused) == (plain.family, plain.unused) and kept.family == "gsm8k"
    rows = kept.conversations
    assert [rows[-1], *rows[:1]] == [plain.conversations[-1], plain.conversations[0]]
    assert place_of(rows, 1) == rows[1].source
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_memory_does_not_grow_with_rows_that_are_read(tmp_path, large, monkeypatch):
    monkeypatch.setattr(array_folder, "_PIECE", 4096)  # of files that are hashed

    def peak(rows: int) -> int:
        path = write(tmp_path, f"{rows}.jsonl", rows)
        gc.collect()
        tracemalloc.start()
        try:
            load(str(path))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(500)  # what is imported or compiled once
    assert abs(peak(6000) - peak(2000)) < 4000 * 10  # a place alone takes 20 bytes


def test_rows_that_cannot_be_read_are_told_each_time(tmp_path, large):
    path = write(tmp_path)
    with path.open("a") as file:
        file.write('{"question": 3}\n')
    for _ in range(2):
        errors: list[UserError] = []
        kept = load(str(path), errors=errors)
        assert isinstance(kept.conversations, KeptRows) and len(kept.conversations) == ROWS
        assert [error.where for error in errors] == [f"{path}:{ROWS + 1}"]


def test_several_files_are_one_source_on_disk(tmp_path, large):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "rows", name, 3)
    kept = load(str(tmp_path / "rows"))
    assert [c.source.rpartition("/")[2] for c in kept.conversations] == [
        f"{n}.jsonl:{i}" for n in "ab" for i in (1, 2, 3)
    ]
    chosen = select([TrainingSource(kept)], 4, seed=1)[0]
    assert len(chosen.source.conversations) == 4 and len(chosen.left_out) == 2
    assert {c.source for c in chosen.source.conversations}.isdisjoint(chosen.left_out)


def test_another_file_of_the_same_name_size_and_time_is_read_anew(tmp_path, large):
    path = write(tmp_path)
    first, times = load(str(path)), path.stat()
    path.write_text(path.read_text().replace("What is", "What 1s"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert load(str(path)).fingerprint != first.fingerprint
    assert load(str(path), rules=ColumnRules(ignored=frozenset({"x"}))).fingerprint != first.fingerprint


@pytest.mark.parametrize("size", [0, 1 << 40])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, size, home):
    path, real = write(tmp_path), sources.read_rows
    monkeypatch.setattr(kept_rows, "LARGE", size)

    def rows(path):
        for place, row in real(path):
            if place.endswith(":9"):
                with open(path, "a") as file:
                    file.write('{"question": ')
            yield place, row

    monkeypatch.setattr(sources, "read_rows", rows)
    with pytest.raises(UserError, match=r"rows\.jsonl: the file changed while it was read; run this again when"):
        load(str(path))
    assert not home.exists() or [p.name for p in (home / "rows").iterdir()] == ["locks"]


def encode(path, prompt_format, **changes):
    how = {"max_length": 90, "too_long": "drop", "train_on": "all"} | changes
    return mix([TrainingSource(load(str(path)))], prompt_format, *how.values())


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_mapped_examples_are_those_in_memory(tmp_path, prompt_format, monkeypatch, too_long, capsys):
    path = write(tmp_path)
    plain = encode(path, prompt_format, too_long=too_long)
    assert 0 < plain.records[0].dropped + plain.records[0].cut < ROWS
    monkeypatch.setattr(kept_rows, "LARGE", 0)
    for _ in range(2):
        mapped = encode(path, prompt_format, too_long=too_long)
        assert mapped.records == plain.records and mapped.examples == plain.examples
        assert isinstance(mapped.examples.parts[0][0].ids.base, np.memmap)
        assert mapped.examples.parts[0][0].ids.dtype == np.uint16
        assert plain.records[0].encoding == fingerprint(list(mapped.examples))
        monkeypatch.setattr(encode_rows, "_parts", None)  # what was encoded once is not encoded again
    with pytest.raises(TypeError):  # of other settings it is
        encode(path, prompt_format, max_length=89)
    with pytest.raises(TypeError):
        encode(path, prompt_format.with_template(find_template("alpaca")))


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "about"])
def test_damaged_arrays_are_told_and_made_again(tmp_path, prompt_format, large, damage, home, capsys):
    path = write(tmp_path)
    plain = [*encode(path, prompt_format).examples]
    (folder,) = (p for p in (home / "examples").iterdir() if p.name != "locks")
    ids = folder / ("about.json" if damage == "about" else "ids")
    data = bytearray(ids.read_bytes())
    if damage == "lose":
        ids.unlink()
    else:
        data[5] ^= 1
        ids.write_bytes(data[:-2] if damage == "cut" else data)
    capsys.readouterr()
    assert encode(path, prompt_format).examples == plain
    assert f"{folder} is damaged (" in capsys.readouterr().err
    assert encode(path, prompt_format).examples == plain and "is damaged (" not in capsys.readouterr().err


def test_arrays_of_other_data_are_told_and_made_again(tmp_path, prompt_format, large, home, capsys):
    path, other = write(tmp_path), tmp_path / "other.jsonl"
    plain = [*encode(path, prompt_format).examples]
    (folder,) = (p for p in (home / "examples").iterdir() if p.name != "locks")
    other.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert [*encode(other, prompt_format).examples] != plain
    (of_other,) = (p for p in (home / "examples").iterdir() if p.name not in ("locks", folder.name))
    shutil.rmtree(folder)
    shutil.copytree(of_other, folder)
    capsys.readouterr()
    assert [*encode(path, prompt_format).examples] == plain
    assert f"{folder} is damaged (it holds what belongs to {of_other.name})" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, prompt_format, large, monkeypatch, home):
    path, real = write(tmp_path), array_folder.ArrayWriter.add
    load(str(path))

    def add(self, name, data):
        if name == "rows":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, data)

    monkeypatch.setattr(array_folder.ArrayWriter, "add", add)
    with pytest.raises(UserError, match="the disk is full: the encoded rows of large data cannot be written; free"):
        encode(path, prompt_format)
    assert [p.name for p in (home / "examples").iterdir()] == ["locks"]


def test_a_home_that_is_no_folder_is_one_sentence(tmp_path, prompt_format, large, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "file"))
    for key in ("a-key", None):
        with pytest.raises(UserError, match=r"rows cannot be written .*set PTST_HOME to a folder on another disk"):
            find_or_make("rows", key, lambda writer: None, "rows")
    assert "damaged" not in capsys.readouterr().err


def test_what_a_kill_left_is_removed(tmp_path, prompt_format, large, home):
    path = write(tmp_path)
    encode(path, prompt_format)
    (folder,) = (p for p in (home / "examples").iterdir() if p.name != "locks")
    left = folder.with_name(f".{folder.name}.host.1.00000000.partial")
    folder.rename(left)
    encode(path, prompt_format)
    assert not left.exists() and folder.exists()


def test_a_bad_row_is_told_by_another_process_as_by_this_one(tmp_path, prompt_format, monkeypatch):
    path = write(tmp_path)
    with open(path, "a") as file:
        file.write(json.dumps({"question": "a <|im_end|> \ud800", "answer": "b"}) + "\n")
    for size in (1 << 40, 0):
        monkeypatch.setattr(kept_rows, "LARGE", size)
        with pytest.raises(UserError, match=rf"{path}:{ROWS + 1}: the text holds a lone surrogate, U\+D800"):
            encode(path, prompt_format)
        with pytest.raises(UserError, match=r"^.*:20: \d+ tokens exceed the limit of 90 .* as do \d+ other examples"):
            mix([TrainingSource(load(str(path), limit=ROWS))], prompt_format, 90, "stop", "all")
        bad: dict[int, UserError] = {}
        found = mix([TrainingSource(load(str(path)))], prompt_format, 1000, "stop", "all", bad)
        assert [*bad] == [ROWS] and len(found.examples) == ROWS


def test_processes_that_fail_or_are_killed():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(forked.forked_map(lambda i: bytes(1 // (3 - i)), 8, 2))
    for kind, error, told in (
        (signal.SIGKILL, UserError, "one of the processes that encode or check rows was killed; see whether memory"),
        (signal.SIGUSR1, RuntimeError, "ended early, with exit code -10"),
    ):
        with pytest.raises(error, match=told):
            list(forked.forked_map(lambda i, kind=kind: os.kill(os.getpid(), kind) or b"", 8, 2))
    assert [*forked.forked_map(lambda i: b"%d" % i, 7, 3)] == [b"%d" % i for i in range(7)]


def test_columns_are_examples():
    made = [
        Example([7, 300, 5], [False, True, True], row=2),
        Example([9], [True], (1,), (Lossy("user", 3, "\u2581"),), row=5),
    ]
    arrays = ExampleArrays((Columns.of(made), 0), (Columns.joined([Columns.of(made), Columns.of(made[1:])]), 10))
    every = [*made, *(replace(e, row=e.row + 10) for e in (*made, made[1]))]
    assert arrays == every and [*arrays] == every and arrays[1:4] == every[1:4] and arrays[-1] == every[-1]
    assert [*lengths_of(arrays)] == lengths_of(every) and [*rows_of(arrays)] == rows_of(every)
    assert [*trained_of(arrays)] == trained_of(every) == [2, 0, 2, 0, 0]
    assert arrays.between(3, 13) == every[1:3]
    hashes = example_hashes(arrays)
    assert hashes == {e.row: document_hash(e.ids, e.loss_mask) for e in every} == example_hashes(every)
    assert arrays != every[:-1] and 3 not in hashes


@pytest.mark.parametrize("mixed", [[], [SourcePlan(5, 2.5)]])
def test_an_epoch_has_the_order_of_a_shuffled_list(mixed):
    """Every earlier version shuffled lists; a seed must give the same order for ever."""
    first, *_ = order.epochs([SourcePlan(1000, 1.0), *mixed], 7)
    rng, expected = random.Random(7), list(range(1000))
    rng.shuffle(expected)
    if mixed:
        other = []
        again = random.Random("7:1")
        while len(other) < 13:
            part = list(range(1000, 1005))
            again.shuffle(part)
            other += part
        expected += other[:13]
        rng.shuffle(expected)
    assert [*first] == expected
    digest = hashlib.sha256(repr([*order.epochs([SourcePlan(100, 2.0)], 3)][1].tolist()).encode()).hexdigest()
    assert digest.startswith("a8fde45e8c365f08")


def test_steps_are_kept_in_arrays():
    steps = list(plan([3] * 40, [SourcePlan(40, 1.5)], 1, examples_per_step=7))
    kept = Steps(steps)
    assert kept == steps and [*kept] == steps and kept[-1] == steps[-1] and kept[2:5] == steps[2:5]
    assert kept[::2] == steps[::2] and kept[:0] == [] and kept[5:2] == [] and len(kept[3:].taken) == 60 - 21
    with pytest.raises(IndexError):
        kept[len(steps)]


def test_the_audit_of_many_rows_is_that_of_few(tmp_path, prompt_format, large, monkeypatch):
    mixture = encode(write(tmp_path), prompt_format, max_length=1000)
    setup = Setup(prompt_format, "all", 1000, "drop")

    def check(examples, records=mixture.records) -> str:
        try:
            return str(check_start([Prepared(mixture.source, examples, records)], setup, 512, ()))
        except UserError as error:
            return str(error)

    whole = list(mixture.examples)
    spoiled = [
        mixture.examples,
        [*whole[:9], *whole[10:]],
        [*whole[:9], replace(whole[9], ids=[*whole[9].ids[:-2], 3, 4]), *whole[10:]],
        [replace(whole[3], row=4), replace(whole[4], row=3)],
    ]
    arrays = [ExampleArrays((Columns.of([*examples]), 0)) for examples in spoiled]
    told = [check(examples) for examples in spoiled]
    assert told[0] == "[]" and "left-out" in told[1] and ":10" in told[2] and len(set(told)) == 4
    miscounted = check(whole, [replace(mixture.records[0], lossy=1)])
    assert "miscounted: lossy is 1" in miscounted
    monkeypatch.setattr(chunks, "CHUNK", 3)
    monkeypatch.setattr(chunks, "MANY", 2)
    assert [check(examples) for examples in spoiled] == told == [check(examples) for examples in arrays]
    assert check(whole, [replace(mixture.records[0], lossy=1)]) == miscounted


@pytest.mark.parametrize("order", ["random", "file"])
def test_a_run_on_mapped_examples_is_that_in_memory(tmp_path, tiny_folder, monkeypatch, order):
    from ptst.train import run_training
    from ptst.training.config import TrainConfig

    write(tmp_path)
    found = []
    for name, size in (("memory", 1 << 40), ("disk", 0), ("cache", 0)):
        monkeypatch.setattr(kept_rows, "LARGE", size)
        out = tmp_path / name
        data = str(tmp_path / "rows.jsonl")
        how = TrainConfig(model=str(tiny_folder), data=data, holdout=0.5, max_steps=2, eval_every=1, order=order)
        run_training(replace(how, out=out))
        record = json.loads((out / "run.json").read_text())
        names = ("data", "validation", "account", "trained", "validation_loss", "result")
        found.append([(out / "adapter_model.safetensors").read_bytes(), *(record.get(n) for n in names)])
        found[-1][-1] = None
    assert found[0] == found[1] == found[2] and found[0][1]["rows"] > 0
