"""Weights of Hugging Face folders, read and written. safetensors only; nothing is unpickled.

A decoder's tensors are read into place, at the requested dtype: a second copy of the model never exists in memory.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptst.errors import Setting, UserError
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.quantized import Quantization
from ptst.model.read_in_place import Reader, StoredTensor
from ptst.progress import say_once
from ptst.reading import check_header, check_regular, open_regular, refuse_pointer
from ptst.storage import atomic_path
from ptst.weight_files import INDEX, SETTINGS, SINGLE, other_files, weight_files, weight_map

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of that name. `auto` is bfloat16 on a GPU and float32 on a CPU, where torch's bfloat16 products are
    several times slower than float32 without AVX-512 or AMX."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[name]


def pick_device() -> str:
    """The GPU if there is one, as torch names it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


_TWICE = "remove the file or the tensor that is not the model's"
_BOTH = "fetch the weights and config.json of one model"
_ONE_INDEX = "fetch the index and all shards of one model"
_UNQUANTIZED = "use the folder of the unquantized model"
# Parts of the names of a quantized projection's tensors: of GPTQ and AWQ, bitsandbytes, compressed tensors and others.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_\w+|nested_\w+|\w+_scale(_inv)?|\w+_packed)\b"
)
_WRAPPED = re.compile(r"(_orig_mod|module|base_model|_fsdp_wrapped_module)\.")
# Stored by older tools with the weights; it follows from the config.
_RECOMPUTED = ("rotary_emb.inv_freq",)
_RECORDS = ("run.json", "export.json", "adapter_config.json")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


def load_decoder(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantization: Quantization | None = None,
) -> Decoder:
    """The decoder of a Hugging Face folder, frozen (no parameter requires a gradient). Raises UserError if the
    folder, a file or a tensor is missing, damaged, of another shape, or unexpected, and for `quantization` without its
    library."""
    decoder = empty_decoder(folder)
    modules = dict(decoder.named_modules())
    stored = find_weights(folder, decoder)
    with Reader() as reader:
        for key in reader.in_file_order(stored):
            quantize = quantization if quantization is not None and quantization.applies(key) else None
            value = torch.empty(stored[key].shape, dtype=torch.float32 if quantize else dtype, device=device)
            reader.read(stored[key], value)
            if quantize is not None:
                reader.wait()
                value = quantize(value, dtype)
            owner, _, leaf = key.rpartition(".")
            setattr(modules[owner], leaf, torch.nn.Parameter(value, requires_grad=False))
    return decoder.eval()


def empty_decoder(folder: Path | str) -> Decoder:
    """The decoder of a folder without its weights, on the device `meta`. Raises UserError if there is no such folder,
    or for its config.json."""
    folder = Path(folder)
    if not folder.is_dir():
        remedy = ("give ", Setting("model"), " a folder with config.json and *.safetensors")
        raise UserError(f"there is no model folder {folder}", remedy)
    config = DecoderConfig.from_folder(folder)
    with torch.device("meta"):
        return Decoder(config)


def find_weights(folder: Path | str, decoder: Decoder) -> dict[str, StoredTensor]:
    """Where each parameter of a decoder is in the files of a folder, in the order of the decoder. Reads no values but
    those of a head that should be the embedding. Raises UserError for a file or a tensor that is missing, damaged, of
    another shape or no floating-point type, comes twice, or has no place in the decoder, and for an index that
    disagrees with its shards."""
    folder, expected = Path(folder), decoder.state_dict()
    found: dict[str, StoredTensor] = {}
    head: StoredTensor | None = None  # one that should be the embedding
    file_of: dict[str, str] = {}  # of every tensor
    for name, path, tensor in _tensors(folder):
        key, file_of[name] = name.removeprefix("model."), path.name
        if key.endswith(_RECOMPUTED):
            continue
        stored, before = StoredTensor(name, path, tensor.shape, tensor.dtype), found.get(key)
        if key == _HEAD and decoder.config.tie_embeddings:
            before, head = head, stored
        if before is not None:
            others = before.path.name if before.path != path else "the same file"
            raise UserError(f"tensor {name!r} comes twice, here and in {others}", _TWICE, path)
        if stored is head:
            continue
        if key not in expected:
            raise UserError(f"tensor {name!r} has no place in this architecture", _way_out(name), path)
        _check(stored, key, expected[key].shape)
        found[key] = stored
    if head is not None and _EMBEDDING not in found:  # of the two, some tools save the head
        _check(head, _EMBEDDING, expected[_EMBEDDING].shape)
        found[_EMBEDDING] = head
    places = weight_map(folder / INDEX) if (folder / INDEX).exists() else {}
    if missing := expected.keys() - found.keys():
        first = hf_name(min(missing))
        named = f", which {INDEX} says is in {places[first]}" if first in places else ""
        raise UserError(f"the weights lack {len(missing)} tensors, the first is {first}{named}", _BOTH, folder)
    if places:
        _check_index(folder, places, file_of, decoder.config.tie_embeddings)
    if head is not None and not _same(head, found[_EMBEDDING]):
        cause = "config.json ties the output head to the embedding, but lm_head.weight has other values"
        raise UserError(cause, "set tie_word_embeddings to false to use it, or remove the tensor", head.path)
    return {key: found[key] for key in expected}


