"""The reference model of a token constraint: which folder it is, and whether it reads the same tokens."""

from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError
from ptst.hub.locate import locate_model, named_by
from ptst.model.config import DecoderConfig
from ptst.model.weights import empty_decoder, find_weights
from ptst.records import CHECKPOINTS, read_json

_WORDS = ("model", "added_tokens", "normalizer", "pre_tokenizer")  # what decides the ids in a tokenizer.json


def find_reference(name: str) -> Path:
    """The folder of a reference model. Raises UserError as `locate_model`, and for weights that are missing, damaged or
    not those of its config."""
    with named_by("reference", name):
        folder = locate_model(name, CHECKPOINTS)
        find_weights(folder, empty_decoder(folder))
    return folder


def check_reference(folder: Path, model: Path, longest: int) -> None:
    """Raise UserError for a reference whose tokenizer is another one than that of the trained `model`, or whose context
    is shorter than the `longest` example in tokens."""
    if folder.resolve() == model.resolve():
        return
    for name in ("tokenizer.model", "tokenizer.json"):
        if _read(folder / name) != _read(model / name):
            cause = (Setting("reference"), f" {folder} has another tokenizer than {model} ({name})")
            raise UserError(cause, "its probabilities of tokens say nothing of the other's")
    context = DecoderConfig.from_folder(folder).max_positions
    if longest > context:
        cause = (Setting("reference"), f" {folder} has a context of {context} tokens, and an example has {longest}")
        raise UserError(cause, ("lower ", Setting("max_length")))


def _read(path: Path) -> Any:
    """What decides the ids; None where there is no such file."""
    if not path.exists():
        return None
    if path.suffix != ".json":
        return path.read_bytes()
    values = read_json(path, "give a whole model folder")
    return {key: values.get(key) for key in _WORDS}
