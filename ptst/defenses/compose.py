"""A defence in weight space put together: from models on disk to weights, one tensor at a time.

`compose` finds and checks the models; nothing is computed yet. `load_defended` makes a decoder in memory, so that a
grid needs no file of weights for a defence; `ptst/defenses/write.py` writes a model folder. All is computed in float32
(float64 where there are such weights) and rounded once. Besides what is made, a few tensors of one layer are in memory.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
import xxhash
from torch import Tensor

from ptst.defense_names import WEIGHT_SPACE
from ptst.defenses.config import NEEDS, OWN, WeightSpaceSettings
from ptst.defenses.models import Ingredient, open_aligned, open_tuned, open_unaligned
from ptst.defenses.weight_space import (
    Projected,
    add_safety_vector,
    drop_and_rescale,
    interpolate,
    merge_updates,
    project,
    projected,
)
from ptst.errors import Setting, UserError, unknown_name
from ptst.fingerprints import combined
from ptst.model.config import TARGETS
from ptst.model.decoder import Decoder
from ptst.model.weights import empty_decoder, hf_name
from ptst.progress import ProgressLine

_VERSION = 1  # of what is computed: raise it where the same settings give other weights


@dataclass(frozen=True)
class Composition:
    """A defended model that is not computed yet: the defence, its settings, and the models that it is made of."""

    name: str
    settings: WeightSpaceSettings
    aligned: Ingredient
    tuned: Ingredient
    unaligned: Ingredient | None = None
    safe: Ingredient | None = None
    device: str = "cpu"

    @property
    def ingredients(self) -> dict[str, Ingredient]:
        """The models by their part."""
        parts = {"aligned": self.aligned, "tuned": self.tuned, "unaligned": self.unaligned, "safe_model": self.safe}
        return {part: model for part, model in parts.items() if model is not None}

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings that this defence reads."""
        names = OWN[self.name]
        values = {name: getattr(self.settings, name) for name in names}
        return values if values.get("drop") else {k: v for k, v in values.items() if k not in ("drop", "drop_seed")}

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that the weights follow from: the defence, its settings and the weights of each model."""
        parts = [f"{part}={model.fingerprint}" for part, model in self.ingredients.items()]
        settings = [f"{name}={value!r}" for name, value in self.own_settings.items()]
        return combined(f"{self.name}.{_VERSION}", *settings, *parts)

    @property
    def dtype(self) -> torch.dtype:
        """In which all is computed."""
        wide = any(model.dtype == torch.float64 for model in self.ingredients.values())
        return torch.float64 if wide else torch.float32

    @cached_property
    def compared(self) -> dict[str, tuple[float | None, float | None]]:
        """safe-lora, safe-merge: cosine and size of every projection's update after C (`weight_space.Projected`).
        Raises UserError where a cosine is not finite."""
        assert self.name in ("safe-lora", "safe-merge")
        keys = [key for key in self.tuned.stored if _is_projection(key)]
        found = {}
        with torch.no_grad(), ProgressLine("comparing updates", len(keys)) as progress:
            for key in keys:
                after = self._projected(key)
                if not math.isfinite(after.cosine or 0.0):
                    cause = f"{self.name}: the cosine of {hf_name(key)} is {after.cosine}"
                    raise UserError(cause, "look at the models it was made of")
                found[key] = after.cosine, after.size
                progress.update(len(found))
        return found

    @property
    def cosines(self) -> dict[str, float | None]:
        """safe-lora, safe-merge: the cosine of every projection; None where there is nothing to compare."""
        return {key: cosine for key, (cosine, _) in self.compared.items()}

    @cached_property
    def changed(self) -> frozenset[str]:
        """safe-lora, safe-merge: the projections whose update is replaced: those with a cosine below the threshold, or
        the `num_projected` with the smallest."""
        found = {key: cosine for key, cosine in self.cosines.items() if cosine is not None}
        number = self.settings.num_projected
        if number is not None:
            return frozenset(sorted(found, key=found.__getitem__)[:number])
        return frozenset(key for key, cosine in found.items() if cosine < self.settings.threshold)

    def tensor(self, key: str) -> Tensor:
        """The defended weight of a parameter, by its name in the decoder, in `dtype`."""
        if self.name == "wise-ft":
            return interpolate(self._read(self.aligned, key), self._read(self.tuned, key), self.settings.alpha)
        if self.name == "resta":
            return self._with_safety_vector(key)
        if key not in self.changed:
            return self._read(self.tuned, key)
        if self.safe is not None:
            tuned, safe = (m.update(key, self.aligned, self.dtype, self.device).dense for m in (self.tuned, self.safe))
            return self._read(self.aligned, key) + merge_updates(tuned, safe, self.settings.safe_share)
        return self._read(self.aligned, key) + self._projected(key).update.dense

    def adapter_tensor(self, name: str, stored: Tensor) -> Tensor:
        """wise-ft, safe-lora of an adapter: one of its matrices (`layers.0.self_attn.q_proj.lora_B`) as it is stored,
        after the defence. Both act on B alone, and on it alike, whatever its factor."""
        module, _, part = name.rpartition(".")
        if part != "lora_B":
            return stored.clone()
        b_Or = stored.to(self.device, self.dtype)
        if self.name == "wise-ft":
            b_Or = self.settings.alpha * b_Or
        elif f"{module}.weight" in self.changed:
            b_Or = project(b_Or, self._direction(f"{module}.weight"), self.settings.projection)
        return b_Or.to("cpu", stored.dtype)

    def _with_safety_vector(self, key: str) -> Tensor:
        assert self.unaligned is not None
        tuned, aligned, unaligned = (self._read(m, key) for m in (self.tuned, self.aligned, self.unaligned))
        drop = None
        if self.settings.drop:
            # A seed for each tensor, so that what is dropped does not depend on the order in which they are asked for.
            seed = xxhash.xxh3_64_intdigest(f"{self.settings.drop_seed}.{key}".encode()) >> 1
            generator = torch.Generator().manual_seed(seed)
            drop = drop_and_rescale(tuned - aligned, self.settings.drop, generator)
        return add_safety_vector(tuned, aligned, unaligned, self.settings.scale, drop)

    def _projected(self, key: str) -> Projected:
        update = self.tuned.update(key, self.aligned, self.dtype, self.device)
        return projected(update, self._direction(key), self.settings.projection)

    def _direction(self, key: str) -> Tensor:
        """V, what the alignment added."""
        assert self.unaligned is not None
        return self._read(self.aligned, key) - self._read(self.unaligned, key)

    def _read(self, model: Ingredient, key: str) -> Tensor:
        return model.tensor(key, self.dtype, self.device)

    def to_json(self) -> dict[str, Any]:
        """What a record has of it, once it is computed."""
        made = {part: {"name": m.name, "weights": m.fingerprint} for part, m in self.ingredients.items()}
        own = {"defense": self.name, "settings": self.own_settings, "made_of": made, "fingerprint": self.fingerprint}
        if self.name in ("safe-lora", "safe-merge"):
            own |= {"changed": sorted(self.changed), "cosines": self.cosines}
        return own

    @property
    def told(self) -> str:
        """What was done, in words."""
        settings = ", ".join(f"{name} {value}" for name, value in self.own_settings.items() if value is not None)
        told = f"{self.name} ({settings})"
        if self.name in ("safe-lora", "safe-merge"):
            sizes = [size for _, size in self.compared.values() if size is not None]
            told += f": {len(self.changed)} of {len(sizes)} updates changed"
            if sizes and self.name == "safe-lora":
                told += f"; projected, they have {median(sizes):.2g} of their length (median of all)"
        return told


def compose(
    name: str,
    settings: WeightSpaceSettings,
    aligned: tuple[str, Path],
    tuned: Path | str,
    device: str = "cpu",
    tuned_setting: str = "checkpoint",
) -> Composition:
    """Find and check what a defence is made of. `aligned`: the name and folder of the model that was tuned; `tuned`: a
    run's folder, an adapter or a whole model (`open_tuned`), which `tuned_setting` names.

    Raises UserError for an unknown defence, for settings that make no sense, and for models that are missing, damaged,
    of another shape, not tuned from the aligned one, or the same twice."""
    base = open_aligned(*aligned)
    unaligned, safe = open_others(name, settings, base)
    own = open_tuned(tuned, base, tuned_setting)
    if safe is not None and safe.fingerprint == own.fingerprint:
        cause = (Setting("safe_model"), f" {settings.safe_model} has the weights of the tuned model {own.name}")
        raise UserError(cause, "name the aligned model tuned on safety data")
    return Composition(name, settings, base, own, unaligned, safe, device)


def open_others(
    name: str, settings: WeightSpaceSettings, aligned: Ingredient, exists: bool = True
) -> tuple[Ingredient | None, Ingredient | None]:
    """The unaligned and the safe model, where a defence needs them: a grid checks both before it trains anything.
    `exists`: whether the aligned model does; until then `aligned` is the model before its alignment. Raises UserError
    as `compose`."""
    if name not in WEIGHT_SPACE:
        raise unknown_name("defense in weight space", name, WEIGHT_SPACE)
    settings.check_weight_space((name,))
    needs = NEEDS.get(name, ())
    unaligned = open_unaligned(settings.unaligned or "", aligned, exists) if "unaligned" in needs else None
    safe = open_tuned(settings.safe_model or "", aligned, "safe_model", exists) if "safe_model" in needs else None
    return unaligned, safe


def load_defended(composition: Composition, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """The decoder of a defended model, frozen, computed tensor by tensor. Raises UserError for weights that are
    damaged, or that `dtype` cannot hold."""
    decoder = empty_decoder(composition.tuned.settings)
    modules = dict(decoder.named_modules())
    for key, tensor in defended_tensors(composition, composition.tuned.stored):
        owner, _, leaf = key.rpartition(".")
        value = checked(key, tensor, dtype, composition).to(device)
        setattr(modules[owner], leaf, torch.nn.Parameter(value, requires_grad=False))
    return decoder.eval()


def defended_tensors(composition: Composition, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(parameter, weight) one after another."""
    with torch.no_grad():
        for key in keys:
            yield key, composition.tensor(key)


def checked(key: str, tensor: Tensor, dtype: torch.dtype, composition: Composition) -> Tensor:
    """The weight in the type that it is kept in. Raises UserError where that cannot hold its values."""
    kept = tensor.to(dtype)
    if not torch.isfinite(kept).all():
        held = bool(torch.isfinite(tensor).all())
        what = f"has values that {str(dtype).removeprefix('torch.')} cannot hold" if held else "is not finite"
        remedy = ("give ", Setting("dtype"), " bfloat16 or float32") if held else "look at the models it was made of"
        raise UserError(f"{composition.name}: {hf_name(key)} {what}", remedy)
    return kept


def _is_projection(key: str) -> bool:
    """Whether a parameter is the matrix of a projection of a layer, as LoRA adapts."""
    module, _, leaf = key.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in TARGETS