def read_weights(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of what `find_weights` found, or a part of it, lazily, file by file; each a view of its file."""
    for path in dict.fromkeys(each.path for each in stored.values()):
        keys = {each.name: key for key, each in stored.items() if each.path == path}
        yield from ((keys[name], tensor) for name, tensor in read_safetensors(path, keys))


def _check(stored: StoredTensor, key: str, shape: torch.Size) -> None:
    """Raise UserError where the type or the shape of a stored tensor does not fit."""
    name = hf_name(key)
    check_floating(name, stored.dtype, stored.path)
    if stored.shape != shape:
        cause = f"{name} has shape {list(stored.shape)}, config.json says {list(shape)}"
        raise UserError(cause, _BOTH, stored.path)


def _check_index(folder: Path, places: Mapping[str, str], file_of: Mapping[str, str], tied: bool) -> None:
    """Raise UserError where the index (`places`) has another file for a tensor than the one that it is in (`file_of`).
    What is not needed may lack in either: tools that leave such tensors out of the shards leave them in the index."""
    for name in sorted({*places, *file_of}):
        said, found, key = places.get(name), file_of.get(name), name.removeprefix("model.")
        if said == found or key.endswith(_RECOMPUTED):
            continue
        if (said is None or found is None) and tied and key in (_EMBEDDING, _HEAD):
            continue
        if said is None:
            cause = f"{found} holds tensor {name}, which {INDEX} does not name"
        elif found is None:
            cause = f"{INDEX} says that {name} is in {said}, and no file that it names holds it"
        else:
            cause = f"{INDEX} says that {name} is in {said}, and it is in {found}"
        raise UserError(cause, _ONE_INDEX, folder)


def _way_out(name: str) -> str:
    """What to do about a tensor that the decoder has not."""
    if _WRAPPED.match(name):
        return "save the model without the wrapper around it, with transformers' save_pretrained"
    return _UNQUANTIZED if _QUANTIZED.search(name) else _BOTH


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same values, compared in parts to save memory."""
    if one.shape != other.shape or one == other:
        return one == other
    (_, tensor), (_, second) = *read_weights({"one": one}), *read_weights({"other": other})
    pairs = zip(tensor.split(4096), second.split(4096), strict=True)
    return all(torch.equal(part.to(second.dtype), others) for part, others in pairs)


def _tensors(folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """(name, file, tensor) of every tensor of the folder, lazily, file by file."""
    files = weight_files(folder)
    if others := other_files(folder, files):
        say_once(f"note: {folder}: not read, as no part of the model: {', '.join(others)}")
    for path in files:
        yield from ((name, path, tensor) for name, tensor in read_safetensors(path))


def check_floating(name: str, dtype: torch.dtype, where: Path) -> None:
    """Raise UserError for weights that are no real numbers: integers (quantized, say), truth values, complex ones."""
    if not dtype.is_floating_point:
        kind = str(dtype).removeprefix("torch.")
        remedy = f"weights must be float32, bfloat16 or float16; if these are quantized, {_UNQUANTIZED}"
        raise UserError(f"{name} is of type {kind}", remedy, where)


MAPPED = 2**27


def read_safetensors(path: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file, lazily; `names`: of these alone. Raises UserError if it is missing, damaged or not
    safetensors, and for two tensors of one name.

    A tensor is a view of the file's pages, which count as memory of this process as long as the file is open: it is
    opened anew after every MAPPED bytes."""
    try:
        check_regular(path)
        left: list[str] | None = None
        while left is None or left:
            mapped = 0
            with safe_open(path, framework="pt") as file:
                if left is None:
                    check_header(path)
                    left = [name for name in file.keys() if names is None or name in names][::-1]  # noqa: SIM118
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
    copy_settings(base, out)
    save_safetensors(out / SINGLE, {hf_name(k): v for k, v in decoder.state_dict().items()})


def copy_settings(base: Path, out: Path) -> None:
    """Copy what a model folder has besides weights: config, tokenizer and chat templates."""
    for path in (path for pattern in SETTINGS for path in base.glob(pattern)):
        # The base may itself be a run or an export, or hold an adapter: this folder is none of these.
        if not path.name.endswith(".index.json") and path.name not in _RECORDS:
            copied = out / path.relative_to(base)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)
