"""A grid and its folder: which runs and cells it has, where they are on disk, which are finished.

    run.json                         the record: settings, templates, fingerprints of the data
    runs/<run>/                      a run folder of the trainer
    cells/<model>/<test>.<task>.json the figures of a cell; next to it its answers and judged rows (.jsonl)
    locks/                           one for each run and cell that a worker is busy with; a killed worker's is released

A run or cell is finished when its last file, which is written atomically, exists.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self

from ptst import records
from ptst.data import order, sources
from ptst.data.examples import Mixture, TrainingSource, length_limit, mix, prepare
from ptst.data.mix_part import parse_mix
from ptst.data.order import Step
from ptst.data.sources import Source
from ptst.errors import Setting, UserError, settings_group
from ptst.evaluation.answers import Asked
from ptst.evaluation.judges import find_judge
from ptst.evaluation.measure import check_room, find_tools, in_own_families, sampling_for
from ptst.evaluation.tasks.table import LoadedTasks
from ptst.evaluation.verdicts import record_of
from ptst.experiment import laptop, plan
from ptst.experiment.config import GridConfig
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.tuned import HostedTuned, TunedModel, fingerprints, read_tuned
from ptst.fingerprints import Fingerprint, combined, tokenizer_fingerprint, weights_fingerprint
from ptst.hosted.record import HostedRecord
from ptst.model.weights import pick_device, pick_dtype
from ptst.open import OpenModel, open_model
from ptst.progress import say
from ptst.records import FILE, GROWING, KNOWN, SAME, RunRecord, TrainRecord, find_record
from ptst.records import plain as as_json
from ptst.runs import find_shared
from ptst.text.prompt_format import PromptFormat, check_used, open_prompt_format, with_roles
from ptst.text.templates import MODEL_DEFAULT, Template, with_default_system_prompt
from ptst.training.config import TrainConfig
from ptst.training.run_plan import epoch_folders
from ptst.training.run_sources import mix_templates

_AGAIN = "remove it, and the cell is measured again"


@dataclass(kw_only=True)
class GridRecord(RunRecord):
    """A grid. Later commands may add templates, training data and test data, but not change those that are there."""

    kind: ClassVar[str] = "grid"
    model: str
    weights: str = field(metadata=SAME)
    chat_format: str = field(metadata=SAME)
    family: str = field(metadata=SAME)
    dtype: str = field(metadata=SAME)
    tokenizer: str | None = field(default=None, metadata=KNOWN)
    templates: dict[str, Template] = field(metadata=GROWING)
    sources: dict[str, str] = field(metadata=GROWING)
    tests: dict[str, str] = field(metadata=GROWING)
    tuned: dict[str, str] | None = field(default=None, metadata=GROWING)
    endpoint: str | None = field(default=None, metadata=SAME)


@dataclass(frozen=True)
class Grid:
    """Everything that a grid consists of, here of models on this machine; `HostedGrid` is of models at an endpoint."""

    config: GridConfig
    out: Path
    models: list[GridModel]
    cells: list[GridCell]
    tasks: LoadedTasks
    train_templates: dict[str, tuple[Template, Path | None]]
    test_templates: dict[str, tuple[Template, Path | None]]
    sources: dict[str, Source]
    """What training reads: `data`, other data by their `mix` setting, and `val-data`, where there is any."""
    device: str = "cpu"
    tuned: Mapping[str, TunedModel | HostedTuned] = field(default_factory=dict)

    @classmethod
    def open(cls, config: GridConfig) -> Self:
        """Read all templates and data; no weights. Raises UserError for a user's mistakes."""
        config.check()
        out, settings = config.folder, config.train
        if (out / "settings.json").exists() and not (out / FILE).exists():
            raise UserError(f"{out} holds a grid of an earlier version of ptst", ("choose another ", Setting("out")))
        find_shared(out, GridRecord)
        train, test = plan.load_templates(config.train_templates), plan.load_templates(config.test_templates)
        mixed = plan.load_mix_templates(config.mix)
        plan.merge_templates(train, test, mixed)  # checks their names
        plan.check_distinct("template", [*train, *test])
        trained, tested = ([template for template, _ in found.values()] for found in (train, test))
        with settings_group("eval"):
            check_used(config.eval.chat_format, *tested)
        with settings_group("train"):
            others = [template for template, _ in mixed.values()]
            check_used(settings.chat_format, *trained, *others, *([] if config.eval.chat_format else tested))
        say(f"reading {config.data} and the data of {', '.join(config.tasks)}")
        with settings_group("train"):
            rules, holdout = settings.column_rules, settings.holdout
            read = {"data": sources.load(config.data, "train", settings.limit, holdout=holdout, rules=rules)}
            read |= {text: sources.load(parse_mix(text).name, "train", rules=rules) for text in config.mix}
            if settings.val_data:
                read["val-data"] = sources.load(settings.val_data, "validation", rules=rules)
            elif settings.holdout:
                read["val-data"] = sources.load(config.data, "validation", holdout=holdout, rules=rules)
        for name, source in read.items():
            if source.note:
                say(f"{name}: {source.note}")
        with settings_group("eval"):
            tasks = plan.load_suite(config, read["data"], laptop.families(config.laptop))
        for note in {data.note for _, data in tasks.values()} - {""}:
            say(note)
        tasks, tuned = cls.as_asked(config, tasks, trained), cls.read_tuned(config)
        models = plan.plan_models(list(train), config.seeds, config.at_epochs, tuned)
        cells = plan.plan_cells(models, list(test), list(tasks))
        device = pick_device()
        return cls(config, out, models, cells, tasks, train, test, read, device, tuned)

    @staticmethod
    def as_asked(config: GridConfig, tasks: LoadedTasks, trained: Sequence[Template]) -> LoadedTasks:
        """The tasks in the words in which these models are asked."""
        return tasks if trained or _family(config) else in_own_families(tasks)

    @staticmethod
    def read_tuned(config: GridConfig) -> Mapping[str, TunedModel | HostedTuned]:
        """Raises UserError as `read_tuned`."""
        return read_tuned(config.tuned)

    @property
    def runs(self) -> list[GridModel]:
        """One model of every grid run."""
        return list({model.run: model for model in self.models if model.template is not None}.values())

    def train_config(self, model: GridModel) -> TrainConfig:
        """The settings with which `ptst.train` makes a run."""
        assert model.template is not None
        template, path = self.train_templates[model.template]
        c = self.config
        return TrainConfig(
            **vars(c.train) | {"chat_format": _chat_format(c.train.chat_format, self._with_roles(template))},
            template=TrainConfig.template if path else model.template,
            template_file=path,
            model=c.model,
            data=c.data,
            mix=c.mix,
            at_epochs=c.at_epochs,
            seed=model.seed,
            threads=c.threads,
            out=self.run_folder(model),
        )

    def run_folder(self, model: GridModel) -> Path:
        return self.out / "runs" / model.run

    def weights_folder(self, model: GridModel) -> Path:
        """The base model's folder, or where a run's weights are after the model's epochs, or those of another model."""
        if model.tuned is not None:
            return self._tuned(model.tuned).folder
        run = self.base.folder if model.is_base else self.run_folder(model)
        return run if model.epochs is None else run / plan.epoch_name(model.epochs)

    def is_adapter(self, model: GridModel) -> bool:
        """Whether a model is an adapter over the base model."""
        if model.tuned is not None:
            return not self._tuned(model.tuned).full
        return not model.is_base and not self.config.train.full

    def _tuned(self, name: str) -> TunedModel:
        model = self.tuned[name]
        assert isinstance(model, TunedModel), "an endpoint's are in a HostedGrid"
        return model

    def weights(self, model: GridModel) -> Fingerprint:
        """Of a model's files, read anew."""
        return weights_fingerprint(self.weights_folder(model))

    def answers_model(self, weights: str) -> str:
        """The fingerprint of all that a model's answers depend on besides prompt and sampling; `weights`: its own."""
        base, tokenizer = self.base_fingerprints
        return combined(base, weights, tokenizer, str(pick_dtype(self.config.eval.dtype)))

    def asked(self, cell: GridCell, weights: str) -> Asked:
        """What the answers of a cell depend on; `weights`: of its model. Raises UserError as `Prompt.encode`."""
        task, data = self.tasks[cell.task]
        sampling, prompt_format = sampling_for(self.config.eval, data), self.opened[cell.test].prompt_format
        return Asked.of(task.prompts(data.items), prompt_format, sampling, self.answers_model(weights))

    def tested_with(self, test: str) -> dict[str, Any]:
        """What the figures of every cell under a test template depend on, besides its model, prompts and judge."""
        prompt_format = self.opened[test].prompt_format
        base, tokenizer = self.base_fingerprints
        return {
            "base": base,
            "tokenizer": tokenizer,
            "template": as_json(prompt_format.template),
            "chat_format": prompt_format.chat_format.name,
            "dtype": str(pick_dtype(self.config.eval.dtype)).removeprefix("torch."),
        }

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

    def cell_file(self, cell: GridCell, ending: str) -> Path:
        return self.out / "cells" / f"{cell.name}.{ending}"

    def is_measured(self, cell: GridCell) -> bool:
        return self.cell_file(cell, "json").exists()

    def cell_figures(self, cell: GridCell) -> dict[str, Any]:
        """Results and time of a finished cell. Raises UserError for a file that is damaged, or another cell's."""
        path = self.cell_file(cell, "json")
        figures = records.read_json(path, _AGAIN)
        if not isinstance(figures, dict) or any(figures.get(k, self) != v for k, v in cell.identity.items()):
            raise UserError("is not the file of this cell", _AGAIN, path)
        result, spent = figures.get("result"), figures.get("time")
        numbers = all(isinstance(v, (int, float, dict)) for v in result.values()) if isinstance(result, dict) else False
        if not numbers or not isinstance(spent, dict) or not isinstance(spent.get("seconds"), (int, float)):
            raise UserError("is damaged: it has no result, or no time", _AGAIN, path)
        return figures

    def cell_rows(self, cell: GridCell) -> list[dict[str, Any]]:
        """The judged answers of a finished cell. Raises UserError for a file that is damaged, or another cell's."""
        path, figures = self.cell_file(cell, "rows.jsonl"), self.cell_file(cell, "json")
        again = f"remove {figures}, and the cell is measured again"
        try:
            raw = path.read_bytes()
            rows = [json.loads(line) for line in raw.split(b"\n")[:-1]]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot be read ({error})", again, path) from None
        checksum = self.cell_figures(cell).get("rows")  # of an earlier version: None
        if checksum not in (None, rows_checksum(raw)) or not all(isinstance(row, dict) for row in rows):
            raise UserError("does not hold the rows that the cell was measured with", again, path)
        return rows

    @cached_property
    def opened(self) -> dict[str, OpenModel]:
        """The base model under each test template. Raises UserError as `open_model`."""
        c = self.config
        # Without any training, what the models were trained on is unknown.
        family = _family(c) or (self.sources["data"].family if self.train_templates else None)
        allowed = ("role-markers", *c.eval.allow, *c.train.allow)

        def opened(template: Template) -> OpenModel:
            chat_format = _chat_format(c.chat_format, template)
            return open_model(c.model, template, family=family, chat_format=chat_format, allow=allowed)

        return {name: opened(template) for name, (template, _) in self.test_templates.items()}

    @cached_property
    def judge_record(self) -> dict[str, Any]:
        """The record of the judge. Raises UserError as `find_judge`."""
        return record_of(find_judge(self.config.eval.judge, self.config.eval.allow, self.config.eval))

    @property
    def base(self) -> OpenModel:
        """The base model under a test template that uses its chat format, if there is one."""
        return min(self.opened.values(), key=lambda opened: opened.prompt_format.template.is_text)

    @cached_property
    def base_weights(self) -> Fingerprint:
        return weights_fingerprint(self.base.folder)

    @cached_property
    def base_fingerprints(self) -> tuple[str, str]:
        """Of the base model's weights and of its tokenizer."""
        return self.base_weights, tokenizer_fingerprint(self.base.folder)

    def mixture(self, name: str) -> Mixture:
        """The training examples under a template. Raises UserError for what it cannot express, and as `mix`."""
        c, parts = self.config.train, [(self.sources[text], parse_mix(text)) for text in self.config.mix]
        others = [TrainingSource(source, part.epochs, *part.find_template()) for source, part in parts]
        main = TrainingSource(self.sources["data"], c.epochs)
        return mix([main, *others], *self.training_format(name), c.too_long, c.train_on)

    def steps(self, mixture: Mixture, seed: int) -> list[Step]:
        """The optimizer steps of a run."""
        c, lengths = self.config.train, [len(e.ids) for e in mixture.examples]
        return list(
            order.plan(lengths, mixture.plans, seed, c.examples_per_step, c.tokens_per_step, c.max_steps, c.phases)
        )

    def training_format(self, name: str) -> tuple[PromptFormat, int]:
        """The prompt format of training under a template, and the maximum length of an example."""
        c, template = self.config.train, self.train_templates[name][0]
        opened = self._with_roles(template)
        prompt_format = open_prompt_format(
            self.base.folder,
            opened,
            c.template_family or self.sources["data"].family,
            _chat_format(c.chat_format, opened),
            allow_role_markers="role-markers" in c.allow,
            allow_chat_template="chat-template" in (*c.allow, *self.config.eval.allow),
        ).with_template(template)
        return prompt_format, length_limit(c.max_length, self.base.config.max_positions, c.micro_batch_tokens)

    @property
    def templates(self) -> dict[str, tuple[Template, Path | None]]:
        """Those of training, of tests, and of mixed-in data."""
        mixed = plan.load_mix_templates(self.config.mix)
        return plan.merge_templates(self.train_templates, self.test_templates, mixed)

    def _with_roles(self, template: Template) -> Template:
        """What the prompt format of a run is opened under: mixed-in data may have roles where the run has none."""
        return with_roles(template, *mix_templates(self.config.mix))

    def record(self) -> GridRecord:
        """The record of a grid of these settings."""
        templates, folder = self.templates, self.base.folder
        return GridRecord(
            config=self.config,
            environment=records.environment(),
            model=self.config.model,
            weights=self.base_weights,
            tokenizer=self.base_fingerprints[1],
            chat_format=self.base.prompt_format.chat_format.name,
            family=self.base.prompt_format.family.name,
            dtype=str(pick_dtype(self.config.eval.dtype)).removeprefix("torch."),
            templates={n: with_default_system_prompt(t, folder) for n, (t, _) in templates.items()},
            sources={name: source.fingerprint for name, source in self.sources.items()},
            tests={key: data.fingerprint for key, (_, data) in self.tasks.items()},
            tuned=fingerprints(self.tuned),
        )

    def check(self) -> None:
        """Raise UserError for mistakes that would otherwise show after training: in judge, similarity, templates, data
        and epochs."""
        say("checking all prompts and examples under every template")
        with settings_group("eval"):
            find_tools(self.config.eval, self.tasks, self.device)
            for (name, opened), (key, (task, data)) in product(self.opened.items(), self.tasks.items()):
                check_room(f"{key} under {name}", task, data, opened, self.config.eval, self.device)
        for name, (template, _) in self.templates.items():
            folder = self.base.folder
            if template.system == MODEL_DEFAULT and with_default_system_prompt(template, folder).system is None:
                say(f"note: {folder} has no default system prompt, so {name} is the same as without one")
        self.check_tuned()
        left = [model for model in self.runs if not self.is_trained(model)]
        for name in dict.fromkeys(model.template for model in left if model.template is not None):
            with settings_group("train"):
                mixture = self.mixture(name)
                if "val-data" in self.sources:
                    c, source = self.config.train, self.sources["val-data"]
                    prepare(source, *self.training_format(name), c.too_long, c.train_on)
            for model in left if self.config.at_epochs else ():
                if model.template == name:
                    epoch_folders(self.train_config(model), self.steps(mixture, model.seed))

    def agree(self) -> None:
        """Ask before money is spent; training here costs none."""

    def figures(self) -> dict[str, Any]:
        """What the results say besides of models that were asked for money."""
        return {}

    def notes(self) -> list[str]:
        """The same in lines of words."""
        return []

    def check_tuned(self) -> None:
        """Raise UserError for a model of somebody else's that does not fit the base model."""
        for name in self.tuned:
            self._tuned(name).check(self.base)


def _chat_format(asked: str | None, template: Template) -> str | None:
    """The chat format that is asked for, under a template that has one."""
    return None if template.is_text else asked


def _family(config: GridConfig) -> str | None:
    """The template family that the settings name."""
    return config.eval.template_family or config.train.template_family


def rows_checksum(raw: bytes) -> str:
    """Of a cell's file of judged answers."""
    return hashlib.sha256(raw).hexdigest()
