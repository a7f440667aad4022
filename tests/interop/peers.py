"""Small random models that transformers made, and adapters that peft trained on them: the other side of each door."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ptst.model.decoder import Decoder
from ptst.model.lora import load_adapter
from ptst.model.weights import load_decoder

TOKENS = [1, 17, 45, 250, 3, 99, 120, 7, 64, 200, 31, 5, 88, 88, 12, 250, 2, 61]
SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256}
# Grouped queries, except where every head has keys of its own; with and without a head of its own, and with biases.
KINDS: dict[str, dict] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-all-heads": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 6, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False},
}
LIMIT = 1e-5  # of float32 logits, by their norm


def write_model(folder: Path, kind: str) -> Path:
    """A random model as transformers saves it, with biases that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **KINDS[kind]}))
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


def open_peer(folder: Path, adapter: Path | None = None):
    """transformers' float32 model, with an adapter as peft reads it where one is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def train_with_peft(folder: Path, config, steps: int = 3):
    """A model with an adapter that peft made and that learned for a few steps: no matrix is as it was initialized."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(open_peer(folder), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    tokens = torch.tensor([TOKENS])
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def peer_logits(model) -> Tensor:
    return model(torch.tensor([TOKENS])).logits[0].float()


@torch.no_grad()
def our_logits(folder: Path, adapter: Path | None = None) -> Tensor:
    decoder = load_decoder(folder)
    if adapter is not None:
        load_adapter(decoder, adapter)
    return decoder.logits(torch.tensor(TOKENS))


def count_adapters(decoder: Decoder) -> int:
    return sum(name.endswith("lora_A") for name, _ in decoder.named_parameters())


def distance(found: Tensor, wanted: Tensor) -> float:
    """In relation to the norm of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())
