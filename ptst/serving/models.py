"""The models that are served, by name: each adapter, and the base model, under each template.

All share the base model's weights, one KV cache and one engine (multi-LoRA). A run of all weights, or a step of a run,
has weights of its own and is served alone: a second server, with its own memory plan, serves others.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst import __version__
from ptst.errors import Setting, UserError
from ptst.fingerprints import combined, weights_fingerprint
from ptst.generation.engine import Engine
from ptst.generation.multi_lora import read_adapter
from ptst.generation.request import EngineOptions
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_device, pick_dtype
from ptst.open import OpenModel, open_model, run_folder
from ptst.serving.config import ServeConfig
from ptst.serving.errors import ApiError
from ptst.text.prompt_format import PromptFormat, check_used
from ptst.text.templates import Template, find_family, find_template, load_template


@dataclass(frozen=True)
class ServedModel:
    """A model under a template. `adapter`: the engine's name of the one that answers, None for the decoder as it is;
    `fingerprint`: of all that its answers depend on besides the request."""

    name: str
    adapter: str | None
    prompt_format: PromptFormat
    base: str
    fingerprint: str
    max_length: int
    vocab_size: int
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self) -> dict[str, Any]:
        """As /v1/models has it."""
        p = self.prompt_format
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "ptst"}
        own |= {"root": self.base, "max_model_len": self.max_length}
        return own | {"template": p.template.name, "family": p.family.name, "chat_format": p.format_name}


class Catalog:
    """The models of a configuration, opened but not loaded. Raises UserError for what cannot be served."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.dtype = pick_dtype(config.dtype)
        self.templates = find_templates(config)
        opened = self._open()
        self.base = opened[0][1]
        own = {name: _adapter_folder(model) for name, model in opened}
        self.adapters = {name: folder for name, folder in own.items() if folder is not None}
        limit = self.base.config.max_positions
        self.max_length = min(config.max_length or limit, limit)
        self.models: dict[str, ServedModel] = {}
        for name, model in opened:
            for template in self.templates:
                served = self._served(name, model, template)
                self.models[served.name] = served

    def find(self, name: str) -> ServedModel:
        """The model of a name. Raises ApiError for an unknown one."""
        if name not in self.models:
            message = f"there is no model of this name; there are {', '.join(self.models)}"
            raise ApiError(message, "model", status=404, code="model_not_found")
        return self.models[name]

    def load(self) -> Decoder:
        """The weights of the model that all share. Raises UserError for damaged files."""
        device = pick_device()
        return self.base.load(self.dtype, device) if _is_whole(self.base) else self.base.load_base(self.dtype, device)

    def engine(self, decoder: Decoder) -> Engine:
        """An engine over these weights and all adapters. Raises UserError for memory that does not suffice."""
        first = next(iter(self.models.values())).prompt_format
        config = self.config
        return Engine(
            decoder,
            first.stop_ids,
            EngineOptions(config.batch_size, self.max_length, config.kv_bytes),
            decode=first.tokenizer.decode_answer,
            adapters={name: read_adapter(decoder, folder) for name, folder in self.adapters.items()},
        )

    def _open(self) -> list[tuple[str, OpenModel]]:
        """Names and models: the base model or a model of all weights first, then those with adapters."""
        config, first = self.config, self.templates[0]
        runs = [self._open_one(checkpoint=path) for path in config.checkpoint]
        model = config.model
        if model is None and not runs and not config.adapter:
            runs = [self._open_one()]
        base_name = runs[0].name if model is None and runs else model
        adapters = [self._open_one(base_name, adapter=each) for each in config.adapter]
        tuned = [(_run_name(run), run) for run in runs]
        tuned += [(_short(str(each.adapter_name)), each) for each in adapters]
        for name, each in tuned:
            if _is_whole(each):
                if len(tuned) > 1 or model is not None:
                    what = "a step of a run" if each.is_state else "a run of all weights"
                    raise UserError(f"{each.checkpoint} is {what}, not an adapter", _second_server())
                return [(name, each)]
        base = self._open_one(model) if model is not None else _baseline(runs)
        opened = [(_short(base.name), base), *tuned]
        _check_together(opened)
        if config.chat_format is not None:
            check_used(config.chat_format, first, *self.templates)
        return opened

    def _open_one(self, model: str | None = None, **what: Any) -> OpenModel:
        """As the evaluation opens it, under the first template."""
        config = self.config
        return open_model(
            model,
            self.templates[0],
            family=config.template_family,
            chat_format=config.chat_format,
            allow=("role-markers", *config.allow),
            **what,
        )

    def _served(self, name: str, model: OpenModel, template: Template) -> ServedModel:
        under = model.with_template(template).prompt_format
        weights = [weights_fingerprint(self.base.folder)]
        tuned = model.checkpoint or model.adapter
        weights += [weights_fingerprint(tuned)] if tuned is not None and not model.is_state else []
        where = str(model.checkpoint) if model.is_state else ""
        words = (repr(under.template), repr(under.family), under.chat_format.name)
        held = [] if self.base.quantize == "none" else [self.base.quantize]
        mark = combined(*weights, where, *words, str(self.dtype), *held, __version__)
        own = name if name in self.adapters else None
        full = f"{name}@{under.template.name}"
        size = self.base.config.vocab_size
        return ServedModel(full, own, under, self.base.name, f"fp_{mark[-16:]}", self.max_length, size)


