"""torchtune: SFTTransform with its own tokenizers of Llama 2, Llama 3 and Mistral, padded and packed collators."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torchtune.data._collate as collators
from run import NotMeant
from torch.utils.data import Dataset
from torchtune.data import OpenAIToMessages
from torchtune.datasets import PackedDataset
from torchtune.datasets._sft import SFTTransform
from torchtune.models.llama2 import llama2_tokenizer
from torchtune.models.llama3 import llama3_tokenizer
from torchtune.models.mistral import mistral_tokenizer

PACKAGES = ["torchtune", "torchao"]
SETTINGS = {
    "default": "chat_dataset(conversation_style='openai'), the model's own tokenizer, padded_collate_sft",
    "packed": "chat_dataset(conversation_style='openai', packed=True), padded_collate_packed",
}
PACKED = ("packed",)
ROWS = 4


@cache
def _tokenizer(folder: Path, limit: int):
    if folder.name == "llama2":
        return llama2_tokenizer(str(folder / "tokenizer.model"), max_seq_len=limit)
    if folder.name == "mistral-v0.1":
        return mistral_tokenizer(str(folder / "tokenizer.model"), max_seq_len=limit)
    if folder.name == "llama3":
        return llama3_tokenizer(_meta_file(), max_seq_len=limit)
    raise NotMeant("no tokenizer of its own for this folder")


def _meta_file() -> str:
    """Meta's tiktoken file, named by the job or in the package llama-models."""
    spec = find_spec("llama_models")
    if SOURCE is not None:
        return SOURCE
    if spec is None:
        raise NotMeant("needs Meta's tokenizer.model of Llama 3")
    return str(Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model")


SOURCE: str | None = None


class Rows(Dataset):
    def __init__(self, samples: list[dict]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict:
        return self._samples[i]


def prepare(setting: str, folder: Path, rows: list, limit: int) -> list[dict]:
    tokenizer = _tokenizer(folder, limit)
    transform = SFTTransform(message_transform=OpenAIToMessages(), model_transform=tokenizer)
    samples = [transform({"messages": [dict(m) for m in row]}) for row in rows]
    if setting == "packed":
        packs = PackedDataset(Rows(samples), max_seq_len=limit, padding_idx=tokenizer.pad_id)
        return [_packed(collators.padded_collate_packed([pack]), pack) for pack in packs]
    chunks = [samples[i : i + ROWS] for i in range(0, len(samples), ROWS)]
    made = [collators.padded_collate_sft(chunk, padding_idx=tokenizer.pad_id) for chunk in chunks]
    return [{"input_ids": batch["tokens"], "labels": batch["labels"]} for batch in made]


def _packed(batch: dict, pack: dict) -> dict:
    """The mask, one square a row, is what keeps documents apart; seq_lens are its blocks."""
    arrays = {"input_ids": batch["tokens"], "labels": batch["labels"], "position_ids": batch["input_pos"]}
    return {**arrays, "seq_lens": [pack["seq_lens"]]}
