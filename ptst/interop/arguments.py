"""A model as another tool names it: what model arguments (`-M`, `--model_args`) can say, and the model they mean."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptst.config_file import merge
from ptst.errors import UserError
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_device, pick_dtype
from ptst.open import OpenModel, open_model, run_folder
from ptst.records import TrainRecord, find_record
from ptst.settings import (
    EngineSettings,
    FormatSettings,
    Precision,
    ThreadSettings,
    check_above_zero,
    check_at_least,
)
from ptst.text.templates import TEMPLATES, load_template
from ptst.threads import choose_threads


@dataclass(frozen=True, kw_only=True)
class ModelArguments(ThreadSettings, FormatSettings, EngineSettings):
    """The model and its prompt format. `checkpoint`: the folder of a run; `model`: a model folder, hub id or the
    embedded name, with `adapter` over it. `template` None: chat:plain, which adds no words."""

    checkpoint: Path | None = None
    model: str | None = None
    adapter: str | None = None
    template: str | None = None
    template_file: Path | None = None
    dtype: Precision = "auto"
    device: str | None = None
    """Where to compute, as torch names it (cpu, cuda, cuda:1). Default: the GPU if there is one."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "ModelArguments":
        """From a tool's own arguments; None is what was not given. Raises UserError, naming the argument, for an
        unknown one, a value of the wrong type or out of range, and for two templates."""
        given = {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}
        if isinstance(given.get("allow"), str):
            given["allow"] = [name.strip() for name in given["allow"].split("+")]
        found = merge(cls(), given, where)
        check_at_least(found, 1, "batch_size", "threads")
        check_above_zero(found, "kv_memory")
        if found.template is not None and found.template_file is not None:
            raise UserError("template and template_file exclude each other", "give one of the two", where)
        return found

    @property
    def torch_device(self) -> str:
        """The device. Raises UserError for one that this machine lacks."""
        if self.device is None:
            return pick_device()
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            raise UserError(f"there is no device {self.device}", "give cpu or cuda, or leave device out") from None
        if kind not in ("cpu", "cuda"):
            raise UserError(f"this engine computes on cpu and cuda, not on {kind}", "give one of these as device")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"this machine has no {self.device}", "give cpu as device, or leave it out")
        return self.device

    def open(self) -> OpenModel:
        """The model without its weights. Raises UserError as `open_model`."""
        if self.checkpoint is None and self.model is None:
            raise UserError("no model is named", "give checkpoint, a run folder, or model")
        template = load_template(self.template_file) if self.template_file else self.template or "chat:plain"
        return open_model(
            self.model,
            template,
            checkpoint=self.checkpoint,
            adapter=self.adapter,
            family=self.template_family,
            chat_format=self.chat_format,
            allow=("role-markers", *self.allow),
        )

    def load(self, model: OpenModel) -> Decoder:
        """The weights, and how many threads to compute with."""
        choose_threads(self.threads)
        device = torch.device(self.torch_device)
        if device.index is not None:
            torch.cuda.set_device(device)  # the kernels are launched on the current GPU
        return model.load(pick_dtype(self.dtype), str(device))


def named(name: str, values: Mapping[str, Any], where: str) -> ModelArguments:
    """The model of a name as `RUN@chat:llama`: RUN is the folder of a run (or a step of it), a model folder, a hub id
    or the embedded name. Without `@` and a template, chat:plain. `values`: more arguments (`ModelArguments`).

    Raises UserError as `ModelArguments.of`, and where the arguments say what the name says."""
    place, template = split_name(name)
    for key in ("checkpoint", "model"):
        if key in values:
            raise UserError(f"{key} is a part of the model's name", f"say ptst/RUN@TEMPLATE and leave {key} out", where)
    if template is not None and values.get("template") not in (None, template):
        raise UserError(f"the name says {template}, template says {values['template']}", "give one of the two", where)
    found = ModelArguments.of({**values, "template": template or values.get("template")}, where)
    if is_run(Path(place)) and found.adapter is None:
        return replace(found, checkpoint=Path(place))
    return replace(found, model=place)


def split_name(name: str) -> tuple[str, str | None]:
    """`runs/a` and `chat:llama` of `runs/a@chat:llama`; an `@` that is a part of a folder's or hub model's name (a
    revision) stays."""
    place, _, last = name.rpartition("@")
    is_template = ":" in last or f"chat:{last}" in TEMPLATES or (Path(place).is_dir() and not Path(name).is_dir())
    return (place, last) if place and is_template else (name, None)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, or of a step of one. Raises UserError for a damaged record."""
    return find_record(folder, TrainRecord) is not None or run_folder(folder) != folder
