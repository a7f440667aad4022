"""Which files of a model folder hold its weights: the one place that says so, for reading and for fingerprints.

They are `model.safetensors`, the files that `model.safetensors.index.json` names, or, without an index, the shards
`model-*.safetensors`. An adapter, an optimizer's state or another tool's copy (`consolidated.safetensors`) is not
weights of the model. Two sets of weights in one folder are an error: nobody can tell which is the model.
"""

import re
from contextlib import suppress
from pathlib import Path

from ptst.errors import UserError
from ptst.reading import check_regular, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
# The other files of a model: what travels with every fetch and copy. `[!.]`: no half-written file of ours.
SETTINGS = ("[!.]*.json", "tokenizer.model", "merges.txt", "*.jinja", "additional_chat_templates/*.jinja")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder, in order of their names. Raises UserError where there are none, and as
    `find_weight_files`."""
    files = find_weight_files(folder)
    if not files:
        others = sorted(path.name for kind in ("safetensors", "bin", "gguf") for path in folder.glob(f"*.{kind}"))
        only = f" (only {', '.join(others[:5])})" if others else ""
        raise UserError(f"{folder} has no {SINGLE}{only}", _way_out(others))
    return files


def _way_out(others: list[str]) -> str:
    """What to do about a folder that has only other files of weights."""
    if any(name.endswith(".gguf") for name in others):
        return "use the model's folder of before its conversion to GGUF"
    if any(name.endswith(".bin") for name in others):
        return "they are pickled and not loaded: load them with transformers, and save them with save_pretrained"
    if any(name.startswith("consolidated") for name in others):
        return "fetch the weights in Hugging Face's layout"
    return f"rename the model's to {SINGLE}" if others else "fetch the model again"


def find_weight_files(folder: Path) -> list[Path]:
    """As `weight_files`, none where there are none. Raises UserError where files are missing, for an index that is
    damaged or names files elsewhere, and for two sets of weights."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_symlink() and not index.exists():
        raise UserError("is a link to a file that is not there", "fetch the model again", index)
    if index.exists():
        files = sorted({folder / name for name in weight_map(index).values()})
        if not files:
            raise UserError("weight_map names no file", "fetch the file again", index)
        for path in files:
            with suppress(FileNotFoundError):
                check_regular(path)
                continue
            raise UserError(f"{path.name}, which {INDEX} names, is missing", "fetch the model again", folder)
        if single.exists() and single not in files:
            cause = f"there are two sets of weights: {SINGLE}, and the files of {INDEX}"
            raise UserError(cause, "remove the one that is not the model's", folder)
        return files
    if single.exists():
        return [single]
    if single.is_symlink():
        raise UserError("is a link to a file that is not there", "fetch the model again", single)
    shards = {path: found for path in folder.glob("model*.safetensors") if (found := _SHARD.fullmatch(path.name))}
    if not shards:
        return []
    totals = sorted({int(found[2]) for found in shards.values()})
    if len(totals) > 1:
        cause = f"there are two sets of weights: of {' and of '.join(map(str, totals))} files"
        raise UserError(cause, "remove the one that is not the model's", folder)
    if {int(found[1]) for found in shards.values()} != {*range(1, totals[0] + 1)}:
        raise UserError(f"{len(shards)} of {totals[0]} files of weights are there", "fetch the model again", folder)
    return sorted(shards)


def other_files(folder: Path, files: list[Path]) -> list[str]:
    """Names of the folder's other safetensors files, which are not read with the model."""
    return sorted(path.name for path in folder.glob("*.safetensors") if path not in files)


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises UserError if the index does not say so, or names files elsewhere."""
    value = read_json(index)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError("weight_map is not an object of file names", "fetch the file again", index)
    for name in names.values():
        if not name or "\0" in name or Path(name).name != name:
            cause = f"weight_map names {name!r}, which is no file in the folder of the index itself"
            raise UserError(cause, "fetch the index and all shards of one model into one folder", index)
    return names
