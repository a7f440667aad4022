"""A Llama GGUF file to an ordinary Hugging Face folder.

Quantized tensors are dequantized and stored in float32, exactly the values that the file defines. llama.cpp's rotary
embedding pairs neighbouring elements of a head (interleaved RoPE), Hugging Face's pairs element i with i + D/2; the
order of the rows of q and k is converted accordingly.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptst.errors import UserError
from ptst.model.weights import save_safetensors
from ptst.progress import ProgressLine
from ptst.storage import write_json

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL = 3  # GGUF's token type for control tokens


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config into `folder` (it exists). Raises UserError for another
    architecture or tokenizer."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama" or meta.get("tokenizer.ggml.model") != "gpt2":
        raise UserError("only Llama models with a byte-level BPE tokenizer can be converted", where=gguf_path)
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    tensors: dict[str, Tensor] = {}
    with ProgressLine("converting", len(reader.tensors)) as progress:
        for done, stored in enumerate(reader.tensors, 1):
            value = np.array(gguf.quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
            tensor = torch.from_numpy(value)
            if ".attn_q." in stored.name or ".attn_k." in stored.name:
                tensor = undo_interleaving(tensor, heads if ".attn_q." in stored.name else kv_heads)
            tensors[hf_tensor_name(stored.name)] = tensor
            progress.update(done)
    save_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", _config(meta, tied="lm_head.weight" not in tensors))
    write_json(folder / "generation_config.json", _token_ids(meta))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))
    (folder / "tokenizer.json").write_text(_tokenizer(meta), encoding="utf-8")


def undo_interleaving(w_OI: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, half) back to (head, half, pair): llama.cpp's converter swapped these two axes."""
    outputs, inputs = w_OI.shape
    return w_OI.view(heads, outputs // heads // 2, 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def hf_tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises UserError for an unknown one."""
    if name in _NAMES:
        return _NAMES[name]
    block, layer, part, kind = (*name.split("."), "", "", "")[:4]
    if block != "blk" or part not in _LAYER_NAMES or kind != "weight":
        raise UserError(f"GGUF tensor {name!r} has no place in a Llama model")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        # Stored as float32; six digits restore the original decimal number.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **_token_ids(meta),
    }


def _token_ids(meta: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{name}_token_id": meta[f"tokenizer.ggml.{stored}_token_id"] for name, stored in names.items()}


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens, stored = meta["tokenizer.ggml.tokens"], {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[meta[f"tokenizer.ggml.{s}_token_id"]] for name, s in stored.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        **_chat_templates(meta),
    }


def _chat_templates(meta: dict[str, Any]) -> dict[str, Any]:
    """The chat template as transformers has it in tokenizer_config.json: one text, or a list of named ones."""
    key = "tokenizer.chat_template"
    named = {"default": meta[key]} if key in meta else {}
    named |= {name: meta[f"{key}.{name}"] for name in meta.get("tokenizer.chat_templates", ())}
    if not named:
        return {}
    several = [{"name": name, "template": text} for name, text in named.items()]
    return {"chat_template": named["default"] if list(named) == ["default"] else several}


def _tokenizer(meta: dict[str, Any]) -> str:
    """tokenizer.json: byte-level BPE that splits every digit off first, as SmolLM2 was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer.to_str(pretty=False)
