"""The adapter of a run, of one of its checkpoints, or of somebody else, read once for merging and for writing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ptst.config_file import read_config
from ptst.exporting.base_name import BaseName
from ptst.model.adapter_files import CONFIG, WEIGHTS, adapter_matrices, matrix_name, read_lora_config
from ptst.model.config import read_json
from ptst.model.decoder import Decoder
from ptst.model.lora import describe_adapter, target_weights, write_adapter
from ptst.model.weights import read_safetensors
from ptst.open import OpenModel, run_folder
from ptst.records import FILE
from ptst.training.checkpoint import check_whole, kept_names
from ptst.training.config import TrainConfig


@dataclass(frozen=True)
class Adapter:
    """`matrices`: A (r, I) and B (O, r) by the name of the projection, with the factor `scale` of all of them.
    `tensors`: the same as they are stored, by their names in the decoder. `described`: adapter_config.json."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    tensors: Mapping[str, Tensor]
    described: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest of all projections."""
        return max(len(a_rI) for a_rI, _ in self.matrices.values())

    def write(self, folder: Path, base: BaseName) -> None:
        """Write it in PEFT's layout with `base` as its base model, under the names that peft writes."""
        write_adapter(folder, self.tensors, {**self.described, **base.in_adapter_config()})


def read_adapter(model: OpenModel, decoder: Decoder) -> Adapter | None:
    """The adapter of a model that was opened with one, None where there is none. `decoder`: the base's, for its shapes.
    Raises UserError for files that are damaged or do not fit."""
    if model.checkpoint is not None and model.is_state:
        return None if model.run is None or model.run.full else adapter_of_checkpoint(model.checkpoint)
    folder = model.adapter or (model.checkpoint if model.run and not model.run.full else None)
    return None if folder is None else adapter_of_folder(folder, decoder)


def adapter_of_folder(folder: Path, decoder: Decoder) -> Adapter:
    """The adapter in PEFT's layout in a folder, a run's or anybody's. Raises UserError as `read_adapter`."""
    config = read_lora_config(folder)
    matrices = adapter_matrices(folder, config, {name: tuple(w.shape) for name, w in target_weights(decoder).items()})
    tensors = {matrix_name(name): tensor for name, tensor in read_safetensors(folder / WEIGHTS)}
    return Adapter(matrices, config.scale, tensors, read_json(folder / CONFIG))


def adapter_of_checkpoint(checkpoint: Path) -> Adapter:
    """The adapter of RUN/state/step-00000050, with the settings of the run: its average, where the run has
    one. Raises UserError for a damaged one."""
    check_whole(checkpoint)
    config = read_config(run_folder(checkpoint) / FILE, TrainConfig(), "train").lora
    assert config is not None, "a full run has no adapter"
    saved = dict(read_safetensors(checkpoint / "weights.safetensors"))
    tensors = {name: saved[stored] for name, stored in kept_names(saved).items()}
    names = {name.rpartition(".")[0] for name in tensors}
    matrices = {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}
    return Adapter(matrices, config.scale, tensors, describe_adapter(config, ""))
