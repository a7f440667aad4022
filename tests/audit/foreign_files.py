"""The exam's faults in files of other trainers: aligned labels, padded or packed, between rows that are right."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from ptst.data.packing import IGNORE_INDEX, Batch, to_batch
from ptst.errors import UserError
from ptst.text.encode import cut
from tests.audit.faults import Bench
from tests.tiny import CONFIG, byte_tokenizer

PAD = 0


def write_folder(folder: Path, **settings) -> Path:
    """A model folder without weights and without a chat template: what an audit of batches reads."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_messages(path: Path, bench: Bench) -> Path:
    path.write_text("".join(json.dumps({"messages": c.to_json()}) + "\n" for c in bench.rows))
    return path


def aligned(batch: Batch) -> tuple[list[int], list[int]]:
    """Ids, and labels in the place of their tokens."""
    labels = [-100 if label == IGNORE_INDEX else label for label in batch.labels]
    return batch.tokens, [-100, *labels[:-1]]


def parts(bench: Bench, batch: Batch) -> dict[int, tuple[list[int], list[int]]]:
    """(ids, labels) of every row of the bench, of those of the batch as they are there. Rows above the limit are cut as
    the bench's setup says; those that the template cannot write are left out."""
    ids, labels = aligned(batch)
    found = {}
    if len(batch.cu_seqlens) == len(batch.rows) + 1:
        spans = zip(pairwise(batch.cu_seqlens), batch.rows, strict=True)
        found = {row: (ids[a:b], [-100, *labels[a + 1 : b]]) for (a, b), row in spans}
    limit = bench.setup.max_length if bench.setup.too_long == "cut" else None
    for row in range(len(bench.rows)):
        if row not in found:
            with suppress(UserError):
                good = bench.good(row) if limit is None else cut(bench.good(row), limit)
                found[row] = aligned(to_batch([good]))
    return dict(sorted(found.items()))


def padded(documents: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """One row for each document, as a collator of transformers pads them."""
    width = max(len(ids) for ids, _ in documents)
    fill = ((PAD, 0), (-100, 1))
    ids, labels = (np.array([[*d[which], *[value] * (width - len(d[0]))] for d in documents]) for value, which in fill)
    mask = np.array([[1] * len(d[0]) + [0] * (width - len(d[0])) for d in documents])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(documents: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """One row of all documents, with their bounds and positions."""
    lengths = [len(ids) for ids, _ in documents]
    columns = {
        "input_ids": [i for ids, _ in documents for i in ids],
        "labels": [i for _, own in documents for i in own],
    }
    columns["position_ids"] = [p for length in lengths for p in range(length)]
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    return {name: np.array([values]) for name, values in columns.items()} | {"cu_seqlens": bounds}
