"""LoRA on chosen projections of a decoder, and its folder in PEFT's layout.

`add_lora` replaces linear layers by ones that add `scale * B A x`; the base stays frozen. What `save_adapter` writes
(`adapter_config.json`, `adapter_model.safetensors`) is loaded by `peft`, and what `peft` wrote by `load_adapter`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ptst.errors import UserError
from ptst.model.config import read_json
from ptst.model.decoder import Decoder
from ptst.model.linear import LoraLinear
from ptst.model.lora_config import LoraConfig
from ptst.model.weights import read_safetensors, save_safetensors, write_atomically

_PREFIX = "base_model.model.model."

# What other adapter kinds put into adapter_config.json, at the one value under which it means nothing here.
_ONLY_VALUE = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
    "exclude_modules": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
    "use_qalora": False,
    "alora_invocation_tokens": None,
}


def add_lora(decoder: Decoder, config: LoraConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Put adapters on every layer's target projections; returns the trained parameters by name."""
    generator = torch.Generator().manual_seed(seed)
    decoder.lora_dropout = config.dropout
    for name, module in list(decoder.named_modules()):
        owner_name, _, leaf = name.rpartition(".")
        if leaf in config.targets:
            if not isinstance(module, nn.Linear):
                raise UserError(f"{name} already has an adapter")
            setattr(decoder.get_submodule(owner_name), leaf, LoraLinear(module, config.rank, config.scale, generator))
    return {name: p for name, p in decoder.named_parameters() if ".lora_" in name}


def merge_lora(decoder: Decoder) -> None:
    """Fold every adapter into its base weight, in float32 or better, and drop it."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLinear):
            owner, _, leaf = name.rpartition(".")
            linear = nn.Linear(1, 1, bias=False, device="meta")
            delta = module.scale * (module.lora_B.detach() @ module.lora_A.detach())
            merged = (module.weight.to(delta.dtype) + delta).to(module.weight.dtype)
            linear.weight = nn.Parameter(merged, requires_grad=False)
            setattr(decoder.get_submodule(owner), leaf, linear)


def save_adapter(decoder: Decoder, folder: Path, config: LoraConfig, base_model: str) -> None:
    """Write the adapter in PEFT's layout, each file atomically. `base_model` is recorded as its base."""
    folder = Path(folder)
    tensors = {
        _PREFIX + name.replace(".lora_A", ".lora_A.weight").replace(".lora_B", ".lora_B.weight"): p
        for name, p in decoder.named_parameters()
        if ".lora_" in name
    }
    assert tensors, "no adapter to save"
    described = {
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
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    write_atomically(folder / "adapter_config.json", (json.dumps(described, indent=2) + "\n").encode())


def read_lora_config(folder: Path) -> LoraConfig:
    """The LoraConfig of a PEFT folder. Raises UserError for adapter kinds and options that are not supported."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported (LORA is)")
    for key, value in _ONLY_VALUE.items():
        if raw.get(key, value) not in (value, None, [], {}):
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        if raw.get(key):
            raise UserError(f"{path}: {key} is not supported; every projection has the same rank and alpha here")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise UserError(f"{path}: target_modules is {targets!r}; a list of projection names is needed")
    try:
        return LoraConfig(
            int(raw["r"]),
            float(raw["lora_alpha"]),
            tuple(targets),
            bool(raw.get("use_rslora", False)),
            float(raw.get("lora_dropout", 0.0)),
        )
    except KeyError as missing:
        raise UserError(f"{path} lacks {missing}") from None


def adapter_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder by parameter name (`layers.0.self_attn.q_proj.lora_A`).

    Raises UserError unless they are those of `shapes`, in name and shape.
    """
    path = Path(folder) / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in read_safetensors(path):
        key = name.removeprefix(_PREFIX).removesuffix(".weight")
        if key not in shapes:
            raise UserError(f"{path}: tensor {name!r} has no place in this model; was it trained on another model?")
        if shapes[key] != tuple(tensor.shape):
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model needs {list(shapes[key])}; "
                "was it trained on another model?"
            )
        tensors[key] = tensor
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise UserError(f"{path}: the adapter lacks {len(missing)} tensors, the first is {missing[0]}")
    return tensors


def load_adapter(decoder: Decoder, folder: Path) -> LoraConfig:
    """Attach the adapter of a PEFT folder, unmerged. Raises UserError when it does not fit the decoder."""
    config = read_lora_config(Path(folder))
    parameters = add_lora(decoder, config)
    for name, tensor in adapter_tensors(folder, {n: tuple(p.shape) for n, p in parameters.items()}).items():
        with torch.no_grad():
            parameters[name].copy_(tensor)
        parameters[name].requires_grad_(False)
    return config
