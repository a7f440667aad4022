"""`check_batch`: right batches of any layout are clean, every planted fault is found at its row and token, what is no
batch is one sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ptst.audit import check_batch
from ptst.errors import UserError

BOS, EOS, PAD = 1, 2, 0
IDS = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "vocab_size": 100}
# (prompt, answer) of each document, without BOS and EOS.
DOCUMENTS = (([11, 12, 13], [21, 22]), ([14, 15], [23, 24, 25, 26]), ([16, 17, 18, 19], [27]))


def document(number):
    prompt, answer = DOCUMENTS[number]
    ids = [BOS, *prompt, *answer, EOS]
    return ids, [-100] * (1 + len(prompt)) + [*answer, EOS]


def padded(left=False):
    """Three rows as a collator of transformers gives them."""
    width = 10
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in map(document, range(3)):
        for key, values, fill in zip(batch, (ids, labels, [1] * len(ids)), (PAD, -100, 0), strict=True):
            rest = [fill] * (width - len(ids))
            batch[key].append([*rest, *values] if left else [*values, *rest])
    return {key: np.array(rows) for key, rows in batch.items()}


def packed():
    """One row of three documents."""
    ids, labels, positions, bounds = [], [], [], [0]
    for own, targets in map(document, range(3)):
        ids, labels, positions = ids + own, labels + targets, [*positions, *range(len(own))]
        bounds.append(len(ids))
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {key: np.array([values]) for key, values in columns.items()} | {"cu_seqlens": np.array(bounds)}


def shifted(batch):
    """The same labels shifted by one, as torchtune and NeMo give them."""
    labels = np.roll(batch["labels"], -1, axis=-1)
    labels[..., -1] = -100
    return batch | {"labels": labels}


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


def torchtune():
    batch = shifted(packed())
    lengths = np.diff(batch.pop("cu_seqlens"))
    names = {"input_ids": "tokens", "labels": "labels", "position_ids": "input_pos"}
    return {names[key]: torch.tensor(value) for key, value in batch.items()} | {"seq_lens": [lengths.tolist()]}


def inputs_and_labels_apart():
    """Inputs are all but the last token, labels all but the first: a row's last label is in no row."""
    rows = [document(n) for n in range(3)]
    return {
        "input": [ids[:-1] for ids, _ in rows],
        "labels": [labels[1:] for _, labels in rows],
    }


def nemo():
    batch = padded()
    labels = np.roll(batch["input_ids"], -1, axis=1)
    return {"tokens": batch["input_ids"], "labels": labels, "loss_mask": shifted(batch)["labels"] >= 0}


def axolotl():
    batch = packed()
    numbers = np.repeat([1, 2, 3], np.diff(batch.pop("cu_seqlens")))
    return without(batch, "position_ids") | {"attention_mask": numbers[None]}


CLEAN = {
    "padded": padded,
    "padded, lists": lambda: {key: value.tolist() for key, value in padded().items()},
    "padded, tensors": lambda: {key: torch.tensor(value) for key, value in padded().items()},
    "padded, shifted": lambda: shifted(padded()),
    "padded, no mask": lambda: without(padded(), "attention_mask"),
    "packed": packed,
    "packed, shifted": lambda: shifted(packed()),
    "packed, positions alone": lambda: without(packed(), "cu_seqlens"),
    "packed, flat": lambda: {key: value.reshape(-1) for key, value in packed().items()},
    "packed, bounds filled up": lambda: packed() | {"cu_seq_lens_q": np.array([0, 7, 14, 21, 21, 21])},
    "packed, seq_idx": lambda: without(packed(), "cu_seqlens") | {"seq_idx": [[0] * 7 + [1] * 8 + [2] * 7]},
    "rows": lambda: [dict(zip(("input_ids", "labels"), document(n), strict=True)) for n in range(3)],
    "loss mask": lambda: {
        "input_ids": [document(n)[0] for n in range(3)],
        "completion_mask": [[int(label >= 0) for label in document(n)[1]] for n in range(3)],
    },
    "torchtune": torchtune,
    "inputs and labels apart": inputs_and_labels_apart,
    "nemo": nemo,
    "axolotl": axolotl,
    "ignored with -1": lambda: padded() | {"labels": np.where(padded()["labels"] < 0, -1, padded()["labels"])},
}
CLEAN["packed, bounds filled up"] = lambda: (
    without(packed(), "cu_seqlens") | {"cu_seq_lens_q": np.append(packed()["cu_seqlens"], [22, 22, -1])}
)


