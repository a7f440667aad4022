"""A grid and its folder: which runs and cells it has, where they are on disk, which are finished.

    run.json                         the record: settings, templates, fingerprints of the data
    runs/<run>/                      a run folder of the trainer
    cells/<model>/<test>.<task>.json the figures of a cell; next to it its answers and judged rows (.jsonl)
    templates/                       training templates that the grid wrote: with the trigger of a defence
    locks/                           one for each run and cell that a worker is busy with; a killed worker's is released

A run or cell is finished when its last file, which is written atomically, exists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Self

from ptst import records
from ptst.data.sources import Source
from ptst.defense_names import NONE, TRIGGERED, WEIGHT_SPACE
from ptst.defenses.compose import Composition
from ptst.defenses.trigger import triggered
from ptst.errors import Setting, UserError, settings_group
from ptst.evaluation.answers import Asked
from ptst.evaluation.judges import find_judge
from ptst.evaluation.measure import check_room, find_tools, in_own_families, sampling_for
from ptst.evaluation.tasks.table import LoadedTasks
from ptst.evaluation.verdicts import record_of
from ptst.experiment import laptop, plan
from ptst.experiment.composed import Composer, depends_on
from ptst.experiment.config import GridConfig
from ptst.experiment.grid_record import GridRecord
from ptst.experiment.grid_sources import read_training
from ptst.experiment.grid_training import GridTraining
from ptst.experiment.ladder.in_grid import Rungs, read_ladder
from ptst.experiment.opened import family_of, in_own_format, open_tests, open_under
from ptst.experiment.paper.recipes import measures
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.tuned import HostedTuned, TunedModel, fingerprints, read_tuned
from ptst.fingerprints import Fingerprint, combined, tokenizer_fingerprint, weights_fingerprint
from ptst.model.quantized import described_dtype
from ptst.model.weights import pick_device, pick_dtype
from ptst.open import OpenModel
from ptst.progress import say
from ptst.records import FILE
from ptst.records import plain as as_json
from ptst.runs import find_shared
from ptst.text.prompt_format import PromptFormat, check_used
from ptst.text.templates import MODEL_DEFAULT, Template, find_family, with_default_system_prompt


@dataclass(frozen=True)
class Grid(GridTraining):
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
    rungs: Rungs = field(default_factory=dict)
    """Those of `test_templates` that are rungs of the ladder."""

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
        if TRIGGERED in config.defenses:
            for template, _ in (train | test).values():
                triggered(template, config.defense.trigger)
        trained, tested = ([template for template, _ in found.values()] for found in (train, test))
        with settings_group("eval"):
            check_used(config.eval.chat_format, *tested)
        with settings_group("train"):
            others = [template for template, _ in mixed.values()]
            check_used(settings.chat_format, *trained, *others, *([] if config.eval.chat_format else tested))
        say(f"reading {config.data} and the data of {', '.join(config.tasks)}")
        read = read_training(config)
        for name, source in read.items():
            if source.note:
                say(f"{name}: {source.note}")
        rungs = cls.read_ladder(config, trained, read["data"])
        test |= {name: (rung.template, None) for name, rung in rungs.items()}
        plan.check_distinct("template", [*train, *test])
        with settings_group("eval"):
            tasks = plan.load_suite(config, read["data"], laptop.families(config.laptop))
        for note in {data.note for _, data in tasks.values()} - {""}:
            say(note)
        tasks, tuned = cls.as_asked(config, tasks, trained), cls.read_tuned(config)
        models = plan.plan_models(list(train), config.seeds, config.at_epochs, tuned, config.defenses)
        cells = plan.plan_cells(models, list(test), list(tasks), rungs)
        cells = [c for c in cells if measures(config.recipe, c.model.is_base, c.model.defense, c.task)]
        device = pick_device()
        return cls(config, out, models, cells, tasks, train, test, read, device, tuned, rungs)

    @staticmethod
    def as_asked(config: GridConfig, tasks: LoadedTasks, trained: Sequence[Template]) -> LoadedTasks:
        """The tasks in the words in which these models are asked."""
        return tasks if trained or family_of(config) else in_own_families(tasks)

    @staticmethod
    def read_ladder(config: GridConfig, trained: Sequence[Template], data: Source) -> Rungs:
        """Raises UserError as `read_ladder`."""
        family = find_family(config.train.template_family or data.family)
        return read_ladder(config.ladder, trained, family, data.conversations, config.ladder_paraphrases)

    @staticmethod
    def read_tuned(config: GridConfig) -> Mapping[str, TunedModel | HostedTuned]:
        """Raises UserError as `read_tuned`."""
        return read_tuned(config.tuned)

    def weights_folder(self, model: GridModel) -> Path:
        """The base model's folder, or where a run's weights are after the model's epochs, or those of another model."""
        assert not model.is_composed, "its weights are in no folder"
        if model.tuned is not None:
            return self._tuned(model.tuned).folder
        run = self.base.folder if model.is_base else self.run_folder(model)
        return run if model.epochs is None else run / plan.epoch_name(model.epochs)

    def is_adapter(self, model: GridModel) -> bool:
        """Whether a model is an adapter over the base model."""
        if model.tuned is not None:
            return not self._tuned(model.tuned).full
        return not model.is_base and not model.is_composed and not self.config.train.full

    def _tuned(self, name: str) -> TunedModel:
        model = self.tuned[name]
        assert isinstance(model, TunedModel), "an endpoint's are in a HostedGrid"
        return model

    def weights(self, model: GridModel) -> Fingerprint:
        """Of a model's files, or of those that it is composed of, read anew."""
        if model.is_composed:
            return Fingerprint(self.composition(model).fingerprint)
        return weights_fingerprint(self.weights_folder(model))

    def composition(self, model: GridModel) -> Composition:
        """What a composed model is made of; its run must be finished. Raises UserError as `Composer.compose`."""
        return self.composer.compose(model.defense, self.weights_folder(replace(model, defense=NONE)))

    @cached_property
    def composer(self) -> Composer:
        """Composes the models of defences in weight space."""
        return Composer(self.config.model, self.base.folder, self.config.defended, self.device)

    def answers_model(self, weights: str) -> str:
        """The fingerprint of all that a model's answers depend on besides prompt and sampling; `weights`: its own."""
        base, tokenizer = self.base_fingerprints
        held = [] if self.quantize == "none" else [self.quantize]
        return combined(base, weights, tokenizer, str(pick_dtype(self.config.eval.dtype)), *held)

    @property
    def quantize(self) -> str:
        """How the base's projections are rounded in tests: as asked, else as in training."""
        return self.config.eval.quantize or self.config.train.quantize

    def asked(self, cell: GridCell, weights: str) -> Asked:
        """What the answers of a cell depend on; `weights`: of its model. Raises UserError as `Prompt.encode`."""
        task, data = self.tasks[cell.task]
        sampling, prompt_format = sampling_for(self.config.eval, data), self.opened[cell.asked].prompt_format
        return Asked.of(task.prompts(data.items), prompt_format, sampling, self.answers_model(weights))

    def tested_with(self, asked: str) -> dict[str, Any]:
        """What the figures of every cell asked under a template depend on, besides its model, prompts and judge."""
        prompt_format = self.opened[asked].prompt_format
        base, tokenizer = self.base_fingerprints
        return {
            "base": base,
            "tokenizer": tokenizer,
            "template": as_json(prompt_format.template),
            "chat_format": prompt_format.chat_format.name,
            "dtype": described_dtype(pick_dtype(self.config.eval.dtype), self.quantize),
        }

    @cached_property
    def opened(self) -> dict[str, OpenModel]:
        """The base model under each test template, and under each with the trigger where there is one. Raises
        UserError as `open_model`."""
        return open_tests(self.config, self.train_templates, self.test_templates, self.rungs, self._family)

    @property
    def _family(self) -> str | None:
        """Of all prompts. Without any training, what the models were trained on is unknown: None."""
        return family_of(self.config) or (self.sources["data"].family if self.train_templates else None)

    @cached_property
    def judge_record(self) -> dict[str, Any]:
        """The record of the judge. Raises UserError as `find_judge`."""
        return record_of(find_judge(self.config.eval.judge, self.config.eval.allow, self.config.eval))

    @cached_property
    def base(self) -> OpenModel:
        """The base model under a test template that uses its own chat format, if there is one."""
        own = list(in_own_format(self.opened, self.test_templates, self.rungs))
        if not own:  # a rung in another chat format is all that is tested
            own = [open_under(self.config, t, self._family) for t, _ in self.train_templates.values()]
        return min(own, key=lambda opened: opened.prompt_format.template.is_text)

    @cached_property
    def base_weights(self) -> Fingerprint:
        return weights_fingerprint(self.base.folder)

    @cached_property
    def base_fingerprints(self) -> tuple[str, str]:
        """Of the base model's weights and of its tokenizer."""
        return self.base_weights, tokenizer_fingerprint(self.base.folder)

    def trained_with(self, cell: GridCell) -> PromptFormat | None:
        """The prompt format with which a cell's own is compared: that of its model's training; of a model without one
        in this grid, under a rung, that of the training that the rung was made from."""
        rung = self.rungs.get(cell.test)
        name = cell.model.template or (rung.training if rung else None)
        return None if name is None else self.training_formats[name]

    @property
    def templates(self) -> dict[str, tuple[Template, Path | None]]:
        """Those of training, of tests, and of mixed-in data."""
        mixed = plan.load_mix_templates(self.config.mix)
        return plan.merge_templates(self.train_templates, self.test_templates, mixed)

    @property
    def depends_on(self) -> dict[str, dict[str, Any]]:
        """What each defence depends on. Raises UserError for a model that is not there."""
        return {name: depends_on(name, self.config.defended) for name in self.config.defenses if name != NONE}

    def record(self) -> GridRecord:
        """The record of a grid of these settings."""
        folder = self.base.folder
        trained = {n: with_default_system_prompt(t, folder) for n, (t, _) in self.templates.items()}
        return GridRecord(
            config=self.config,
            environment=records.environment(),
            model=self.config.model,
            weights=self.base_weights,
            tokenizer=self.base_fingerprints[1],
            chat_format=self.base.prompt_format.chat_format.name,
            family=self.base.prompt_format.family.name,
            dtype=described_dtype(pick_dtype(self.config.eval.dtype), self.quantize),
            templates=trained | {name: model.prompt_format.template for name, model in self.opened.items()},
            sources={name: source.fingerprint for name, source in self.sources.items()},
            tests={key: data.fingerprint for key, (_, data) in self.tasks.items()},
            tuned=fingerprints(self.tuned),
            defenses=self.depends_on,
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
        self.check_training()

    def agree(self) -> None:
        """Ask before money is spent; training here costs none."""

    def figures(self) -> dict[str, Any]:
        """What the results say besides of models that were asked for money."""
        return {}

    def notes(self) -> list[str]:
        """The same in lines of words."""
        return []

    def check_composed(self, aligned: bool = True) -> None:
        """Raise UserError for a model that a defence in weight space needs and that does not fit the base model.
        `aligned`: the base model is the aligned one, not the one that is to be aligned."""
        if composed := [name for name in self.config.defenses if name in WEIGHT_SPACE]:
            self.composer.check(composed, aligned)

    def check_tuned(self) -> None:
        """Raise UserError for a model of somebody else's that does not fit the base model."""
        for name in self.tuned:
            self._tuned(name).check(self.base)
