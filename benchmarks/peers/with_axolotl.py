"""axolotl: its chat_template strategy, its treatment of long rows, its collators."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import axolotl.prompt_strategies.chat_template as chat_template
from axolotl.utils.collators.batching import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import add_position_ids
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

logging.disable(logging.WARNING)
disable_progress_bars()
PACKAGES = ["axolotl", "trl", "datasets"]
SETTINGS = {
    "default": "datasets: type chat_template (roles_to_train [assistant], train_on_eos turn)",
    "eot_named": "type chat_template, eot_tokens: the token that ends a turn in the template",
    "train_on_eos_all": "type chat_template, train_on_eos: all",
    "truncate": "type chat_template, excess_length_strategy: truncate",
    "sample_packing": "type chat_template, sample_packing: true",
}
EOT = {"llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "smollm2": "<|im_end|>", "qwen2.5": "<|im_end|>"}
PACKED = ("sample_packing",)
ROWS = 4


@cache
def _tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:  # what its loader does for Llama tokenizers without one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    tokenizer = _tokenizer(folder)
    cfg = DictDefault({"sequence_len": limit, "train_on_inputs": False, "min_sample_len": 2})
    chosen = {"type": "chat_template", "field_messages": "messages", "chat_template": "tokenizer_default"}
    if setting == "eot_named":
        cfg["eot_tokens"] = [EOT.get(folder.name, tokenizer.eos_token)]
    if setting == "train_on_eos_all":
        chosen["train_on_eos"] = "all"
    if setting == "truncate":
        cfg["excess_length_strategy"] = "truncate"
    strategy = chat_template.load(tokenizer, cfg, DictDefault(chosen))
    made = [strategy.tokenize_prompt({"messages": row}) for row in rows]
    kept = [{k: one[k] for k in ("input_ids", "labels", "attention_mask") if k in one} for one in made]
    data = handle_long_seq_in_dataset(Dataset.from_list(kept), limit, cfg)
    examples = [dict(one) for one in data if any(label != -100 for label in one["labels"])]
    if setting == "sample_packing":
        examples = [add_position_ids(example) for example in examples]
        collate = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64)
        return [dict(collate([pack])) for pack in _packs(examples, limit)]
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64)
    return [dict(collate(examples[i : i + ROWS])) for i in range(0, len(examples), ROWS)]


def _packs(examples: list[dict], limit: int) -> list[list[dict]]:
    """Packs as its batch sampler makes them."""
    import numpy as np
    from axolotl.utils.samplers.multipack import MultipackBatchSampler
    from torch.utils.data import SequentialSampler

    if not examples:
        return []
    lengths = np.array([len(example["input_ids"]) for example in examples])
    order = SequentialSampler(range(len(examples)))
    sampler = MultipackBatchSampler(
        sampler=order, batch_size=1, batch_max_len=limit, lengths=lengths, bin_size=200, num_processes=1
    )
    return [[examples[i] for i in pack] for batch in sampler for pack in batch]
