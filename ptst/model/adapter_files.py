"""Adapter folders in PEFT's layout, whoever wrote them: which projections have matrices, of which rank and scale.

Every key of adapter_config.json is used, is known to have no effect on answers, or is refused by name unless it is
off: an option that is ignored in silence (DoRA's magnitudes, PiSSA's changed base) would give another model than the
one that was trained. Names and patterns match as in peft, and the tensors must be exactly those that they name.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptst.errors import UserError
from ptst.model.config import TARGETS, read_json, take_number
from ptst.model.patterns import SECONDS, Matches, match_all
from ptst.model.weights import check_floating, read_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it into its base with peft's merge_and_unload, and give the folder of the merged model"
_NO_MERGE = "give a plain LoRA adapter of a causal language model: this kind cannot be merged into one"
_OTHER = "was it trained on another model?"
_LONGEST = 10_000  # characters of a pattern

_USED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "base_model_name_or_path"),
}
# Bookkeeping, and settings of training or of options that are off.
_WITHOUT_EFFECT = {
    *("auto_mapping", "revision", "inference_mode", "peft_version", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config", "merge_weights"),
    # Of an initialization: init_lora_weights says which one was in use.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # of ms-swift
}
# Keys that are on with these values and yet plain LoRA. All others, also those of later versions, must be off: null,
# false or empty.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),  # the base stays as it is
}
# What no chat model comes of by merging: keys whose adapters act on a part of the tokens, depend on the input, have a
# head of another task or change weights that layers share; kinds that put vectors before the prompt, or depend on it.
_UNMERGEABLE = {"alora_invocation_tokens", "arrow_config", "use_qalora", "task_type", "layer_replication"}
_UNMERGEABLE_KINDS = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
    *("POLY", "SHADOW", "XLORA"),
}

# A tensor's name as peft writes it, and as trainers do that save around it: with the adapter's name, without the
# prefix of the wrapper, or from the model without its head.
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(layers\.\d+\.(?:self_attn|mlp)\.\w+\.lora_[AB])(?:\.(?!bias$)[\w-]+)?"
    r"(?:\.weight)?"
)
_WRAPPER = re.compile(r"(?:^module|\b_fsdp_wrapped_module|\b_checkpoint_wrapped_module|\b_orig_mod)\.")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. `targets`, `exclude`: a regular expression, or names and ends of names; `layers`:
    indices that names (not whole paths) are restricted to. `base`: the base model as the trainer named it."""

    path: Path
    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    rslora: bool = False
    dropout: float = 0.0
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None

    @property
    def scale(self) -> float:
        """The factor of B A. 1 where patterns give projections factors of their own, which B then carries."""
        return 1.0 if self.rank_pattern or self.alpha_pattern else self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def places(self, names: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Rank and scale of every projection among `names` (`layers.0.self_attn.q_proj`) that has an adapter. Raises
        UserError where there is none, and for an adapter of the embedding or the head."""
        keys = {f"model.{name}": name for name in names}
        outside = ("model.embed_tokens", "lm_head")
        matches, found = self._matches((*outside, *keys)), {}
        for key in outside:
            if self._selects(key, matches):
                cause = f"target_modules names {key}: only projections of layers are supported"
                raise UserError(cause, _MERGE, self.path)
        for key, name in keys.items():
            if self._selects(key, matches):
                rank = _first(self.rank_pattern, key, self.rank, matches)
                alpha = _first(self.alpha_pattern, key, self.alpha, matches)
                found[name] = rank, self._scale(rank, alpha)
        if not found:
            cause = f"target_modules = {_short(self.targets)} names no projection of this model"
            raise UserError(cause, f"choose from {', '.join(TARGETS)}", self.path)
        return found

    def _matches(self, keys: tuple[str, ...]) -> Matches:
        """Where every expression of the file matches. Raises UserError for what is none, and for one that is slow."""
        wholes = (names for names in (self.targets, self.exclude) if isinstance(names, str) and names != "all-linear")
        jobs = [("whole", names) for names in wholes]
        jobs += [("end", pattern) for pattern in (*self.rank_pattern, *self.alpha_pattern)]
        jobs += [("layer", pattern) for pattern in self.layers_patterns or ("",)]
        try:
            return match_all(tuple(dict.fromkeys(jobs)), keys)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"has a pattern that is no regular expression ({error})", where=self.path) from None
        except TimeoutError:
            cause = f"its regular expressions take more than {SECONDS} s over the names of the model's modules"
            raise UserError(cause, "name the modules one by one", self.path) from None

    def without_place(self, names: Iterable[str]) -> list[str]:
        """The entries of `targets` that name nothing in this model, which peft passes over."""
        keys = [f"model.{name}" for name in names]
        targets = () if isinstance(self.targets, str) else self.targets
        return [t for t in targets if not any(key == t or key.endswith(f".{t}") for key in keys)]

    def _selects(self, key: str, matches: Matches) -> bool:
        """Whether a module of the Hugging Face model has an adapter, by peft's rules."""
        if _named(self.exclude, key, matches):
            return False
        if self.targets == "all-linear":
            return key.rpartition(".")[2] in TARGETS
        if not _named(self.targets, key, matches):
            return False
        if not self.layers or key in self.targets:
            return True
        found = (matches["layer", pattern][key] for pattern in self.layers_patterns or ("",))
        index = next((i for i in found if i is not None), None)
        return index is not None and int(index) in self.layers


def _named(names: str | tuple[str, ...], key: str, matches: Matches) -> bool:
    if isinstance(names, str):
        return matches["whole", names][key] is not None
    return key in names or any(key.endswith(f".{name}") for name in names)


def _first(patterns: Mapping[str, Any], key: str, default: Any, matches: Matches) -> Any:
    """The value of the first pattern that matches the whole key or its end."""
    return next((v for pattern, v in patterns.items() if matches["end", pattern][key] is not None), default)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def read_lora_config(folder: Path) -> AdapterConfig:
    """The configuration of an adapter folder. Raises UserError, naming the key, for what is no plain LoRA, and for
    values of the wrong type, not finite or out of range."""
    path = Path(folder) / CONFIG
    if not path.exists():
        remedy = f"give the folder that holds {CONFIG} and {WEIGHTS}"
        raise UserError(f"{folder} is not an adapter folder (it has no {CONFIG})", remedy)
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError("not a JSON object", where=path)
    if (kind := raw.get("peft_type")) != "LORA":
        remedy = _MERGE if isinstance(kind, str) and kind not in _UNMERGEABLE_KINDS else "give a LoRA adapter"
        raise UserError(f"peft_type {_short(kind)} is not supported (LORA is)", remedy, path)
    for key, value in raw.items():
        plain = _PLAIN.get(key, ())
        known = value.lower() if isinstance(value, str) and key == "init_lora_weights" else value
        if (
            key not in _USED | _WITHOUT_EFFECT
            and value
            and not any(type(v) is type(known) and v == known for v in plain)
        ):
            remedy = _NO_MERGE if key in _UNMERGEABLE else _MERGE
            raise UserError(f"{key} = {_short(value)} is not supported", remedy, path)
    take = _Taker(raw, path)
    return AdapterConfig(
        path=path,
        rank=take_number(dict(raw), str(path), "r"),
        alpha=take_number(dict(raw), str(path), "lora_alpha", whole=False, signed=True),
        dropout=take.dropout(),
        rslora=take.flag("use_rslora"),
        targets=take.names("target_modules", needed=True),
        exclude=take.names("exclude_modules"),
        layers=take.layers(),
        layers_patterns=take.layers_patterns(),
        rank_pattern=take.pattern("rank_pattern", whole=True),
        alpha_pattern=take.pattern("alpha_pattern", whole=False),
        base=raw["base_model_name_or_path"] if isinstance(raw.get("base_model_name_or_path"), str) else None,
    )


@dataclass(frozen=True)
class _Taker:
    """The values of adapter_config.json, checked. Each method raises UserError, naming the key."""

    raw: Mapping[str, Any]
    path: Path

    def wrong(self, key: str, wanted: str) -> UserError:
        return UserError(f"{key} is {_short(self.raw.get(key))}; {wanted} is needed", where=self.path)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key) or False
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def dropout(self) -> float:
        rate = take_number({"lora_dropout": 0.0, **self.raw}, str(self.path), "lora_dropout", whole=False, signed=True)
        if not 0 <= rate < 1:
            raise UserError(f"lora_dropout is {rate}", "it must be at least 0 and below 1", self.path)
        return rate

    def names(self, key: str, needed: bool = False) -> str | tuple[str, ...]:
        """A regular expression, or names."""
        value = self.raw.get(key)
        if isinstance(value, str) and value and len(value) <= _LONGEST:
            return "all-linear" if key == "target_modules" and value.lower() == "all-linear" else value
        if isinstance(value, list) and all(isinstance(t, str) for t in value) and (value or not needed):
            return tuple(value)
        if value or needed:
            raise self.wrong(key, "a list of names of projections, a regular expression or all-linear")
        return ()

    def layers(self) -> tuple[int, ...]:
        key = "layers_to_transform"
        value = self.raw.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int for v in values):
            raise self.wrong(key, "a list of the indices of layers")
        if values and isinstance(self.raw.get("target_modules"), str):
            raise UserError(f"{key} cannot restrict a regular expression or all-linear", "peft refuses it", self.path)
        return tuple(values)

    def layers_patterns(self) -> tuple[str, ...]:
        key = "layers_pattern"
        value = self.raw.get(key)
        values = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(v, str) and len(v) <= _LONGEST for v in values):
            raise self.wrong(key, "the name of a list of layers")
        if values and self.raw.get("layers_to_transform") is None:
            raise UserError(f"{key} needs layers_to_transform", "peft refuses one without the other", self.path)
        return tuple(values)

    def pattern(self, key: str, whole: bool) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict) or any(len(name) > _LONGEST for name in value):
            raise self.wrong(key, "an object of names and numbers")
        where = f"{self.path}: {key}"
        return {name: take_number(dict(value), where, name, whole=whole, signed=not whole) for name in value}


