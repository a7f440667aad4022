"""The trainings of a grid: settings, data and folder of each run, as the defence of its model asks.

Which runs there are follows from the models that are tested (`ptst.experiment.grid`); a worker makes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.data.example_arrays import lengths_of
from ptst.data.examples import Mixture, TrainingSource, length_limit, mix, prepare
from ptst.data.mix_part import parse_mix
from ptst.data.order import Step
from ptst.data.selection import select
from ptst.data.sources import Source
from ptst.defense_names import TRIGGERED, triggered_name
from ptst.defenses.trigger import triggered
from ptst.errors import settings_group
from ptst.experiment import defenses, plan
from ptst.experiment.config import GridConfig
from ptst.experiment.defenses import Changes
from ptst.experiment.grid_folder import GridFolder
from ptst.experiment.grid_sources import SAFETY
from ptst.experiment.opened import chat_format
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.run_size import RunSize
from ptst.hosted.record import HostedRecord
from ptst.open import OpenModel
from ptst.records import TrainRecord, find_record
from ptst.storage import LOCKS
from ptst.text.prompt_format import PromptFormat, open_prompt_format, with_roles
from ptst.text.templates import MODEL_DEFAULT, Template, with_default_system_prompt
from ptst.training.config import TrainConfig
from ptst.training.reference import find_reference
from ptst.training.run_plan import epoch_folders
from ptst.training.run_sources import mix_templates
from ptst.training.trainer import TrainerConfig


class GridTraining(GridFolder, ABC):
    """A grid as far as it trains."""

    config: GridConfig
    models: list[GridModel]
    train_templates: dict[str, tuple[Template, Path | None]]
    sources: dict[str, Source]
    device: str

    @property
    @abstractmethod
    def base(self) -> OpenModel:
        """The base model, under any template."""

    @property
    def runs(self) -> list[GridModel]:
        """One model of every grid run."""
        return list({model.run: model.training for model in self.models if model.template is not None}.values())

    def train_config(self, model: GridModel) -> TrainConfig:
        """The settings with which `ptst.train` makes a run."""
        assert model.template is not None
        template, path = self.train_templates[model.template]
        c, changed = self.config, self.changes(model)
        return TrainConfig(
            **vars(c.train)
            | {"chat_format": chat_format(c.train.chat_format, self._with_roles(template))}
            | changed.settings,
            template=TrainConfig.template if path else model.template,
            template_file=path,
            model=c.model,
            data=c.data,
            mix=(*c.mix, *changed.mix),
            at_epochs=c.at_epochs,
            seed=model.seed,
            threads=c.threads,
            out=self.run_folder(model),
        )

    def changes(self, model: GridModel) -> Changes:
        """What a model's defence changes in its training."""
        return defenses.changes(model.defense, self.config.defense, self.triggered_file(model))

    def triggered_file(self, model: GridModel) -> Path:
        """Where a worker writes a model's training template with the trigger in it."""
        return self.out / "templates" / f"{plan.slug(triggered_name(model.trained))}.toml"

    def triggered_template(self, model: GridModel) -> Template:
        """A model's training template with the trigger in it."""
        template = self.train_templates[model.trained][0]
        if template.system == MODEL_DEFAULT:
            template = with_default_system_prompt(template, self.base.folder)
        return triggered(template, self.config.defense.trigger)

    def write_template(self, model: GridModel) -> None:
        """Write what the settings of a run name a file of: the training template with the trigger in it."""
        if model.defense == TRIGGERED:
            defenses.write_template(self.triggered_file(model), self.triggered_template(model), self.out / LOCKS)

    def run_folder(self, model: GridModel) -> Path:
        return self.out / "runs" / model.run

    def run_record(self, model: GridModel) -> TrainRecord | HostedRecord | None:
        """The record of a run; None where it has not begun."""
        return find_record(self.run_folder(model), TrainRecord)

    def run_figures(self, model: GridModel) -> dict[str, Any]:
        """Steps, validation losses and what was trained on, of a finished run (None: not recorded then)."""
        record = self.run_record(model)
        assert record is not None, "all runs are finished"
        trained, losses = (getattr(record, name, None) for name in ("trained", "validation_loss"))
        counts = {k: getattr(trained, k, None) for k in ("examples", "tokens", "trained_tokens")}
        loss = {k: getattr(losses, k, None) for k in ("before", "after")}
        return {"steps": getattr(record, "steps", None), **counts, "validation_loss": loss}

    def is_trained(self, model: GridModel) -> bool:
        return model.template is None or (
            (record := self.run_record(model)) is not None and record.status == "finished"
        )

    def with_weights(self, cells: Sequence[GridCell]) -> list[GridCell]:
        """The cells whose models there are; reads the record of each run once."""
        trained = {model.run for model in self.runs if self.is_trained(model)}
        return [cell for cell in cells if cell.model.template is None or cell.model.run in trained]

    def mixture(self, model: GridModel) -> Mixture:
        """The training examples of a run. Raises UserError for what a template cannot express, and as `select` and
        `mix`."""
        c, parts = self.config.train, [(self.sources[text], parse_mix(text)) for text in self.config.mix]
        asked = [TrainingSource(self.sources["data"], c.epochs)]
        asked += [TrainingSource(s, part.epochs, *part.find_template(), share=part.share) for s, part in parts]
        if model.defense in defenses.MIXED:
            own = self.triggered_template(model) if model.defense == TRIGGERED else None
            asked.append(TrainingSource(self.sources[SAFETY], self.config.defense.epochs, own))
        chosen = select(asked, c.subsample, model.seed)
        return mix(chosen, *self.training_format(model.trained), c.too_long, c.train_on)

    def steps(self, model: GridModel, mixture: Mixture) -> Sequence[Step]:
        """The optimizer steps of a run."""
        settings = TrainerConfig.of(self.train_config(model), micro_batch_tokens=1)
        return settings.plan(lengths_of(mixture.examples), mixture.plans)

    def run_size(self, model: GridModel) -> RunSize:
        """How much there is to compute in a run. Runs that differ in the seed alone are counted once. Raises UserError
        as `mixture`."""
        if (model.template, model.defense) not in self.run_sizes:
            mixture = self.mixture(model)
            self.note_size(model, mixture, self.steps(model, mixture))
        return self.run_sizes[model.template, model.defense]

    def note_size(self, model: GridModel, mixture: Mixture, steps: Sequence[Step]) -> None:
        """Keep the size of a run whose examples are at hand."""
        size = RunSize.of(self.train_config(model), self.base.config, self.device, mixture, steps)
        self.run_sizes[model.template, model.defense] = size

    @cached_property
    def run_sizes(self) -> dict[tuple[str | None, str], RunSize]:
        """By training template and defence."""
        return {}

    def training_format(self, name: str) -> tuple[PromptFormat, int]:
        """The prompt format of training under a template, and the maximum length of an example."""
        c = self.config.train
        limit = length_limit(c.max_length, self.base.config.max_positions, c.micro_batch_tokens)
        return self.training_formats[name], limit

    @cached_property
    def training_formats(self) -> dict[str, PromptFormat]:
        """The prompt format of training under each training template, its tokenizer opened once."""
        return {name: self._training_format(template) for name, (template, _) in self.train_templates.items()}

    def _training_format(self, template: Template) -> PromptFormat:
        c, opened = self.config.train, self._with_roles(template)
        return open_prompt_format(
            self.base.folder,
            opened,
            c.template_family or self.sources["data"].family,
            chat_format(c.chat_format, opened),
            allow_role_markers="role-markers" in c.allow,
            allow_chat_template="chat-template" in (*c.allow, *self.config.eval.allow),
        ).with_template(template)

    def _with_roles(self, template: Template) -> Template:
        """What the prompt format of a run is opened under: mixed-in data may have roles where the run has none."""
        return with_roles(template, *mix_templates(self.config.mix))

    def check_training(self) -> None:
        """Raise UserError for mistakes in what is left to be trained, every training template and defence once."""
        c, left = self.config.train, [model for model in self.runs if not self.is_trained(model)]
        if left and c.reference is not None:
            with settings_group("train"):
                find_reference(c.reference)
        for name in dict.fromkeys(model.trained for model in left):
            if "val-data" in self.sources:
                with settings_group("train"):
                    prepare(self.sources["val-data"], *self.training_format(name), c.too_long, c.train_on)
        for template, defense in dict.fromkeys((model.template, model.defense) for model in left):
            alike = [model for model in left if (model.template, model.defense) == (template, defense)]
            # Seeds differ in the order of the rows; with subsample, in the rows.
            for model in alike if c.subsample or self.config.at_epochs else alike[:1]:
                with settings_group("train"):
                    mixture = self.mixture(model)
                steps = self.steps(model, mixture)
                epoch_folders(self.train_config(model), steps)
                self.note_size(model, mixture, steps)
