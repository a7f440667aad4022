"""LoRA adapters of a decoder: add, merge, save and load them, in PEFT's folder layout.

`add_lora` replaces linear layers by ones that add `scale * B A x`; the base stays frozen. `peft` loads what
`save_adapter` writes (`adapter_config.json`, `adapter_model.safetensors`), and `load_adapter` what `peft` writes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from ptst.errors import UserError
from ptst.model.config import LoraConfig, read_json, take_number
from ptst.model.decoder import Decoder, LoraLinear
from ptst.model.weights import check_floating, read_safetensors, save_safetensors
from ptst.storage import write_json

_PREFIX = "base_model.model.model."

# Keys of other adapter kinds in adapter_config.json, and the only supported value of each.
_ONLY_VALUE: dict[str, str | bool | None] = {
    "bias": "none",
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"), False),
    **dict.fromkeys(("modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication")),
    **dict.fromkeys(("exclude_modules", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")),
}


def add_lora(decoder: Decoder, config: LoraConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Add an adapter to every target projection of every layer; returns the trained parameters by name. Raises
    UserError if a projection already has one."""
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
    """Merge every adapter into its base weight, in float32 or better, and remove it."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLinear):
            owner, _, leaf = name.rpartition(".")
            linear = nn.Linear(1, 1, bias=False, device="meta")
            delta = module.scale * (module.lora_B.detach() @ module.lora_A.detach())
            merged = (module.weight.to(delta.dtype) + delta).to(module.weight.dtype)
            linear.weight = nn.Parameter(merged, requires_grad=False)
            setattr(decoder.get_submodule(owner), leaf, linear)


def save_adapter(decoder: Decoder, folder: Path, config: LoraConfig, base_model: str) -> None:
    """Write the adapter in PEFT's layout, each file atomically; `base_model` is recorded as its base."""
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
    write_json(folder / "adapter_config.json", described)


def read_lora_config(folder: Path) -> LoraConfig:
    """The LoraConfig of a PEFT folder. Raises UserError for adapter kinds and options that are not supported,
    and, naming the key, for numbers of the wrong type, not finite or out of range."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)

    def refuse(cause: str) -> NoReturn:
        raise UserError(cause, where=path) from None

    if not isinstance(raw, dict):
        refuse("not a JSON object")
    if raw.get("peft_type") != "LORA":
        refuse(f"peft_type {raw.get('peft_type')!r} is not supported (LORA is)")
    for key, value in _ONLY_VALUE.items():
        if raw.get(key, value) not in (value, None, [], {}):
            refuse(f"{key} = {raw[key]!r} is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        if raw.get(key):
            refuse(f"{key} is not supported: all projections share one rank and alpha")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        refuse(f"target_modules is {targets!r}, not a list of projection names")
    if not isinstance(rslora := raw.get("use_rslora") or False, bool):
        refuse(f"use_rslora is {rslora!r}; true or false is needed")
    rank = take_number(raw, str(path), "r")
    alpha = take_number(raw, str(path), "lora_alpha", whole=False, signed=True)
    dropout = take_number({"lora_dropout": 0.0, **raw}, str(path), "lora_dropout", whole=False, signed=True)
    return LoraConfig(rank, alpha, tuple(targets), rslora, dropout)


def adapter_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder by parameter name (`layers.0.self_attn.q_proj.lora_A`). Raises UserError unless
    names and shapes are those of `shapes`."""
    path = Path(folder) / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in read_safetensors(path):
        key = name.removeprefix(_PREFIX).removesuffix(".weight")
        other = "was it trained on another model?"
        if key not in shapes:
            raise UserError(f"tensor {name!r} has no place in this model", other, path)
        if shapes[key] != tuple(tensor.shape):
            raise UserError(f"{name} has shape {list(tensor.shape)}, the model needs {list(shapes[key])}", other, path)
        check_floating(name, tensor, path)
        tensors[key] = tensor
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise UserError(f"the adapter lacks {len(missing)} tensors, the first is {missing[0]}", where=path)
    return tensors


def load_adapter(decoder: Decoder, folder: Path) -> LoraConfig:
    """Attach the adapter of a PEFT folder, unmerged. Raises UserError if it does not fit the decoder."""
    config = read_lora_config(Path(folder))
    parameters = add_lora(decoder, config)
    for name, tensor in adapter_tensors(folder, {n: tuple(p.shape) for n, p in parameters.items()}).items():
        with torch.no_grad():
            parameters[name].copy_(tensor)
        parameters[name].requires_grad_(False)
    return config
