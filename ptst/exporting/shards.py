"""Weights in files as the hub has them: one, or shards with an index.

Which tensor is in which file is decided by the hub's own library, so that an export and `save_pretrained` agree. One
shard is in memory at a time.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ptst.model.weights import save_safetensors
from ptst.progress import ProgressLine
from ptst.storage import write_atomically
from ptst.weight_files import INDEX


class ComputedWeights(Protocol):
    """Weights whose values are computed when they are asked for, as `MergedWeights`."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def num_parameters(self) -> int: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]: ...


def plan_shards(weights: ComputedWeights, shard_bytes: int) -> dict[str, list[str]]:
    """The names of the tensors of each file; a tensor that is larger than `shard_bytes` has a file of its own."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(weights.sizes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    return split.filename_to_tensors


def write_weights(folder: Path, weights: ComputedWeights, shard_bytes: int) -> list[str]:
    """Write the files and, where there are several, their index; returns their names. Raises UserError as
    their `read`, OSError when the disk is full."""
    files = plan_shards(weights, shard_bytes)
    done = 0
    with ProgressLine("writing", weights.num_parameters) as progress:
        for file, names in files.items():
            tensors = {}
            for name, tensor in weights.read(names):
                tensors[name] = tensor
                done += tensor.numel()
                progress.update(done)
            save_safetensors(folder / file, {name: tensors[name] for name in names})
            del tensors
    if len(files) == 1:
        return [*files]
    metadata = {"total_parameters": weights.num_parameters, "total_size": sum(weights.sizes.values())}
    places = {name: file for file, names in files.items() for name in names}
    index = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
    write_atomically(folder / INDEX, f"{index}\n".encode())
    return [*files, INDEX]
