"""Small random models of each supported family, with weights from a formula.

The values come from an integer hash of name and index, so they are the same on every machine and torch version, and a
recorded figure needs no weights beside it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 101,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict] = {
    "llama2": {},
    "smollm2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 100000.0},
    "llama3.1": {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "llama3.1-new-keys": {"num_key_value_heads": 2, "rope_parameters": {**_LLAMA3, "rope_theta": 500000.0}},
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64},
    "llama-head-dim": {"head_dim": 24, "num_key_value_heads": 2},
    "mistral-v0.1": {**_MISTRAL, "sliding_window": 8},
    "mistral-linear": {**_MISTRAL, "sliding_window": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "ministral": {
        **_MISTRAL,
        "head_dim": 12,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "mistral-v0.2": {**_MISTRAL, "sliding_window": None, "rope_theta": 1000000.0, "head_dim": 16},
}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "pad_token_id": 0}
_SMOLLM3 |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 2000000.0}
_OLMO = {"num_hidden_layers": 4, "rope_theta": 500000.0, "num_key_value_heads": 2}
_OLMO3 = {**_OLMO, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 8}
MODELS |= {
    "qwen2": {**_QWEN2, "tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen2-yarn-window": {**_QWEN2, **_WINDOW, "rope_scaling": _YARN},
    "qwen3": {**_QWEN3, "tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen3-window": {**_QWEN3, **_WINDOW},
    "smollm3": _SMOLLM3,
    "smollm3-window": {**_SMOLLM3, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 8},
    "olmo2": {**_OLMO, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "olmo3": _OLMO3,
    "olmo3-yarn": {**_OLMO3, "rope_scaling": {**_YARN, "attention_factor": 1.2, "beta_fast": 16.0}},
}
# Two documents; the second is longer than the window and than the original context of the llama3 scaling.
SEQUENCES = tuple([3 + (7 * i * i + 11 * i + n) % 97 for i in range(length)] for n, length in ((0, 17), (1, 60)))


def config(name: str) -> dict:
    """config.json of a model. The new-keys variant has no `rope_theta` of its own."""
    changes = MODELS[name]
    base = {k: v for k, v in BASE.items() if not (k == "rope_theta" and "rope_parameters" in changes)}
    if changes.get("model_type") in ("mistral", "qwen2"):
        base = {k: v for k, v in base.items() if k not in ("attention_bias", "mlp_bias")}
    return {**base, **changes}


def weights(c: dict) -> dict[str, torch.Tensor]:
    """All tensors under Hugging Face's names, float32."""
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    kind = c["model_type"]
    first = "post_feedforward_layernorm" if kind.startswith("olmo") else "input_layernorm"
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        if kind == "qwen2":
            shapes |= {f"{p}.self_attn.{x}_proj.bias": (size,) for x, size in (("q", q), ("k", kv), ("v", kv))}
        if kind == "qwen3":
            shapes |= {f"{p}.self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
        if kind.startswith("olmo"):
            shapes |= {f"{p}.self_attn.{x}_norm.weight": (size,) for x, size in (("q", q), ("k", kv))}
        shapes |= {
            f"{p}.{first}.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
            f"{p}.self_attn.q_proj.weight": (q, hidden),
            f"{p}.self_attn.k_proj.weight": (kv, hidden),
            f"{p}.self_attn.v_proj.weight": (kv, hidden),
            f"{p}.self_attn.o_proj.weight": (hidden, q),
            f"{p}.mlp.gate_proj.weight": (inner, hidden),
            f"{p}.mlp.up_proj.weight": (inner, hidden),
            f"{p}.mlp.down_proj.weight": (hidden, inner),
        }
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):  # a 32-bit finalizer
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    uniform = x.astype(np.float64) / 2**31 - 1
    # Wide enough that attention is far from uniform: an error in positions or windows must show in the logits.
    value = uniform * 3 / np.sqrt(shape[-1]) if len(shape) > 1 else uniform if "bias" in name else 1 + 0.2 * uniform
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def write_model(name: str, folder: Path) -> Path:
    c = config(name)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(weights(c), folder / "model.safetensors", {"format": "pt"})
    return folder
