"""What `--model` names: the embedded default, a local Hugging Face folder, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ptst.errors import UserError
from ptst.hub.embedded import EMBEDDED_NAME, ensure_embedded

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = ("*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja")  # never pickled weights


def locate_model(name: str, checkpoints: Path = Path("checkpoints"), *, quiet: bool = False) -> Path:
    """The folder of a model; an existing folder wins over a hub id of the same spelling.

    Raises UserError when there is no such folder, it holds no model, or the hub cannot give it.
    """
    if name == EMBEDDED_NAME:
        return ensure_embedded(checkpoints, quiet=quiet)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path} is not a model folder: it has no config.json")
        return path
    if path.exists():
        raise UserError(f"{path} is a file; --model takes the folder that holds config.json and *.safetensors")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"there is no model folder {name}; give a folder, a hub id (org/name) or {EMBEDDED_NAME}")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    # Read when the library is imported; a machine without a network should say so soon.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "30")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except GatedRepoError:
        reason = "is gated: ask for access on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is not on the hub, or is private"
    except Exception as error:  # network faults surface as many unrelated types, by version of the library
        reason = f"could not be fetched from the hub ({type(error).__name__})"
    raise UserError(f"model {name} {reason}; or give a local folder, or --model {EMBEDDED_NAME}, which needs no hub")
