"""A defended model on disk: a model folder, or an adapter over the aligned model, whole or absent, with its record."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ptst import records
from ptst.defend_record import DefendRecord
from ptst.defenses.command_config import DefendConfig
from ptst.defenses.compose import Composition, checked, compose, defended_tensors
from ptst.errors import Setting, UserError
from ptst.exporting.folder import check_out, copy_small_files, new_folder, update_config
from ptst.exporting.merge import in_order_of_the_hub
from ptst.exporting.shards import write_weights
from ptst.fingerprints import weights_fingerprint
from ptst.hub.locate import locate_model
from ptst.model.lora import write_adapter
from ptst.model.read_in_place import StoredTensor
from ptst.model.weights import DTYPES, hf_name, pick_device
from ptst.open import find_run
from ptst.progress import say
from ptst.records import TrainRecord


def defend_model(config: DefendConfig) -> DefendRecord:
    """Write the folder that `config` asks for; returns its record. Raises UserError for a user's mistakes, before
    anything is written where that can be known; `out` is then as it was."""
    config.check()
    assert config.out is not None
    check_out(config.out)
    composition = open_composition(config)
    say(f"{composition.name} of {composition.tuned.name}, tuned from {composition.aligned.name}")
    return (_write_adapter if config.adapter_only else _write_weights)(config, config.out, composition)


def open_composition(config: DefendConfig) -> Composition:
    """What is to be computed. Raises UserError as `compose`."""
    assert config.defense is not None
    device = pick_device()
    if config.model is not None:
        aligned = config.model, locate_model(config.model)
        return compose(config.defense, config, aligned, config.tuned or "", device, "tuned")
    checkpoint, run = find_run(config.checkpoint, None)
    assert checkpoint is not None and run is not None
    return compose(config.defense, config, base_of(run), checkpoint, device)


def base_of(run: TrainRecord) -> tuple[str, Path]:
    """Name and folder of the model that a run has tuned. Raises UserError where it is no more."""
    folder = Path(run.model_folder)
    return run.model, folder if (folder / "config.json").exists() else locate_model(run.model)


@dataclass(frozen=True)
class DefendedWeights:
    """The weights to write, each computed when it is asked for. `dtypes`: of each, by parameter, in the order in which
    they are written."""

    composition: Composition
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, composition: Composition, dtype: str | None) -> "DefendedWeights":
        """With the types of the tuned model's files; the float32 masters of a checkpoint get the type of the run."""
        tuned = composition.tuned
        if dtype is None and tuned.run is not None and tuned.run.full and tuned.own != tuned.settings:
            dtype = tuned.run.dtype
        stored: Mapping[str, StoredTensor] = in_order_of_the_hub(tuned.stored)
        return cls(composition, {key: DTYPES[dtype] if dtype else each.dtype for key, each in stored.items()})

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, by its name in the files."""
        stored = self.composition.tuned.stored
        return {hf_name(key): stored[key].numel * dtype.itemsize for key, dtype in self.dtypes.items()}

    @property
    def num_parameters(self) -> int:
        return sum(each.numel for each in self.composition.tuned.stored.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """The type of most of the tensors."""
        found = [*self.dtypes.values()]
        return max(dict.fromkeys(found), key=found.count)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these names in the files. Raises UserError for values that their type cannot hold."""
        keys = [key for key in self.dtypes if hf_name(key) in names]
        for key, tensor in defended_tensors(self.composition, keys):
            yield hf_name(key), checked(key, tensor, self.dtypes[key], self.composition).cpu()


def _write_weights(config: DefendConfig, out: Path, composition: Composition) -> DefendRecord:
    weights = DefendedWeights.of(composition, config.dtype)
    say(composition.told)  # compares updates, where the defence does
    with new_folder(out, sum(weights.sizes.values())) as folder:
        say(f"writing {weights.num_parameters:,} parameters to {out}")
        write_weights(folder, weights, config.shard_bytes)
        copy_small_files(composition.tuned.settings, folder, None)
        update_config(folder, weights.main_dtype, always=config.dtype is not None, keep_name=False)
        return _record(config, composition, folder)


def _write_adapter(config: DefendConfig, out: Path, composition: Composition) -> DefendRecord:
    adapter = composition.tuned.adapter
    if adapter is None:
        cause = f"{composition.tuned.name} has all weights and is no adapter"
        raise UserError(cause, ("leave out ", Setting("adapter_only")))
    say(composition.told)
    with torch.no_grad():
        tensors = {name: composition.adapter_tensor(name, tensor) for name, tensor in adapter.tensors.items()}
    with new_folder(out, sum(tensor.nbytes for tensor in tensors.values())) as folder:
        write_adapter(folder, tensors, adapter.described)
        return _record(config, composition, folder)


def _record(config: DefendConfig, composition: Composition, folder: Path) -> DefendRecord:
    """Write the record, after everything else in the folder."""
    made, run = composition.to_json(), composition.tuned.run
    record = DefendRecord(
        config=config,
        environment=records.environment(),
        defense=composition.name,
        own_settings=made["settings"],
        made_of=made["made_of"],
        fingerprint=made["fingerprint"],
        changed=made.get("changed"),
        cosines=made.get("cosines"),
        training={"template": run.template.name, "family": run.family.name} if run else None,
        weights=weights_fingerprint(folder),
    )
    record = replace(record, status="finished")
    record.write(folder)
    return record