def matrix_name(name: str) -> str:
    """A tensor's name as in the decoder (`layers.0.self_attn.q_proj.lora_A`), whoever wrote it; "" for another one."""
    found = _TENSOR.fullmatch(_WRAPPER.sub("", name))
    return found[1] if found else ""


def adapter_matrices(
    folder: Path, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, I) and B (O, r) by the name of the projection, float32 or better; their factor is `config.scale`. `shapes`:
    (O, I) of all projections. Raises UserError unless the tensors are exactly those that the configuration names."""
    path = Path(folder) / WEIGHTS
    if not path.exists():
        pickled = path.with_suffix(".bin").exists()
        has = "its tensors in adapter_model.bin, which is pickled and is not loaded" if pickled else f"no {WEIGHTS}"
        known = "it" if pickled else "an adapter_model.bin, which is pickled and never fetched,"
        raise UserError(f"{folder} has {has}", f"load {known} with peft and save it again, as {WEIGHTS}")
    places, wanted = config.places(shapes), dict[str, tuple[int, int]]()
    for name, (rank, _) in places.items():
        rows, columns = shapes[name]
        wanted |= {f"{name}.lora_A": (rank, columns), f"{name}.lora_B": (rows, rank)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_safetensors(path):
        if (key := matrix_name(name)) not in wanted:
            remedy = _OTHER if ".lora_A" in name or ".lora_B" in name else f"it is no A or B of a projection: {_MERGE}"
            raise UserError(f"tensor {name!r} has no place in this model", remedy, path)
        if wanted[key] != tuple(tensor.shape):
            raise UserError(f"{name} has shape {list(tensor.shape)}, the model needs {list(wanted[key])}", _OTHER, path)
        if key in tensors:
            raise UserError(f"{key} is there twice, also as {name!r}", "save one adapter alone", path)
        check_floating(name, tensor.dtype, path)
        tensors[key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if missing := sorted(wanted.keys() - tensors.keys()):
        cause = f"the adapter lacks {len(missing)} tensors that {CONFIG} names, the first is {missing[0]}"
        raise UserError(cause, "fetch or save both files again", path)
    matrices = {}
    for name, (_, scale) in places.items():
        b_Or = tensors[f"{name}.lora_B"]
        # One factor for all projections, or the sampler's and the decoder's products of a group would need several.
        matrices[name] = tensors[f"{name}.lora_A"], b_Or if scale == config.scale else b_Or * (scale / config.scale)
    return matrices
