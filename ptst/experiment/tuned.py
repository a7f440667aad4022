"""Models of a grid that were fine-tuned elsewhere: adapters of its base model, and whole models of its shape."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.api.names import HOSTED, hosted_model
from ptst.errors import Setting, UserError
from ptst.experiment.plan import BASE
from ptst.fingerprints import TOKENIZER, Fingerprint, tokenizer_fingerprint, weights_fingerprint
from ptst.hosted.record import HostedRecord
from ptst.hub.locate import locate_tuned
from ptst.model.adapter_files import CONFIG, read_lora_config
from ptst.model.config import DecoderConfig
from ptst.open import OpenModel, check_adapter, check_base
from ptst.progress import say
from ptst.records import TrainRecord, find_record


@dataclass(frozen=True)
class TunedModel:
    """A model as the setting `tuned` names it. `full`: the folder holds all weights, not an adapter; `run`: its record,
    where `ptst.train` made it."""

    name: str
    folder: Path
    full: bool
    run: TrainRecord | None

    @cached_property
    def weights(self) -> Fingerprint:
        return weights_fingerprint(self.folder)

    def to_json(self) -> dict[str, Any]:
        """What results.json has of it."""
        kind = "model" if self.full else "adapter"
        base = {} if self.full else {"base_model_name_or_path": read_lora_config(self.folder).base}
        return {"folder": str(self.folder.absolute()), "kind": kind, "weights": self.weights, **base}

    def check(self, base: OpenModel) -> None:
        """Raise UserError for an adapter that is not supported or does not fit the base model, and for a whole model of
        another shape; say so where names or tokenizers differ."""
        if self.run is not None:
            check_base(self.folder, self.run, base.folder)
            if self.run.quantize != "none":
                cause = f"{self.folder} was trained over a base in {self.run.quantize}"
                raise UserError(cause, "evaluate it with ptst.eval, which rounds the base so")
        if not self.full:
            check_adapter(self.folder, base.config, base.name, base.folder)
            return
        config = DecoderConfig.from_folder(self.folder)
        rows = base.config.vocab_size  # a tuned model may have more
        if replace(config, vocab_size=rows) != base.config or config.vocab_size < rows:
            cause = f"{self.folder} is not of the shape of {base.name}, so it was not tuned from it"
            raise UserError(cause, ("test it in a grid of its own, as ", Setting("model")))
        own = any((self.folder / name).exists() for name in TOKENIZER)
        if own and tokenizer_fingerprint(self.folder) != tokenizer_fingerprint(base.folder):
            what = "tokenizer, chat template or end tokens"
            say(f"note: {self.folder} has another {what} than {base.name}; it is tested with the base model's")


@dataclass(frozen=True)
class HostedTuned:
    """A fine-tuned model behind the grid's endpoint, by its name there; `run`: the record of its job, where it is
    known. `weights` stands for those that nobody can read."""

    name: str
    model: str
    weights: str
    run: HostedRecord | None = None

    def to_json(self) -> dict[str, Any]:
        return {"folder": f"{HOSTED}{self.model}", "kind": "endpoint", "weights": self.weights}


def tuned_settings(settings: Sequence[str]) -> dict[str, str]:
    """What each NAME=WHERE names. Raises UserError for a setting of another form, and for a name that is taken."""
    found: dict[str, str] = {}
    for text in settings:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"\w[\w.-]*", name) or not path:
            remedy = "it must be NAME=FOLDER or NAME=HUB-ID, with letters, digits, '.', '_' and '-' in the name"
            raise UserError((Setting("tuned"), f" is {text!r}"), remedy)
        if name in found or name in (BASE, "aligned"):
            raise UserError((Setting("tuned"), f": the name {name} is taken"), "choose another")
        found[name] = path
    return found


def read_tuned(settings: Sequence[str]) -> dict[str, TunedModel]:
    """The models by name. Raises UserError for a setting that is not NAME=FOLDER or NAME=HUB-ID, a name that is taken,
    what the hub lacks, and a folder with neither an adapter nor a model."""
    found: dict[str, TunedModel] = {}
    for name, path in tuned_settings(settings).items():
        if hosted_model(path) is not None:
            cause = f"{path} is behind an endpoint, and the base model of this grid is not"
            raise UserError(cause, ("name its base model as ", Setting("model"), f" {HOSTED}NAME"))
        folder = locate_tuned(path)
        full = not (folder / CONFIG).exists()
        if full and not (folder / "config.json").exists():
            missing = f"{folder} holds no model: it has neither {CONFIG} nor config.json"
            raise UserError(missing, ("give ", Setting("tuned"), " an adapter's folder or a whole model's"))
        run = find_record(folder, TrainRecord)
        if run is not None and run.status != "finished":
            raise UserError(f"{folder} is not a finished training run (status {run.status!r})", "resume it first")
        found[name] = TunedModel(name, folder, full, run)
    return found


def fingerprints(models: Mapping[str, TunedModel | HostedTuned]) -> dict[str, str]:
    """The weights' fingerprints by name."""
    return {name: model.weights for name, model in models.items()}
