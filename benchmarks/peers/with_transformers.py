"""transformers alone: chat templates and assistant masks, with its collators."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)
from transformers.utils import logging

logging.set_verbosity_error()
PACKAGES = ["transformers"]
SETTINGS = {
    "uncut": "apply_chat_template(messages): the ids that the others are compared with",
    "language_modeling": "apply_chat_template(messages), pad_token = eos_token where there is none, "
    "DataCollatorForLanguageModeling(mlm=False)",
    "text_then_tokenizer": "apply_chat_template(messages, tokenize=False), tokenizer(text), "
    "DataCollatorForLanguageModeling(mlm=False)",
    "assistant_masks": "apply_chat_template(messages, return_assistant_tokens_mask=True), labels where the mask is 1, "
    "DataCollatorForSeq2Seq",
    "flattening": "labels from the second token on, DataCollatorWithFlattening()",
}
ROWS = 4


@cache
def _tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    tokenizer = _tokenizer(folder)
    cut = {"truncation": True, "max_length": limit} if setting != "uncut" else {}
    if setting == "text_then_tokenizer":
        texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
        examples = [{"input_ids": tokenizer(text, **cut)["input_ids"]} for text in texts]
    elif setting == "assistant_masks":
        asked = {"return_assistant_tokens_mask": True, "return_dict": True}
        made = [tokenizer.apply_chat_template(row, **asked, **cut) for row in rows]
        examples = [_masked(one["input_ids"], one["assistant_masks"]) for one in made]
    else:
        made = [tokenizer.apply_chat_template(row, return_dict=True, **cut)["input_ids"] for row in rows]
        examples = [{"input_ids": ids} for ids in made]
    collators = {
        "assistant_masks": DataCollatorForSeq2Seq(tokenizer),
        "flattening": DataCollatorWithFlattening(),
    }
    collate = collators.get(setting, DataCollatorForLanguageModeling(tokenizer, mlm=False))
    return [dict(collate(examples[i : i + ROWS])) for i in range(0, len(examples), ROWS)]


def _masked(ids: list[int], mask: list[int]) -> dict:
    labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
