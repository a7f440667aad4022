"""Weights of Hugging Face folders, read and written. safetensors only; nothing is unpickled.

Tensors are read one at a time into place, at the requested dtype: a second copy of the model never exists in memory.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptst.errors import Setting, UserError
from ptst.model.config import DecoderConfig, read_json
from ptst.model.decoder import Decoder
from ptst.reading import check_regular
from ptst.storage import atomic_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of that name. `auto` is bfloat16 on a GPU and float32 on a CPU, where torch's bfloat16 products are
    several times slower than float32 without AVX-512 or AMX."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[name]


# Stored by older tools with the weights; it follows from the config.
_RECOMPUTED = ("rotary_emb.inv_freq",)


def load_decoder(folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """The decoder of a Hugging Face folder, frozen (no parameter requires a gradient). Raises UserError if the
    folder, a file or a tensor is missing, damaged, of another shape, or unexpected."""
    folder = Path(folder)
    if not folder.is_dir():
        remedy = ("give ", Setting("model"), " a folder with config.json and *.safetensors")
        raise UserError(f"there is no model folder {folder}", remedy)
    config = DecoderConfig.from_folder(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    missing = set(decoder.state_dict())
    modules = dict(decoder.named_modules())
    for name, where, tensor in _tensors(folder):
        key = name.removeprefix("model.")
        if key.endswith(_RECOMPUTED) or (key == "lm_head.weight" and config.tie_embeddings):
            continue
        if key not in missing:
            raise UserError(f"tensor {name!r} has no place in this architecture", where=where)
        owner, _, leaf = key.rpartition(".")
        expected = getattr(modules[owner], leaf).shape
        if tensor.shape != expected:
            raise UserError(f"{name} has shape {list(tensor.shape)}, config.json says {list(expected)}", where=where)
        check_floating(name, tensor, where)
        # Copied even at the same dtype: the tensor is a view of the file's pages.
        value = torch.empty(expected, dtype=dtype, device=device).copy_(tensor)
        setattr(modules[owner], leaf, torch.nn.Parameter(value, requires_grad=False))
        missing.discard(key)
    if missing:
        raise UserError(f"the weights lack {len(missing)} tensors, the first is {min(missing)}", where=folder)
    return decoder.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """(name, file, tensor) of every tensor of the folder, lazily, file by file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / f for f in _weight_map(index).values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.gguf")))
        cause = f"{folder} has no *.safetensors{f' (only {found})' if found else ''}"
        raise UserError(cause, "convert the weights to safetensors")
    for path in files:
        if path.parent.resolve() != folder.resolve():
            raise UserError(f"{path} is outside of the model folder", where=index)
        yield from ((name, path, tensor) for name, tensor in read_safetensors(path))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises UserError if the index does not say so, or names files elsewhere."""
    value = read_json(index)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError("weight_map is not an object of file names", "fetch the file again", index)
    for name in names.values():
        if "\0" in name or Path(name).name != name:
            raise UserError(f"{index.parent / name} is outside of the model folder", where=index)
    return names


def check_floating(name: str, tensor: Tensor, where: Path) -> None:
    """Raise UserError for weights that are no real numbers: integers (quantized, say), truth values, complex ones."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} is of type {kind}", "weights must be float32, bfloat16 or float16", where)


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file, lazily. Raises UserError if it is missing, damaged or not safetensors."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise UserError(f"truncated or damaged ({error})", "fetch the file again", path) from None


def hf_name(key: str) -> str:
    """The name a decoder parameter has in Hugging Face's files."""
    return key if key.startswith("lm_head.") else f"model.{key}"


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, under the given names."""
    try:
        with atomic_path(path) as partial:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"cannot write {path}: {error}") from None


def save_full(decoder: Decoder, base: Path, out: Path) -> None:
    """Write all weights as a Hugging Face folder, with the base's config, tokenizer and chat template."""
    for path in base.glob("*.json"):
        # The base may itself be a run; its run.json would declare this run finished.
        if not path.name.endswith(".index.json") and not path.name.startswith(".") and path.name != "run.json":
            shutil.copyfile(path, out / path.name)
    for name in ("tokenizer.model", "chat_template.jinja"):
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    save_safetensors(out / "model.safetensors", {hf_name(k): v for k, v in decoder.state_dict().items()})
