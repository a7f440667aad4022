"""A small random chat model on disk, so that tests run the whole way without a download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ptst.evaluation.sentence_encoder import ENCODER_NAME, LAYOUT
from ptst.hub.wheel import MANIFEST
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.weights import hf_name

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
# Changes of CONFIG that make the tiny model one of another family, with windows shorter than the prompts of tests.
FAMILIES: dict[str, dict] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen2-window": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "head_dim": 8},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ministral": {
        "architectures": ["MinistralForCausalLM"],
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


ENCODER = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 40, "vocab_size": 40}
ENCODER |= {"num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 300, "layer_norm_eps": 1e-12}
ENCODER |= {"type_vocab_size": 2}


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE with a handful of merges (newlines and spaces among them, so that token_boundaries can occur)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("\u0120", "a"), ("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n")]
    vocab = {t: i for i, t in enumerate((*CONTROL, *letters, *(a + b for a, b in merges)))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    return tokenizer


def write_tiny_model(folder: Path, seed: int = 0, **changes) -> Path:
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    save_file(random_weights(config, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """The byte tokenizer with its chat template."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": CONTROL[1], "eos_token": CONTROL[2], "chat_template": CHAT_TEMPLATE})
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(DecoderConfig.from_dict(config))
    weights = {}
    for name, p in decoder.state_dict().items():
        value = torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5)
        weights[hf_name(name)] = 1 + 0.1 * value if p.dim() == 1 else value
    return weights


def write_encoder(folder, **changes):
    """A random BERT with a tokenizer of single letters."""
    config = {**ENCODER, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {t: i for i, t in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    e, f = config["hidden_size"], config["intermediate_size"]
    shapes = {"word_embeddings": (config["vocab_size"], e), "position_embeddings": (300, e)}
    shapes["token_type_embeddings"] = (2, e)
    weights = {f"embeddings.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    norms = ["embeddings"]
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        parts = dict.fromkeys((f"attention.self.{p}" for p in ("query", "key", "value")), (e, e))
        parts |= {"attention.output.dense": (e, e), "intermediate.dense": (f, e), "output.dense": (e, f)}
        for part, shape in parts.items():
            weights |= {f"{at}{part}.weight": torch.randn(shape) / 5, f"{at}{part}.bias": torch.randn(shape[0])}
        norms += [f"{at}attention.output", f"{at}output"]
    for name in norms:
        weights |= {f"{name}.LayerNorm.{part}": torch.randn(e) for part in ("weight", "bias")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_home(home: Path, model: Path | None) -> Path:
    """A folder as $PTST_HOME: with a random sentence encoder for the embedded judge, which takes all texts for much the
    same, and with the default model where there is one."""
    torch.manual_seed(0)
    folder = write_encoder(home / ENCODER_NAME)
    files = {p.name: {"size": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns} for p in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"layout": LAYOUT, "source": "tests", "files": files}))
    if model is not None:
        (home / model.name).symlink_to(model)
    return home