def _baseline(runs: Sequence[OpenModel]) -> OpenModel:
    """The base model of runs as their evaluation measures it: in the family of their data, where that is one."""
    first = runs[0].prompt_format
    families = {run.prompt_format.family for run in runs}
    family = first.family if len(families) == 1 else find_family("plain")
    quantized = runs[0].quantize
    return replace(runs[0], checkpoint=None, run=None, quantized=quantized, prompt_format=replace(first, family=family))


def find_templates(config: ServeConfig) -> list[Template]:
    """The templates to serve, chat: templates first. Raises UserError for unknown ones and for one that comes twice."""
    found = [find_template(name) for name in config.templates]
    found += [load_template(path) for path in config.template_file]
    names = [template.name for template in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError((Setting("template"), f" {min(twice)} comes twice"), "leave one out")
    return sorted(found, key=lambda template: template.is_text)


def _adapter_folder(model: OpenModel) -> Path | None:
    """The adapter over the base model, None for a model without one or with all weights of its own."""
    if model.adapter is not None:
        return model.adapter
    return model.checkpoint if model.run is not None and not _is_whole(model) else None


def _is_whole(model: OpenModel) -> bool:
    """Whether a run's weights are not an adapter in PEFT's layout."""
    return model.run is not None and (model.run.full or model.is_state)


def _run_name(model: OpenModel) -> str:
    """`run1`; `run1/step-00000050` for a step of it."""
    assert model.checkpoint is not None
    run = run_folder(model.checkpoint).resolve()
    return f"{run.name}/{model.checkpoint.name}" if model.is_state else run.name


def _short(name: str) -> str:
    """A folder's name; a hub id as it is."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _second_server() -> tuple[str, ...]:
    return ("serve it alone, by a second ptst serve on another ", Setting("port"))


def _check_together(opened: Sequence[tuple[str, OpenModel]]) -> None:
    """Raise UserError for models that cannot share an engine, or a name."""
    base = opened[0][1]
    for name, model in opened[1:]:
        if model.folder.resolve() != base.folder.resolve():
            raise UserError(f"{name} is over {model.folder}, and others over {base.folder}", _second_server())
        if model.run is not None and model.quantize != base.quantize:
            held = {"none": "the unquantized base"}
            mine, theirs = (held.get(each, f"a base in {each}") for each in (model.quantize, base.quantize))
            raise UserError(f"{name} was trained over {mine}, and others are over {theirs}", _second_server())
    names = [name for name, _ in opened]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two models are called {min(twice)}", "rename the folder of one of them")