@pytest.mark.parametrize("name", CLEAN)
def test_right_batches_are_clean(name):
    checked = check_batch(CLEAN[name](), **IDS)
    assert [str(f) for f in checked] == []
    assert checked.documents == 3
    assert checked.labels == ("shifted" if name in SHIFTED else "aligned")
    checked.raise_for_errors()


SHIFTED = ("padded, shifted", "packed, shifted", "torchtune", "inputs and labels apart", "nemo")


def test_left_padding_is_a_note():
    batch = padded(left=True)
    positions = np.maximum(np.cumsum(batch["attention_mask"], axis=1) - 1, 0)
    for extra in ({}, {"position_ids": positions}, {"position_ids": np.where(batch["attention_mask"], positions, 1)}):
        checked = check_batch(batch | extra, **IDS)
        assert [(f.rule, f.level) for f in checked] == [("left-padding", "info")]


def changed(batch, key, where, value):
    array = np.array(batch[key])
    array[where] = value
    return batch | {key: array}


def eos_is_padding():
    batch = padded()
    ids = np.where(batch["attention_mask"], batch["input_ids"], EOS)
    return batch | {"input_ids": ids, "labels": np.where(ids == EOS, -100, batch["labels"])}


def double_bos():
    batch = packed()
    keys = ("input_ids", "labels", "position_ids")
    new = {key: np.insert(batch[key], 7, value, axis=1) for key, value in zip(keys, (BOS, -100, 0), strict=True)}
    new["position_ids"][0, 7:16] = range(9)
    return new | {"cu_seqlens": batch["cu_seqlens"] + np.array([0, 0, 1, 1])}


