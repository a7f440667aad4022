"""Weights of Hugging Face folders, read and written. safetensors only; nothing is unpickled.

Tensors are read one at a time into place, at the requested dtype: a second copy of the model never exists in memory.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptst.errors import Setting, UserError
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.progress import say_once
from ptst.reading import check_regular, open_regular, refuse_pointer
from ptst.storage import atomic_path
from ptst.weight_files import SETTINGS, SINGLE, other_files, weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of that name. `auto` is bfloat16 on a GPU and float32 on a CPU, where torch's bfloat16 products are
    several times slower than float32 without AVX-512 or AMX."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[name]


_TWICE = "remove the file or the tensor that is not the model's"
_BOTH = "fetch the weights and config.json of one model"
_UNQUANTIZED = "use the folder of the unquantized model"
# Parts of the names of a quantized projection's tensors: of GPTQ and AWQ, bitsandbytes, compressed tensors and others.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_\w+|nested_\w+|\w+_scale(_inv)?|\w+_packed)\b"
)
_WRAPPED = re.compile(r"(_orig_mod|module|base_model|_fsdp_wrapped_module)\.")
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
    seen: dict[str, Path] = {}
    head: tuple[Path, Tensor] | None = None  # one that should be the embedding
    for name, where, tensor in _tensors(folder):
        key = name.removeprefix("model.")
        if key.endswith(_RECOMPUTED):
            continue
        if key in seen:
            others = seen[key].name if seen[key] != where else "the same file"
            raise UserError(f"tensor {name!r} comes twice, here and in {others}", _TWICE, where)
        seen[key] = where
        if key == "lm_head.weight" and config.tie_embeddings:
            head = where, tensor
            continue
        if key not in missing:
            raise UserError(f"tensor {name!r} has no place in this architecture", _way_out(name), where)
        _place(modules, key, tensor, where, dtype, device)
        missing.discard(key)
    if head is not None and "embed_tokens.weight" in missing:  # of the two, some tools save the head
        _place(modules, "embed_tokens.weight", head[1], head[0], dtype, device)
        missing.discard("embed_tokens.weight")
    if missing:
        first = hf_name(min(missing))
        raise UserError(f"the weights lack {len(missing)} tensors, the first is {first}", _BOTH, folder)
    if head is not None and not _same(head[1], decoder.embed_tokens.weight):
        cause = "config.json ties the output head to the embedding, but lm_head.weight has other values"
        raise UserError(cause, "set tie_word_embeddings to false to use it, or remove the tensor", head[0])
    return decoder.eval()


def _place(
    modules: Mapping[str, torch.nn.Module], key: str, tensor: Tensor, where: Path, dtype: torch.dtype, device: str
) -> None:
    """Put a tensor of a file into the decoder. Raises UserError where its type or its shape does not fit."""
    name = hf_name(key)
    check_floating(name, tensor, where)
    owner, _, leaf = key.rpartition(".")
    expected = getattr(modules[owner], leaf).shape
    if tensor.shape != expected:
        cause = f"{name} has shape {list(tensor.shape)}, config.json says {list(expected)}"
        raise UserError(cause, _BOTH, where)
    # Copied even at the same dtype: the tensor is a view of the file's pages.
    value = torch.empty(expected, dtype=dtype, device=device).copy_(tensor)
    setattr(modules[owner], leaf, torch.nn.Parameter(value, requires_grad=False))


def _way_out(name: str) -> str:
    """What to do about a tensor that the decoder has not."""
    if _WRAPPED.match(name):
        return "save the model without the wrapper around it, with transformers' save_pretrained"
    return _UNQUANTIZED if _QUANTIZED.search(name) else _BOTH


def _same(tensor: Tensor, loaded: Tensor) -> bool:
    """Whether a tensor of a file has the values of a loaded one, compared in parts to save memory."""
    if tensor.shape != loaded.shape:
        return False
    pairs = zip(tensor.split(4096), loaded.split(4096), strict=True)
    return all(torch.equal(part.to(loaded.dtype), other.cpu()) for part, other in pairs)


def _tensors(folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """(name, file, tensor) of every tensor of the folder, lazily, file by file."""
    files = weight_files(folder)
    if others := other_files(folder, files):
        say_once(f"note: {folder}: not read, as no part of the model: {', '.join(others)}")
    for path in files:
        yield from ((name, path, tensor) for name, tensor in read_safetensors(path))


def check_floating(name: str, tensor: Tensor, where: Path) -> None:
    """Raise UserError for weights that are no real numbers: integers (quantized, say), truth values, complex ones."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        remedy = f"weights must be float32, bfloat16 or float16; if these are quantized, {_UNQUANTIZED}"
        raise UserError(f"{name} is of type {kind}", remedy, where)


MAPPED = 2**27


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file, lazily. Raises UserError if it is missing, damaged or not safetensors.

    A tensor is a view of the file's pages, which count as memory of this process as long as the file is open: it is
    opened anew after every MAPPED bytes."""
    try:
        check_regular(path)
        left: list[str] | None = None
        while left is None or left:
            mapped = 0
            with safe_open(path, framework="pt") as file:
                left = list(file.keys())[::-1] if left is None else left
                while left and mapped < MAPPED:
                    name = left.pop()
                    tensor = file.get_tensor(name)
                    mapped += tensor.nbytes
                    yield name, tensor
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except SafetensorError as error:
        with open_regular(path) as file:
            refuse_pointer(file.read(200), path)
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
    """Write all weights as a Hugging Face folder, with the base's config, tokenizer and chat templates."""
    for path in (path for pattern in SETTINGS for path in base.glob(pattern)):
        # The base may itself be a run, or hold an adapter; their records would declare this folder to be one.
        if not path.name.endswith(".index.json") and path.name not in ("run.json", "adapter_config.json"):
            copied = out / path.relative_to(base)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)
    save_safetensors(out / SINGLE, {hf_name(k): v for k, v in decoder.state_dict().items()})
