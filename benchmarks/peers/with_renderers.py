"""renderers: build_training_sample, by the renderer that its table names for the model or by the default one."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from renderers import (
    AutoRendererConfig,
    Llama3RendererConfig,
    Qwen3RendererConfig,
    build_training_sample,
    create_renderer,
)
from run import NotMeant
from transformers import AutoTokenizer

logging.disable(logging.WARNING)
PACKAGES = ["renderers"]
SETTINGS = {
    "auto": "create_renderer(tokenizer) of a local folder: DefaultRenderer; build_training_sample(renderer, messages, "
    "role_to_mask=lambda m: m['role'] == 'assistant')",
    "typed": "Llama3RendererConfig() and Qwen3RendererConfig(); build_training_sample(renderer, messages)",
}
TYPED = {"llama3": Llama3RendererConfig, "llama3.1": Llama3RendererConfig, "qwen3": Qwen3RendererConfig}


@cache
def _renderer(setting: str, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if setting == "auto":
        return create_renderer(tokenizer, AutoRendererConfig())
    if folder.name not in TYPED:
        raise NotMeant("no typed renderer for this template")
    return create_renderer(tokenizer, TYPED[folder.name]())


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    renderer = _renderer(setting, folder)
    choice = {"role_to_mask": lambda m: m["role"] == "assistant"} if setting == "auto" else {}
    batches = []
    for row in rows:
        sample = build_training_sample(renderer, row, **choice)
        pairs = zip(sample.token_ids, sample.loss_mask, strict=True)
        labels = [token if bit else -100 for token, bit in pairs]
        batches.append({"input_ids": [sample.token_ids], "labels": [labels]})
    return batches