ALL = padded()["attention_mask"] == 1
# name: batch, rule, row, token, and what is stated besides.
FAULTS = {
    "shifted, and shifted again": (lambda: shifted(padded()), "labels", "row 0", 3, {"shifted": False}),
    "never shifted": (padded, "labels", "row 0", 4, {"shifted": True}),
    "shifted twice": (lambda: shifted(shifted(padded())), "labels", "row 0", 2, {}),
    "shifted the wrong way": (
        lambda: padded() | {"labels": np.roll(padded()["labels"], 1, axis=1)},
        "labels",
        "row 0",
        5,
        {},
    ),
    "one row shifted": (
        lambda: changed(padded(), "labels", 1, shifted(padded())["labels"][1]),
        "labels",
        "row 1",
        2,
        {},
    ),
    "ids changed after the labels were made": (
        lambda: changed(padded(), "input_ids", (1, 4), 50),
        "labels",
        "row 1",
        4,
        {},
    ),
    "labels are the same array as ids": (
        lambda: padded() | {"input_ids": padded()["labels"]},
        "token-ids",
        "row 0",
        0,
        {},
    ),
    "padding trained": (
        lambda: padded() | {"labels": np.where(ALL, padded()["labels"], PAD)},
        "padding-trained",
        "row 0",
        7,
        {},
    ),
    "padding inside": (
        lambda: changed(padded(), "attention_mask", (1, 2), 0),
        "padding-inside",
        "row 1",
        2,
        {},
    ),
    "mask of another row": (
        lambda: changed(padded(), "attention_mask", (1, 5), 0),
        "attention-mask",
        "row 1",
        5,
        {},
    ),
    "nothing trained": (
        lambda: changed(packed(), "labels", (0, slice(7, 15)), -100),
        "nothing-trained",
        "row 0, document 1",
        0,
        {},
    ),
    "mask ignored": (
        lambda: padded() | {"labels": np.where(ALL, padded()["input_ids"], -100)},
        "all-trained",
        "row 0",
        0,
        {},
    ),
    "positions run on": (
        lambda: packed() | {"position_ids": np.arange(22)[None]},
        "position-ids",
        "row 0, document 1",
        0,
        {},
    ),
    "a position twice": (
        lambda: changed(packed(), "position_ids", (0, 9), 1),
        "position-ids",
        "row 0, document 1",
        2,
        {},
    ),
    "bounds beyond the end": (lambda: packed() | {"cu_seqlens": [0, 7, 15, 30]}, "boundaries", "row 0", 0, {}),
    "bounds before the end": (lambda: packed() | {"cu_seqlens": [0, 7, 15]}, "boundaries", "row 0", 0, {}),
    "lengths too short": (
        lambda: without(packed(), "cu_seqlens") | {"seq_lens": [7, 8, 6]},
        "boundaries",
        "row 0",
        0,
        {},
    ),
    "a label across documents": (
        lambda: changed(packed(), "labels", (0, 7), BOS),
        "crosses-documents",
        "row 0, document 1",
        0,
        {},
    ),
    "a label across documents, shifted": (
        lambda: changed(shifted(packed()), "labels", (0, 6), BOS),
        "crosses-documents",
        "row 0, document 0",
        6,
        {},
    ),
    "double BOS": (double_bos, "double-bos", "row 0, document 1", 1, {}),
    "missing BOS": (lambda: changed(padded(), "input_ids", (1, 0), 9), "missing-bos", "row 1", 0, {}),
    "EOS is padding and ignored": (eos_is_padding, "terminator-untrained", "row 0", 6, {"pad_id": EOS}),
    "EOS is padding and ignored, no mask": (
        lambda: without(eos_is_padding(), "attention_mask"),
        "terminator-untrained",
        "row 0",
        6,
        {"pad_id": EOS},
    ),
    "EOS not trained": (
        lambda: changed(packed(), "labels", (0, 14), -100),
        "terminator-untrained",
        "row 0, document 1",
        7,
        {},
    ),
    "EOS not trained, shifted": (
        lambda: changed(shifted(packed()), "labels", (0, 13), -100),
        "terminator-untrained",
        "row 0, document 1",
        7,
        {},
    ),
    "cut in an answer": (
        lambda: {key: value[:, :6] for key, value in padded().items()},
        "unfinished-answer",
        "row 0",
        5,
        {},
    ),
    "begins in an answer": (
        lambda: changed(padded(), "labels", (1, slice(0, 3)), [BOS, 14, 15]),
        "all-trained",
        "row 1",
        0,
        {},
    ),
    "an id beyond the embedding": (lambda: changed(padded(), "input_ids", (0, 9), 100), "token-ids", "row 0", 9, {}),
    "a row above the limit": (padded, "too-long", "row 1", 7, {"max_length": 7}),
    "a pack above the limit": (packed, "too-long", "row 0, document 2", 5, {"max_length": 20}),
    "floats": (lambda: padded() | {"labels": padded()["labels"].astype(float)}, "dtype", "row 0", 0, {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    batch, rule, row, token, stated = FAULTS[name]
    found = check_batch(batch(), **IDS | stated)
    assert (rule, row, token) in {(f.rule, f.row, f.token) for f in found}, [str(f) for f in found]
    others = {f.rule for f in found if f.level == "error"} - {rule}
    assert others <= {"labels", "terminator-untrained", "boundaries", "padding-trained"}, others


def test_a_document_that_begins_in_an_answer():
    batch = packed()
    part = {key: value[:, 4:] for key, value in without(batch, "cu_seqlens").items()}
    part["position_ids"] = np.concatenate((np.arange(3), batch["position_ids"][0, 7:]))[None]
    found = check_batch(part, **IDS)
    assert [(f.rule, f.row, f.token) for f in found if f.level == "warning"] == [
        ("all-trained", "row 0, document 0", 0)
    ]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (padded() | {"labels": padded()["labels"][:, :9]}, "input_ids has 10 tokens and labels 9 in row 0"),
        (padded() | {"labels": padded()["labels"][:2]}, "input_ids has 3 rows and labels 2 rows"),
        (padded() | {"attention_mask": [1] * 30}, "input_ids has 3 rows and attention_mask 1 row of 30 tokens"),
        (changed(padded(), "labels", (0, 0), -7), "labels holds -7 at index 0, which is neither an id nor the ignore"),
        (changed(padded(), "labels", (0, 0), -1), "labels holds -1 at index 0, which is neither"),
        (without(padded(), "labels"), "neither labels nor a loss mask; it has input_ids, attention_mask"),
        (without(padded(), "input_ids"), "no input_ids; it has labels, attention_mask"),
        ({"input_ids": [], "labels": []}, "the batch has no tokens"),
        ({"input_ids": [[]], "labels": [[]]}, "the batch has no tokens"),
        ({"input_ids": [1, None], "labels": [1, 2]}, "input_ids"),
        ({"input_ids": ["one"], "labels": [1]}, "input_ids holds values of type"),
        ({"input_ids": [1, 2**40], "labels": [1, 2]}, f"input_ids holds {2**40} at index 1, which is no id"),
        ({"input_ids": [1, 2**70], "labels": [1, 2]}, "input_ids"),
        ({"input_ids": [1, 2], "labels": [1, float("nan")]}, "labels holds nan at index 1"),
        ({"input_ids": [1, 2], "labels": [1, 0.5]}, "labels holds 0.5 at index 1"),
        ({"input_ids": np.zeros((1, 2, 3), int), "labels": np.zeros((1, 2, 3), int)}, "3 dimensions"),
        ({"input_ids": [[[1], [2, 3]]], "labels": [[1]]}, "rows within rows"),
        ({"input_ids": np.array([{}, {}]), "labels": [1, 2]}, "input_ids holds objects"),
        (padded() | {"labels": np.zeros((0, 10), int)}, "input_ids has 3 rows and labels 0 rows"),
        (padded() | {"cu_seqlens": np.array(30)}, "cu_seqlens has 0 dimensions"),
        (padded() | {"seq_lens": np.ones((3, 1, 1), int)}, "seq_lens has 3 dimensions"),
        (padded() | {"loss_mask": np.array(1)}, "loss mask has 0 dimensions"),
        (padded() | {"labels": torch.empty((3, 10), device="meta")}, "labels is no array of whole numbers"),
        ("text", "a str is no batch"),
        (3, "a int is no batch"),
    ],
)
def test_what_is_no_batch_is_one_sentence(batch, words):
    with pytest.raises(UserError) as error:
        check_batch(batch)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [np.int64, torch.tensor, lambda i: np.array([i]), lambda i: torch.tensor([i]), lambda i: {i}, lambda i: iter([i])],
)
def test_ids_are_numbers_of_any_library(make):
    assert [*map(str, check_batch(eos_is_padding(), **IDS | {"eos_id": make(2)}))] == [
        *map(str, check_batch(eos_is_padding(), **IDS))
    ]


