"""The model under test: what an evaluation needs of it, wherever it is. Here: one whose weights are on this machine;
`ptst.evaluation.hosted` has the one behind an endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

from ptst.data import sources
from ptst.data.columns import ColumnRules
from ptst.errors import Setting, UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.hosted_answers import HostedAnswerer
from ptst.evaluation.measure import check_room, in_own_families
from ptst.evaluation.stored_answers import BASE, TUNED
from ptst.evaluation.tasks.table import LoadedTasks
from ptst.evaluation.tasks.task import Defaults
from ptst.fingerprints import combined, tokenizer_fingerprint, weights_fingerprint
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_dtype
from ptst.open import OpenModel, find_run, open_model, run_folder, trained_family
from ptst.progress import say
from ptst.records import CHECKPOINTS, DataRecord, TrainRecord
from ptst.text.prompt_format import PromptFormat
from ptst.text.templates import Template


class TrainedRecord(Protocol):
    """What an evaluation reads of the record of a training run, here or at an endpoint."""

    settings: dict[str, Any]

    @property
    def template(self) -> Template: ...
    @property
    def data(self) -> DataRecord: ...


class ModelUnderTest(Protocol):
    """A model, or a run and its base model, under a test template. `run`: the record of the training, where it is
    known; `parent`: where the folder of an evaluation is made if it is not named."""

    @property
    def named(self) -> str: ...
    @property
    def parent(self) -> Path: ...
    @property
    def run(self) -> TrainedRecord | None: ...
    @property
    def template(self) -> Template: ...

    def open(self, tasks: LoadedTasks, chosen: bool) -> LoadedTasks:
        """Open all but the weights, and check that every prompt can be asked; the tasks as they are asked. `chosen`:
        the user named the tasks. Raises UserError for every mistake that can be found without the weights."""

    def names(self) -> Sequence[str]:
        """The names of the models that are measured, in order: the base model's, the fine-tuned one's."""

    def answerer(self, name: str) -> Answerer | HostedAnswerer:
        """What answers for the model of a name, loaded now."""

    def record(self) -> dict[str, Any]:
        """Fields of the evaluation's record."""

    def own_family(self, family: str | None) -> str | None:
        """The template family of a task's prompts where it is not the evaluation's; `family`: that of its data."""

    def title(self) -> str:
        """How the fine-tuned model was made, for the title of a table."""

    def to_json(self, answers: Sequence[Path]) -> dict[str, Any]:
        """What the results say of the model; `answers`: the files of its answers."""

    def notes(self, answers: Sequence[Path]) -> list[str]:
        """What is to be said of the answers, in lines."""


def defaults_of(run: TrainedRecord | None, config: EvalConfig) -> Defaults:
    """The data of tasks that name none: those of the training run, unless the settings name others."""
    problems = config.data or (run.data.name if run else sources.DEFAULT)
    holdout = run.data.holdout if run else 0.0
    found = Defaults(problems, config.data, config.safety_data, config.limit, holdout, config.column_rules)
    return replace(found, problem_rules=_rules_of(run)) if run and not config.data else found


def _rules_of(run: TrainedRecord) -> ColumnRules:
    """What a run's settings said of the columns of its data."""
    columns, ignored = (run.settings.get(name) or () for name in ("columns", "ignore_columns"))
    return ColumnRules.of(columns, ignored, bool(run.settings.get("use_chosen")))


