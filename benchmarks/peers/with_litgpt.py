"""LitGPT: its JSON data module (one question, one answer) and its collator."""

from __future__ import annotations

import json
import tempfile
import warnings
from functools import cache
from pathlib import Path

from litgpt.data import JSON, get_sft_collate_fn
from litgpt.prompts import model_name_to_prompt_style
from litgpt.tokenizer import Tokenizer
from run import NotMeant

warnings.filterwarnings("ignore")
PACKAGES = ["litgpt"]
SETTINGS = {
    "json_default": "JSON(json_path): prompt_style 'alpaca', mask_prompt False",
    "model_style": "JSON(json_path, mask_prompt=True, prompt_style=that of the model's name)",
}
# It reads the kind of model from the name of its folder.
NAMES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen2.5": "Qwen2.5-0.5B-Instruct",
    "qwen3": "Qwen3-0.6B",
    "llama2": "Llama-2-7b-chat-hf",
    "tinyllama": "tiny-llama-1.1b-chat",
    "llama3": "Llama-3-8B-Instruct",
    "mistral-v0.1": "Mistral-7B-Instruct-v0.1",
    "mistral-v0.3": "Mistral-7B-Instruct-v0.3",
    "llama3.1": "Llama-3.1-8B-Instruct",
}
ROWS = 4
HOME = tempfile.TemporaryDirectory()


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    named = Path(HOME.name) / NAMES[folder.name]
    named.symlink_to(folder)
    return Tokenizer(named)


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    if any(len(row) > 3 or (len(row) == 3) != (row[0]["role"] == "system") for row in rows):
        raise NotMeant("its data sets have one question and one answer")
    data = []
    for row in rows:
        system = {"sys_prompt": row[0]["content"]} if len(row) == 3 else {}
        data.append({"instruction": row[-2]["content"], "output": row[-1]["content"], **system})
    chosen = {}
    if setting == "model_style":
        chosen = {"mask_prompt": True, "prompt_style": model_name_to_prompt_style(NAMES[folder.name])}
    with tempfile.TemporaryDirectory() as kept:
        for name in ("train", "val"):
            (Path(kept) / f"{name}.json").write_text(json.dumps(data))
        module = JSON(Path(kept), **chosen)
        module.connect(_tokenizer(folder), batch_size=ROWS, max_seq_length=limit)
        module.setup()
    examples = [module.train_dataset[i] for i in range(len(rows))]
    collate = get_sft_collate_fn(max_seq_length=limit, ignore_index=module.ignore_index)
    batches = [collate(examples[i : i + ROWS]) for i in range(0, len(examples), ROWS)]
    return [{"input_ids": batch["input_ids"], "labels": batch["labels"]} for batch in batches]
