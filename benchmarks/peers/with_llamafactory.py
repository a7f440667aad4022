"""LLaMA-Factory: its templates, its supervised and packed processors, its collator."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import types
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from run import NotMeant

logging.disable(logging.WARNING)
if find_spec("torchaudio") is None:  # imported at the top of its data layer; text never reaches it
    stand_in = types.ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stand_in

from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.data.processor import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor  # noqa: E402
from llamafactory.hparams import DataArguments  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

PACKAGES = ["llamafactory", "trl", "datasets"]
SETTINGS = {
    "default": "DataArguments(template=the one of the model's name)",
    "mask_history": "DataArguments(template=..., mask_history=True)",
    "packing": "DataArguments(template=..., packing=True)",
    "neat_packing": "DataArguments(template=..., neat_packing=True)",
}
TEMPLATES = {
    "smollm2": "smollm2",
    "qwen2.5": "qwen",
    "qwen3": "qwen3",
    "llama2": "llama2",
    "tinyllama": "zephyr",
    "mistral-v0.1": "mistral",
    "mistral-v0.3": "mistral",
    "llama3": "llama3",
    "llama3.1": "llama3",
}
PACKED = ("packing", "neat_packing")
ROWS = 4


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    arguments, tokenizer, template = _opened(setting, folder, limit)
    packed = setting in ("packing", "neat_packing")
    kind = PackedSupervisedDatasetProcessor if packed else SupervisedDatasetProcessor
    processor = kind(template=template, tokenizer=tokenizer, processor=None, data_args=arguments)
    made = processor.preprocess_dataset(_columns(rows))
    if not made.get("input_ids"):
        raise NotMeant("no example was left")
    kept = ("input_ids", "attention_mask", "labels", "position_ids")
    examples = [{k: made[k][i] for k in kept if k in made} for i in range(len(made["input_ids"]))]
    for example, params in zip(examples, made.get("packing_params", []), strict=False):
        example["packing_params"] = params
    collate = SFTDataCollatorWith4DAttentionMask(
        template=template,
        tokenizer=tokenizer,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
        block_diag_attn=arguments.neat_packing,
        attn_implementation="sdpa",
        neat_packing=arguments.neat_packing,
    )
    batches = [collate(examples[i : i + ROWS]) for i in range(0, len(examples), ROWS)]
    return [_named(batch) for batch in batches]


@cache
def _opened(setting: str, folder: Path, limit: int):
    chosen = {} if setting == "default" else {setting: True}
    arguments = DataArguments(template=TEMPLATES[folder.name], cutoff_len=limit, **chosen)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return arguments, tokenizer, get_template_and_fix_tokenizer(tokenizer, arguments)


def _named(batch: dict) -> dict:
    """The arrays without images; a mask of four dimensions as the documents that it keeps apart."""
    out = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "position_ids") if k in batch}
    mask = out.get("attention_mask")
    if mask is not None and mask.ndim == 4:
        sees_before = [[int(row[i, i - 1] == 0) if i else 0 for i in range(row.shape[-1])] for row in mask[:, 0]]
        out["attention_mask"] = [_numbered(row) for row in sees_before]
    return out


def _numbered(joined: list[int]) -> list[int]:
    number, numbers = 0, []
    for bit in joined:
        number += not bit
        numbers.append(number)
    return numbers


def _columns(rows: list) -> dict:
    """The columns that its converter makes of messages."""
    columns: dict[str, list] = {name: [] for name in ("_prompt", "_response", "_system")}
    for row in rows:
        system = row[0]["content"] if row[0]["role"] == "system" else ""
        turns = row[1:] if system else row
        columns["_prompt"].append(turns[:-1])
        columns["_response"].append(turns[-1:])
        columns["_system"].append(system)
    for name in ("_tools", "_images", "_videos", "_audios"):
        columns[name] = ["" if name == "_tools" else None] * len(rows)
    return columns