@dataclass
class LocalModel:
    """A model of this machine: a base model, one with an adapter of somebody else's, or a run of `ptst.train`."""

    config: EvalConfig
    template: Template
    checkpoint: Path | None
    run: TrainRecord | None
    device: str
    decoder: Decoder | None = None

    @classmethod
    def find(cls, config: EvalConfig, template: Template, device: str) -> Self:
        """The one that the settings name. Raises UserError as `find_run`, and for the address of an endpoint."""
        if config.base_url is not None:
            cause = (Setting("base_url"), " has no effect on a model of this machine")
            raise UserError(cause, ("name one behind the endpoint: ", Setting("model"), " openai:NAME"))
        checkpoint, run = find_run(config.checkpoint, config.model, config.adapter)
        if run is not None and run.full and config.quantize is not None:
            cause = (Setting("quantize"), f" is for a base model under an adapter, and {checkpoint} has all weights")
            raise UserError(cause, "leave it out")
        return cls(config, template, checkpoint, run, device)

    @property
    def named(self) -> str:
        adapter = f" with the adapter {self.config.adapter}" if self.config.adapter else ""
        if self.run:
            return f"run {self.checkpoint} (trained under {self.run.template.name}){adapter}"
        return f"model {self.config.model}{adapter}"

    @property
    def parent(self) -> Path:
        return run_folder(self.checkpoint) / "eval" if self.checkpoint else CHECKPOINTS

    @cached_property
    def opened(self) -> OpenModel:
        """The model without its weights. Raises UserError as `open_model`."""
        c = self.config
        opened = open_model(
            c.model,
            self.template,
            checkpoint=self.checkpoint,
            adapter=c.adapter,
            family=self._family,
            chat_format=c.chat_format,
            allow=("role-markers", *c.allow),
        )
        return replace(opened, quantized=c.quantize)

    @property
    def _family(self) -> str | None:
        return self.config.template_family or trained_family(self.run, self.config.model)

    @property
    def described(self) -> str:
        return self.opened.described

    @property
    def prompt_format(self) -> PromptFormat:
        return self.opened.prompt_format

    def open(self, tasks: LoadedTasks, chosen: bool) -> LoadedTasks:
        say(self.opened.prompt_format.described)
        if self._family is None:
            tasks = in_own_families(tasks)
        say(f"encoding the prompts of {len(tasks)} tasks")
        for key, (task, data) in tasks.items():
            check_room(key, task, data, self.opened, self.config, self.device)
        return tasks

    def names(self) -> list[str]:
        tuned = self.checkpoint is not None or self.opened.adapter is not None
        return [BASE] * (self.config.baseline or not tuned) + [TUNED] * tuned

    def answerer(self, name: str) -> Answerer:
        model, dtype, record = self.opened, pick_dtype(self.config.dtype), self._record
        say(f"loading the {'base model' if name == BASE else 'adapter' if model.adapter else 'run'}")
        if name == BASE:
            self.decoder = model.load_base(dtype, self.device)
        else:
            self.decoder = model.load(dtype, self.device, self.decoder)
        own = (record["run_weights"] or record["adapter_weights"]) if name == TUNED else None
        fingerprint = combined(record["weights"], own, record["tokenizer"], record["dtype"])
        models: dict[str | None, str] = {None: fingerprint}
        return Answerer(self.decoder, model.prompt_format, self.config, models=models, trained_with=self.trained_with)

    @property
    def trained_with(self) -> PromptFormat | None:
        """The prompt format of the run's training; of the base model beside a run, that of the run."""
        run, c = self.run, self.config
        if run is None:
            return None
        if c.chat_format in (None, run.chat_format):
            return self.opened.with_template(run.template).prompt_format
        allowed = ("role-markers", "chat-template")
        opened = open_model(None, run.template, checkpoint=self.checkpoint, family=self._family, allow=allowed)
        return opened.prompt_format

    @cached_property
    def _record(self) -> dict[str, Any]:
        model, checkpoint = self.opened, self.checkpoint
        return {
            "model": str(model.folder.resolve()),
            "weights": weights_fingerprint(model.folder),
            "run": str(checkpoint.resolve()) if checkpoint else None,
            "run_weights": weights_fingerprint(checkpoint) if checkpoint else None,
            "step": model.step,
            "adapter": str(model.adapter.resolve()) if model.adapter else None,
            "adapter_weights": weights_fingerprint(model.adapter) if model.adapter else None,
            "tokenizer": tokenizer_fingerprint(model.folder),
            "template": model.prompt_format.template,
            "family": model.prompt_format.family,
            "chat_format": model.prompt_format.chat_format.name,
            "dtype": model.dtype_name(pick_dtype(self.config.dtype)),
        }

    def record(self) -> dict[str, Any]:
        return self._record

    def own_family(self, family: str | None) -> str | None:
        return family if self._family is None else None

    def title(self) -> str:
        model = self.opened
        until = f" until step {model.step}" * model.is_state
        trained = f"trained under {model.run.template.name}{until}, " if model.run else ""
        return trained + (f"adapter {model.adapter_name}, " if model.adapter else "")

    def to_json(self, answers: Sequence[Path]) -> dict[str, Any]:
        adapter = {"adapter": self.opened.adapter_name} if self.opened.adapter else {}
        return {"run": str(self.checkpoint) if self.checkpoint else None, "step": self.opened.step, **adapter}

    def notes(self, answers: Sequence[Path]) -> list[str]:
        return []
