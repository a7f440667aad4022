"""LoRA adapters of a decoder: add, merge, save and load them, in PEFT's folder layout.

`add_lora` replaces linear layers by ones that add `scale * B A x`; the base stays frozen. `peft` loads what
`save_adapter` writes (`adapter_config.json`, `adapter_model.safetensors`), and `load_adapter` the plain LoRA that
`peft` and others write (adapter_files.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptst.errors import UserError
from ptst.model.adapter_files import CONFIG, WEIGHTS, adapter_matrices
from ptst.model.adapter_files import read_lora_config as read_lora_config
from ptst.model.config import TARGETS, LoraConfig
from ptst.model.decoder import Decoder, LoraLinear
from ptst.model.weights import save_safetensors
from ptst.storage import write_json

_PREFIX = "base_model.model.model."


def add_lora(
    decoder: Decoder, config: LoraConfig, seed: int = 0, device: torch.device | str | None = None
) -> dict[str, nn.Parameter]:
    """Add an adapter to every target projection of every layer; returns the trained parameters by name. `device`: where
    the adapters are, by default where the decoder is. Raises UserError if a projection already has one."""
    generator = torch.Generator().manual_seed(seed)
    decoder.lora_dropout = config.dropout
    for name in target_weights(decoder):
        if name.rpartition(".")[2] in config.targets:
            _attach(decoder, name, config.rank, config.scale, generator, device)
    return {name: p for name, p in decoder.named_parameters() if ".lora_" in name}


def merge_lora(decoder: Decoder) -> None:
    """Merge every adapter into its base weight, in float32 or better, and remove it."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLinear):
            owner, _, leaf = name.rpartition(".")
            linear = nn.Linear(1, 1, bias=False, device="meta")
            merged = merged_weight(module.weight, module.lora_A.detach(), module.lora_B.detach(), module.scale)
            linear.weight = nn.Parameter(merged.to(module.weight.dtype), requires_grad=False)
            linear.bias = module.bias
            setattr(decoder.get_submodule(owner), leaf, linear)


def merged_weight(weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """W + scale * B A in the precision of the adapter, float32 or better; it is the caller's to round."""
    delta_OI = scale * (b_Or @ a_rI)
    return weight_OI.to(delta_OI.dtype) + delta_OI


def save_adapter(decoder: Decoder, folder: Path, config: LoraConfig, base_model: str) -> None:
    """Write the adapter in PEFT's layout, each file atomically; `base_model` is recorded as its base."""
    tensors = {name: p for name, p in decoder.named_parameters() if ".lora_" in name}
    assert tensors, "no adapter to save"
    write_adapter(Path(folder), tensors, describe_adapter(config, base_model))


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Write matrices by their names in the decoder (`layers.0.self_attn.q_proj.lora_A`), and adapter_config.json."""
    stored = {_PREFIX + name + ".weight": tensor for name, tensor in tensors.items()}
    save_safetensors(folder / WEIGHTS, stored)
    write_json(folder / CONFIG, described)


def describe_adapter(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter of ours."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "bias": "none",
        "use_rslora": config.rslora,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def load_adapter(decoder: Decoder, folder: Path) -> LoraConfig:
    """Attach the adapter of a PEFT folder, unmerged; returns its settings, of which patterns may except projections.
    Raises UserError if it does not fit the decoder."""
    config = read_lora_config(folder)
    weights = target_weights(decoder)
    matrices = adapter_matrices(folder, config, {name: tuple(w.shape) for name, w in weights.items()})
    decoder.lora_dropout = config.dropout
    for name, (a_rI, b_Or) in matrices.items():
        layer = _attach(decoder, name, len(a_rI), config.scale)
        for parameter, tensor in ((layer.lora_A, a_rI), (layer.lora_B, b_Or)):
            parameter.requires_grad_(False).copy_(tensor)
    leaves = {name.rpartition(".")[2] for name in matrices}
    plain = isinstance(config.targets, tuple) and leaves == set(config.targets)
    targets = tuple(config.targets) if plain else tuple(t for t in TARGETS if t in leaves)
    return LoraConfig(config.rank, config.alpha, targets, config.rslora, config.dropout)


def target_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The weights (O, I) that adapters may change, by the name of the projection (`layers.0.self_attn.q_proj`)."""
    modules = ((name, m) for name, m in decoder.named_modules() if isinstance(m, (nn.Linear, LoraLinear)))
    return {name: m.weight for name, m in modules if name.rpartition(".")[2] in TARGETS}


def _attach(
    decoder: Decoder,
    name: str,
    rank: int,
    scale: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> LoraLinear:
    module = decoder.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name} already has an adapter")
    owner, _, leaf = name.rpartition(".")
    layer = LoraLinear(module, rank, scale, generator, device)
    setattr(decoder.get_submodule(owner), leaf, layer)
    return layer
