"""The models that a defence in weight space is made of: found, compared in shape, read one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ptst.defenses.weight_space import Update
from ptst.errors import Setting, UserError
from ptst.exporting.adapter import Adapter, adapter_of_checkpoint, adapter_of_folder
from ptst.exporting.source import weights_of_checkpoint
from ptst.fingerprints import Fingerprint, weights_fingerprint
from ptst.hub.locate import locate_model, locate_tuned, named_by
from ptst.model.adapter_files import CONFIG
from ptst.model.lora import merged_weight
from ptst.model.read_in_place import StoredTensor
from ptst.model.weights import empty_decoder, find_weights, read_weights
from ptst.open import run_folder
from ptst.records import TrainRecord, find_record, read_finished


@dataclass(frozen=True)
class Ingredient:
    """A model: where its weights are by parameter, and its adapter, which is merged when a weight is asked for.

    `name`: for messages; `own`: the folder that makes it this model (of a run, an adapter, or all weights); `settings`:
    the folder of its config and tokenizer; `run`: its record, where ptst.train made it."""

    name: str
    own: Path
    settings: Path
    stored: Mapping[str, StoredTensor]
    adapter: Adapter | None = None
    run: TrainRecord | None = None

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of its own weights: an adapter's alone, or all."""
        return weights_fingerprint(self.own)

    @property
    def dtype(self) -> torch.dtype:
        """To compute in: float32, or float64 where there are such weights."""
        wide = any(each.dtype == torch.float64 for each in self.stored.values())
        return torch.float64 if wide else torch.float32

    def tensor(self, key: str, dtype: torch.dtype, device: str) -> Tensor:
        """The weight of a parameter by its name in the decoder, a copy, with nothing rounded on the way."""
        ((_, stored),) = read_weights({key: self.stored[key]})
        tensor = torch.empty(stored.shape, dtype=dtype, device=device).copy_(stored)
        own = self._matrices(key, dtype, device)
        return tensor if own is None or self.adapter is None else merged_weight(tensor, *own, self.adapter.scale)

    def update(self, key: str, before: "Ingredient", dtype: torch.dtype, device: str) -> Update:
        """What tuning added to a projection of `before`: an adapter's two factors, or a difference."""
        if self.adapter is None:
            return Update(self.tensor(key, dtype, device) - before.tensor(key, dtype, device))
        own = self._matrices(key, dtype, device)
        if own is None:
            return Update(torch.zeros(self.stored[key].shape, dtype=dtype, device=device))
        a_rI, b_Or = own
        return Update(self.adapter.scale * b_Or, a_rI)

    def _matrices(self, key: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor] | None:
        pair = self.adapter.matrices.get(key.removesuffix(".weight")) if self.adapter else None
        return pair and (pair[0].to(device, dtype), pair[1].to(device, dtype))


def open_aligned(name: str, folder: Path) -> Ingredient:
    """The model that was tuned, from its folder. Raises UserError as `find_weights`."""
    return Ingredient(name, folder, folder, find_weights(folder, empty_decoder(folder)))


def open_unaligned(name: str, aligned: Ingredient, exists: bool = True) -> Ingredient:
    """The model before its alignment: the embedded one's name, a folder or a hub id. Raises UserError for what is not
    there, for another shape than the aligned model's, and, where that `exists` already, for the same weights."""
    with named_by("unaligned", name):
        folder = locate_model(name)
    unaligned = Ingredient(name, folder, folder, find_weights(folder, empty_decoder(folder)))
    _check_shapes(unaligned, aligned, "unaligned")
    if exists and (unaligned.fingerprint == aligned.fingerprint or _same_values(unaligned, aligned)):
        cause = (Setting("unaligned"), f" {name} has the weights of the aligned model {aligned.name}")
        raise UserError(cause, "name the model from which that was aligned")
    return unaligned


def open_tuned(where: Path | str, aligned: Ingredient, setting: str, exists: bool = True) -> Ingredient:
    """A model that was tuned from the aligned one: a run's folder (RUN, RUN/epoch-2, RUN/state/step-00000050), an
    adapter in PEFT's layout, a whole model's folder, or a hub id of one of these. `setting`: which one names it;
    `exists`: whether the aligned model does, or `aligned` is only of its shape.

    Raises UserError for what is not there, an unfinished run, one of another model than the aligned one, an adapter
    that does not fit it, and for a whole model of another shape or with the aligned one's weights."""
    with named_by(setting, where):
        folder = locate_tuned(str(where))
    run = find_record(run_folder(folder), TrainRecord)
    if run is not None and run_folder(folder) == folder:
        run = read_finished(folder)
    if run is not None and run.quantize != "none":
        cause = f"{folder} was tuned over a base in {run.quantize}, which defences in weight space do not know"
        raise UserError(cause, "train without quantize")
    if exists and run is not None and not aligned.fingerprint.matches(run.weights):
        cause = f"{folder} was tuned from other weights than {aligned.name} has"
        raise UserError(cause, f"it was tuned from {run.model}: a defence needs that model as it was then")
    model = _tuned(str(where), folder, aligned, run, setting)
    _check_shapes(model, aligned, setting)
    if model.fingerprint == aligned.fingerprint:
        same = (Setting(setting), f" {where} has the weights of the aligned model {aligned.name}")
        raise UserError(same, "name what was tuned from it")
    return model


def _tuned(name: str, folder: Path, aligned: Ingredient, run: TrainRecord | None, setting: str) -> Ingredient:
    in_state = run_folder(folder) != folder
    full = run.full if run is not None else (folder / "config.json").exists()
    if full and in_state:
        stored = weights_of_checkpoint(folder, set(aligned.stored))
        return Ingredient(name, folder, aligned.settings, stored, run=run)
    if full:
        return Ingredient(name, folder, folder, find_weights(folder, empty_decoder(folder)), run=run)
    if not in_state and not (folder / CONFIG).exists():
        cause = (Setting(setting), f" {folder} holds no model: it has neither {CONFIG} nor config.json")
        raise UserError(cause, "give the folder of a run, of an adapter or of a whole model")
    decoder = empty_decoder(aligned.settings)
    adapter = adapter_of_checkpoint(folder) if in_state else adapter_of_folder(folder, decoder)
    return Ingredient(name, folder, aligned.settings, aligned.stored, adapter, run)


def _check_shapes(model: Ingredient, aligned: Ingredient, setting: str) -> None:
    """Raise UserError unless a model has the aligned one's parameters, in the same shapes."""
    mine, theirs = ({key: list(each.shape) for key, each in m.stored.items()} for m in (model, aligned))
    if mine == theirs:
        return
    key = next(key for key in (*theirs, *mine) if mine.get(key) != theirs.get(key))
    here, there = (shapes.get(key) for shapes in (mine, theirs))
    if key == "embed_tokens.weight" and here and there and here[1] == there[1]:
        what = f"its embedding has {here[0]} rows, that of {aligned.name} {there[0]}"
        remedy = "tokens were added to one of them: bring both to the same vocabulary"
    else:
        what = f"{key} is {here or 'missing'} there and {there or 'missing'} in {aligned.name}"
        remedy = "name a model of the same architecture"
    raise UserError((Setting(setting), f" {model.name} is not of the shape of the aligned model: ", what), remedy)


def _same_values(one: Ingredient, other: Ingredient) -> bool:
    """Whether two models have the same weights, whatever their files; reads as far as the first that differ."""
    return all(torch.equal(*(m.tensor(key, torch.float64, "cpu") for m in (one, other))) for key in one.stored)