@pytest.mark.parametrize("name", ["eos_id", "bos_id", "pad_id", "vocab_size", "max_length", "ignore_index"])
@pytest.mark.parametrize("value", ["</s>", 2.0, ["</s>"]], ids=repr)
def test_what_is_no_id_is_one_sentence(name, value):
    with pytest.raises(UserError, match=f"{name} is .*, not a whole number"):
        check_batch(padded(), **{name: value})


def test_what_cannot_be_judged_is_named():
    checked = check_batch(without(padded(), "attention_mask") | {"pixel_values": [1]})
    assert {*checked.not_checked} == {
        *("pixel_values", "token-ids", "padding", "double-bos", "missing-bos"),
        *("terminator-untrained", "unfinished-answer"),
    }
    assert "not checked: padding" in str(checked)
    four = padded() | {"attention_mask": np.ones((3, 1, 10, 10))}
    assert check_batch(four).not_checked["attention_mask"] == "it has 4 dimensions"


def test_errors_can_be_raised():
    checked = check_batch(eos_is_padding(), **IDS)
    with pytest.raises(UserError, match=r"row 0, token 6: terminator-untrained: .*2 more"):
        checked.raise_for_errors()


def test_the_import_is_light():
    code = "import sys; from ptst.audit import check_batch; print([m for m in sys.modules if '.' not in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = ("torch", "transformers", "datasets", "tokenizers", "sentencepiece", "pyarrow", "rich", "tyro")
    assert not [name for name in heavy if f"'{name}'" in done.stdout]
