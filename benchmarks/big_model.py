"""Model folders of random weights at any size, written faster than random numbers are drawn.

A tensor repeats a block of random numbers from another place; norms are ones.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.weights import hf_name

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SHARD = 5_000_000_000
BLOCK = 2**24 + 3  # odd, so that rows differ


def write_weights(folder: Path, config: dict[str, Any], dtype: torch.dtype, shard_bytes: int = SHARD) -> int:
    """Write config.json, shards and index; returns the bytes of all tensors."""
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {hf_name(key): t.shape for key, t in Decoder(DecoderConfig.from_dict(config)).state_dict().items()}
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(s.numel() for s in (*shards[-1].values(), shape)) * dtype.itemsize > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, block)
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(path: Path, shapes: dict[str, torch.Size], block: torch.Tensor) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + shape.numel() * block.element_size()
        header[name] = {"dtype": NAMES[block.dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, shape in enumerate(shapes.values()):
            values = (
                [torch.ones(shape, dtype=block.dtype)] if len(shape) == 1 else _repeated(block, number, shape.numel())
            )
            for part in values:
                file.write(part.view(torch.uint8).numpy().data)


def _repeated(block: torch.Tensor, number: int, count: int) -> Iterator[torch.Tensor]:
    at = number * 7919 % len(block)
    while count:
        part = block[at : at + count]
        yield part
        count -= len(part)
        at = 0
