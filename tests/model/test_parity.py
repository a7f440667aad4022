"""The decoder against recorded figures: Hugging Face's logits and gradients of all weights on small random models of
each family (benchmarks/parity.py --record; live where transformers is installed), and the greedy text of a small real
model."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.parity import (
    LIMIT,
    PROBE,
    difference_of_gradients,
    difference_of_logits,
    gradients,
    probe_of_gradient,
)
from benchmarks.random_models import MODELS, SEQUENCES, write_model
from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.hub.gguf_convert import undo_interleaving
from ptst.model.weights import load_decoder

FIGURES, GRADIENTS = (json.loads(Path(__file__).with_name(f"{x}.json").read_text()) for x in ("figures", "gradients"))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_random_models(name, tmp_path):
    """Within 1e-4 at every position, each document alone and both side by side."""
    decoder = load_decoder(write_model(name, tmp_path))
    bounds = [0, len(SEQUENCES[0]), len(SEQUENCES[0]) + len(SEQUENCES[1])]
    packed = decoder.logits(torch.tensor([*SEQUENCES[0], *SEQUENCES[1]]), bounds)
    for index, (sequence, figures) in enumerate(zip(SEQUENCES, FIGURES[name], strict=True)):
        alone = decoder.logits(torch.tensor(sequence))
        for logits in (alone, packed[bounds[index] : bounds[index + 1]]):
            last = torch.tensor(figures["last"])
            assert (logits[-1] - last).abs().max() <= 1e-4
            # The probe sums 101 logits, each of them within 1e-4.
            assert (logits.double() @ PROBE - torch.tensor(figures["probe"])).abs().max() <= 1e-3
        assert last.std() > 0.1


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_of_random_models(name, tmp_path):
    """Of every weight, within 1e-4 of its norm."""
    ours = gradients(write_model(name, tmp_path))
    assert ours.keys() == GRADIENTS[name].keys()
    for weight, figures in GRADIENTS[name].items():
        for value, wanted in zip(probe_of_gradient(weight, ours[weight]), figures, strict=True):
            assert abs(value - wanted) <= LIMIT * figures[0], weight


@pytest.mark.parametrize("name", sorted(MODELS))
def test_random_models_live(name, tmp_path):
    pytest.importorskip("transformers", reason="the recorded figures are compared where it is not installed")
    folder = write_model(name, tmp_path)
    assert max(difference_of_logits(folder, s) for s in SEQUENCES) <= LIMIT
    assert difference_of_gradients(folder) <= LIMIT


def llama2c_folder(path: Path, folder: Path) -> Path:
    """A Hugging Face folder of a model in llama2.c's layout: a header of seven integers, then float32 tensors."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _length = struct.unpack("7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, dtype=np.float32, offset=28).copy())
    offset = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        size = int(np.prod(shape))
        offset += size
        return values[offset - size : offset].view(shape)

    kv = dim // heads * kv_heads
    weights = {"model.embed_tokens.weight": take(abs(vocab), dim)}
    parts = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    for part, shape in parts:
        for layer, tensor in enumerate(take(layers, *shape)):
            if part.endswith(("q_proj", "k_proj")):  # llama2.c turns neighbouring pairs
                tensor = undo_interleaving(tensor, heads if part.endswith("q_proj") else kv_heads)
            weights[f"model.layers.{layer}.{part}.weight"] = tensor.clone()
    weights["model.norm.weight"] = take(dim)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": abs(vocab),
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_stories260k_greedy_text(shared, tmp_path):
    decoder = load_decoder(llama2c_folder(shared / "models/stories260K/stories260K.bin", tmp_path))
    for row in json.loads((shared / "golden/stories260K_greedy.json").read_text()):
        wanted = row["greedy_tokens"]
        (answer,) = generate(decoder, [row["prompt_tokens"]], set(), Sampling(len(wanted)))
        assert answer.token_ids == wanted
