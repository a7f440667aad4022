"""llama-cookbook (llama-recipes): its sample functions for dialogs, Alpaca and SAMSum, padded and packed.

The function for dialogs is in the source distribution (getting-started/finetuning/datasets/custom_dataset.py), not in
the wheel: its unpacked folder is named by `--source cookbook=FOLDER`.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from llama_cookbook.data.concatenator import ConcatDataset
from run import NotMeant
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, default_data_collator

PACKAGES = ["llama-cookbook", "llama-recipes"]
SETTINGS = {
    "dialogs_padding": "custom_dataset.py: tokenize_dialog; batching_strategy padding (DataCollatorForSeq2Seq)",
    "dialogs_packing": "custom_dataset.py: tokenize_dialog; batching_strategy packing (ConcatDataset), the default",
    "alpaca": "alpaca_dataset: InstructionDataset; batching_strategy padding",
}
SOURCE: str | None = None
PACKED = ("dialogs_packing",)
ROWS = 4


@cache
def _tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.pad_token_id:  # as its finetuning.py does
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


@cache
def _dialogs():
    if SOURCE is None:
        raise NotMeant("needs the source distribution of llama-cookbook (--source cookbook=FOLDER)")
    file = Path(SOURCE) / "getting-started" / "finetuning" / "datasets" / "custom_dataset.py"
    spec = importlib.util.spec_from_file_location("cookbook_custom_dataset", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tokenize_dialog


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    tokenizer = _tokenizer(folder)
    if setting == "alpaca":
        examples = _alpaca(rows, tokenizer)
    else:
        examples = [_dialogs()(row, tokenizer) for row in rows]
    if setting == "dialogs_packing":
        packs = ConcatDataset(examples, chunk_size=limit)
        return [dict(default_data_collator([packs[i]])) for i in range(len(packs))]
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [dict(collate(examples[i : i + ROWS])) for i in range(0, len(examples), ROWS)]


def _alpaca(rows: list, tokenizer) -> list[dict]:
    from llama_cookbook.datasets.alpaca_dataset import InstructionDataset

    if any(len(row) != 2 for row in rows):
        raise NotMeant("its Alpaca rows have one instruction and one output")
    data = [{"instruction": row[0]["content"], "output": row[1]["content"]} for row in rows]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(data, file)
        file.flush()
        # It keeps 5 % for evaluation: of fewer than 20 rows, none.
        made = InstructionDataset(SimpleNamespace(data_path=file.name), tokenizer)
        return [made[i] for i in range(len(made))]
