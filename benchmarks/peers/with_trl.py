"""TRL's SFTTrainer: its data preparation and its collator, with a model of a few thousand weights that never trains."""

from __future__ import annotations

import copy
import logging
import tempfile
from functools import cache
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

logging.disable(logging.WARNING)
disable_progress_bars()
PACKAGES = ["trl", "datasets", "accelerate"]
SETTINGS = {
    "default": "SFTConfig(max_length=...), column `messages`",
    "assistant_only_loss": "SFTConfig(assistant_only_loss=True), column `messages`",
    "prompt_completion": "SFTConfig(), columns `prompt` (all but the last message) and `completion` (the last)",
    "bfd_packing": "SFTConfig(assistant_only_loss=True, packing=True)",
    "wrapped_packing": "SFTConfig(assistant_only_loss=True, packing=True, packing_strategy='wrapped')",
}
PACKED = ("bfd_packing", "wrapped_packing")
ROWS = 4  # per batch


@cache
def _tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def _model(vocab_size: int) -> LlamaForCausalLM:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape))


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    chosen = {
        "default": {},
        "assistant_only_loss": {"assistant_only_loss": True},
        "prompt_completion": {},
        "bfd_packing": {"assistant_only_loss": True, "packing": True},
        "wrapped_packing": {"assistant_only_loss": True, "packing": True, "packing_strategy": "wrapped"},
    }[setting]
    if setting == "prompt_completion":
        data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    else:
        data = Dataset.from_list([{"messages": row} for row in rows])
    tokenizer = copy.deepcopy(_tokenizer(folder))  # the trainer sets a pad token on it
    with tempfile.TemporaryDirectory() as out:
        args = SFTConfig(out, max_length=limit, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **chosen)
        model = _model(len(tokenizer))
        trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer._set_signature_columns_if_needed()
        kept = trainer._signature_columns
        examples = [{k: v for k, v in e.items() if k in kept} for e in trainer.train_dataset]
        return [trainer.data_collator(examples[i : i + ROWS]) for i in range(0, len(examples), ROWS)]
