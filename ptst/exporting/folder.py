"""The small files of an exported folder, laid out as transformers' `save_pretrained` does: config, generation config,
tokenizer, chat template; and the folder itself, which is whole or absent."""

import glob
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ptst.errors import Setting, UserError
from ptst.fingerprints import TOKENIZER
from ptst.model.config import read_json
from ptst.progress import say
from ptst.storage import LOCK, exclusive_lock, partial_path, refuse_link, sync, write_atomically, write_json

CONFIG, GENERATION = "config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Where programs look for a chat template besides chat_template.jinja. llama.cpp's converter prefers the entry of
# tokenizer_config.json to it, and transformers takes additional_chat_templates/tool_use.jinja where there are tools.
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates/*.jinja")
_TOKENIZER = (*TOKENIZER, "vocab.json", "merges.txt", "chat_template.json")
_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # of the base model, which go with its weights
_SLACK = 64 * 2**20  # bytes that must stay free


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder to write to, which becomes `out` on a normal exit and is removed on an error. A kill at any instant
    leaves a hidden folder next to it, which the next export to `out` removes. `needed`: bytes that will be written.
    Raises UserError where there is something at `out`, or no room."""
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(out)
    check_room(out, needed)
    partial = partial_path(out)
    partial.mkdir()
    try:
        with exclusive_lock(partial):
            yield partial
            (partial / LOCK).unlink()
            sync(partial)
            check_out(out)  # anything may have come there in the meantime
            os.rename(partial, out)
            sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_out(out: Path) -> None:
    """Raise UserError where there is something at `out`: a file, a link, or a folder that is not empty; and for the
    current folder, which would be another one afterwards."""
    refuse_link(out)
    if out.resolve() == Path.cwd():
        raise UserError((Setting("out"), f" {out} is the current folder"), "name a folder in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "exists and is not empty" if out.is_dir() else "is a file"
        raise UserError(f"{out} {kind}", ("nothing is written over: remove it, or give another ", Setting("out")))


def check_room(out: Path, needed: int) -> None:
    """Raise UserError where the disk has no room for `needed` bytes."""
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    if free < needed + _SLACK:
        cause = f"{out} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB left"
        raise UserError(cause, ("make room, or give ", Setting("out"), " on another disk"))


def _remove_partial(out: Path) -> None:
    """Remove what killed exports to `out` left; not that of one that is still at work."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        with suppress(UserError, OSError), exclusive_lock(path):
            say(f"removing {path}, which an export that was killed has left")
            shutil.rmtree(path, ignore_errors=True)


def small_files(base: Path, tokenizer_only: bool = False) -> list[Path]:
    """The files of a model folder that go with its weights, or with its tokenizer alone, as relative paths."""
    patterns = _TOKENIZER if tokenizer_only else (CONFIG, GENERATION, *_TOKENIZER, *_TERMS)
    found = {path for pattern in patterns for path in base.glob(pattern) if path.is_file()}
    if tokenizer_only:
        found.discard(base / GENERATION)
    return sorted(path.relative_to(base) for path in found)


def copy_small_files(base: Path, out: Path, jinja: str | None, tokenizer_only: bool = False) -> None:
    """Copy them. `jinja`: the chat template, the only one then; without it the folder's own stay as they are."""
    copied = small_files(base, tokenizer_only)
    if jinja is not None:
        dropped = {path.relative_to(base) for pattern in (*_OTHER_TEMPLATES, TEMPLATE) for path in base.glob(pattern)}
        copied = [path for path in copied if path not in dropped]
        write_atomically(out / TEMPLATE, jinja.encode())
    for path in copied:
        (out / path).parent.mkdir(exist_ok=True)
        if path.name == TOKENIZER_CONFIG and jinja is not None:
            values = read_json(base / path)
            write_json(out / path, {key: value for key, value in values.items() if key != "chat_template"})
        else:
            shutil.copyfile(base / path, out / path)
    if others := [] if tokenizer_only else _left_out(base, copied):
        say(f"note: not copied from {base}: {', '.join(others)}")


def set_in_tokenizer_config(out: Path, settings: Mapping[str, bool]) -> None:
    """Write settings that the proof of a baked template needs, and say so: they only concern how a rendered text is
    read."""
    if settings:
        values = read_json(out / TOKENIZER_CONFIG)
        write_json(out / TOKENIZER_CONFIG, {**values, **settings})
        shown = ", ".join(f'"{key}": {str(value).lower()}' for key, value in settings.items())
        say(f"{TOKENIZER_CONFIG} gets {shown}, so that transformers reads the chat template's text as ptst does")


def _left_out(base: Path, copied: Iterable[Path]) -> list[str]:
    """Names of the folder's other small files; weights and what belongs to a run of ptst are not among them."""
    known = {str(path) for path in copied} | {"README.md", "run.json", "export.json", "model.safetensors.index.json"}
    names = {path.name for path in base.iterdir() if path.is_file() and not path.name.startswith(".")}
    kinds = (".json", ".jinja", ".model", ".txt")
    return sorted(name for name in names - known if name.endswith(kinds) and "template" not in name)


def update_config(out: Path, dtype: torch.dtype, *, always: bool, keep_name: bool) -> None:
    """Say in config.json which type the weights have; `always`: also where it named none. Without `keep_name` the name
    of the base model in it goes: these are no longer its weights."""
    values: dict[str, Any] = read_json(out / CONFIG)
    if not keep_name:
        values.pop("_name_or_path", None)
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"] * always
    write_json(out / CONFIG, values | dict.fromkeys(keys, str(dtype).removeprefix("torch.")))


def add_end_tokens(out: Path, ends: Collection[int]) -> list[int]:
    """Add the tokens that end an answer to generation_config.json, so that other programs stop where ptst does; returns
    those that were missing. Without that file, transformers takes config.json's."""
    path = out / GENERATION
    values: Mapping[str, Any] = read_json(path) if path.exists() else {}
    own = values.get("eos_token_id", read_json(out / CONFIG).get("eos_token_id"))
    known = own if isinstance(own, list) else [] if own is None else [own]
    missing = sorted(set(ends) - set(known))
    if missing:
        write_json(path, {**values, "eos_token_id": [*known, *missing]})
    return missing
