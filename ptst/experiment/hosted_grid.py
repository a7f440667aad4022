"""A grid of models behind an endpoint: every training is a job there, every cell its answers to messages.

It differs from a grid of this machine only in who trains and who answers. Nothing can be read of weights there: the
endpoint's address and a model's name stand for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ptst import records
from ptst.api.endpoint import Endpoint, model_address
from ptst.api.names import HOSTED, hosted_model
from ptst.api.replies import Usage
from ptst.consent import ask_consent
from ptst.data.sources import Source
from ptst.defense_names import TRIGGERED
from ptst.defenses.trigger import triggered
from ptst.errors import Setting, UserError, settings_group
from ptst.evaluation.answers import Asked
from ptst.evaluation.hosted import (
    BARE,
    FORMAT,
    answerable,
    check_prompts,
    check_settings,
    open_endpoint,
)
from ptst.evaluation.hosted_answers import HostedAnswerer, Served, messages_of, served
from ptst.evaluation.measure import decodings, find_tools, sampling_for
from ptst.evaluation.tasks.table import LoadedTasks
from ptst.experiment.config import GridConfig
from ptst.experiment.grid import Grid
from ptst.experiment.grid_record import GridRecord
from ptst.experiment.ladder.in_grid import Rungs, read_ladder
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.tuned import HostedTuned, fingerprints, tuned_settings
from ptst.fingerprints import Fingerprint
from ptst.hosted.record import HostedRecord, model_weights, read_hosted
from ptst.progress import console, say
from ptst.records import find_record, plain, record_kind
from ptst.text.templates import Family, Template, check_api_template, find_family
from ptst.training.config import TrainConfig

if TYPE_CHECKING:
    from ptst.hosted.plan import HostedPlan
    from ptst.hosted.tokens import TokenCounter


@dataclass(frozen=True)
class HostedGrid(Grid):
    """Everything that a grid of models behind an endpoint consists of. Raises UserError, where its address or key is
    first needed, for one that cannot be."""

    @staticmethod
    def as_asked(config: GridConfig, tasks: LoadedTasks, trained: Sequence[Template]) -> LoadedTasks:
        """Raises UserError for a task that an endpoint cannot answer."""
        return answerable(tasks, chosen=True)

    @staticmethod
    def read_tuned(config: GridConfig) -> Mapping[str, HostedTuned]:
        """Models by the endpoint's names (NAME=openai:MODEL), or of jobs' runs (NAME=FOLDER). Raises UserError for
        anything else, and for a run of another endpoint."""
        settings = tuned_settings(config.tuned)
        url = model_address(config.base_url).url if settings else ""
        return {name: _tuned(name, where, url) for name, where in settings.items()}

    @staticmethod
    def read_ladder(config: GridConfig, trained: Sequence[Template], data: Source) -> Rungs:
        """Raises UserError as `read_ladder`, and for another chat format, which an endpoint does not write."""
        family = find_family(config.train.template_family or BARE)
        return read_ladder(config.ladder, trained, family, data.conversations, config.ladder_paraphrases, hosted=True)

    @property
    def family(self) -> Family:
        return find_family(self.config.eval.template_family or BARE)

    @cached_property
    def endpoint(self) -> Endpoint:
        with settings_group("eval"):
            return open_endpoint(model_address(self.config.base_url), self.config.eval)

    @property
    def url(self) -> str:
        return self.endpoint.address.url

    def name_of(self, model: GridModel) -> str:
        """What the endpoint calls a model. Its run must be finished."""
        if model.tuned is not None:
            tuned = self.tuned[model.tuned]
            assert isinstance(tuned, HostedTuned)
            return tuned.model
        if model.is_base:
            return hosted_model(self.config.model) or ""
        record = self.run_record(model)
        assert record is not None and record.tuned_model is not None, f"{model.run} is not trained"
        return record.tuned_model

    def weights(self, model: GridModel) -> Fingerprint:
        return Fingerprint(model_weights(self.url, self.name_of(model)))

    @cached_property
    def base_weights(self) -> Fingerprint:
        return self.weights(GridModel())

    def answers_model(self, weights: str) -> str:
        return weights

    @cached_property
    def asked_templates(self) -> dict[str, Template]:
        """The templates in whose words models are asked: the test templates, and each with the trigger where there is
        one."""
        found = {name: template for name, (template, _) in self.test_templates.items()}
        if TRIGGERED in self.config.defenses:
            own = [triggered(template, self.config.defense.trigger) for template in found.values()]
            found |= {template.name: template for template in own}
        return found

    def tested_with(self, asked: str) -> dict[str, Any]:
        template = plain(self.asked_templates[asked])
        return {"base": self.base_weights, "tokenizer": None, "template": template, "chat_format": FORMAT, "dtype": ""}

    def answerer(self, cell: GridCell) -> HostedAnswerer:
        """What answers in a cell."""
        name, template = self.name_of(cell.model), self.asked_templates[cell.asked]
        fingerprint = model_weights(self.url, name)
        return HostedAnswerer(self.endpoint, name, template, self.family, self.config.eval, fingerprint)

    def asked(self, cell: GridCell, weights: str) -> Asked:
        task, data = self.tasks[cell.task]
        return self.answerer(cell).asked(task.prompts(data.items), sampling_for(self.config.eval, data))

    def record(self) -> GridRecord:
        return GridRecord(
            config=self.config,
            environment=records.environment(),
            model=self.config.model,
            weights=self.base_weights,
            chat_format=FORMAT,
            family=self.family.name,
            dtype="",
            templates={n: t for n, (t, _) in self.templates.items()} | self.asked_templates,
            sources={name: source.fingerprint for name, source in self.sources.items()},
            tests={key: data.fingerprint for key, (_, data) in self.tasks.items()},
            tuned=fingerprints(self.tuned),
            defenses=self.depends_on,
            endpoint=self.url,
        )

    # Training

    def train_config(self, model: GridModel) -> TrainConfig:
        """The settings of a run's job; all jobs of the grid were agreed to."""
        assert model.template is not None
        c, path = self.config, self.train_templates[model.template][1]
        return TrainConfig(
            **vars(c.train) | self.changes(model).settings,
            template=TrainConfig.template if path else model.template,
            template_file=path,
            model=c.model,
            base_url=c.base_url,
            data=c.data,
            mix=(*c.mix, *self.changes(model).mix),
            seed=model.seed,
            yes=True,
            new_job=c.new_job,
            out=self.run_folder(model),
        )

    def run_record(self, model: GridModel) -> HostedRecord | None:
        return find_record(self.run_folder(model), HostedRecord)

    def run_figures(self, model: GridModel) -> dict[str, Any]:
        record = self.run_record(model)
        assert record is not None, "all runs are finished"
        result = record.result or {}
        counts = {"steps": result.get("steps"), "examples": None, "tokens": None}
        loss = {"before": None, "after": result.get("validation_loss")}
        told = {"model": record.tuned_model, "trained_tokens": record.trained_tokens, "cost": record.cost}
        return {**counts, **told, "validation_loss": loss}

    @cached_property
    def plans(self) -> dict[str, "HostedPlan"]:
        """The jobs of the runs that are not finished. Raises UserError as `plan_hosted`."""
        from ptst.hosted.plan import plan_hosted

        left = [model for model in self.runs if not self.is_trained(model)]
        with settings_group("train"), TemporaryDirectory() as folder:  # nothing of a plan stays on the disk
            return {model.run: plan_hosted(self._planned(model, Path(folder))) for model in left}

    def _planned(self, model: GridModel, folder: Path) -> TrainConfig:
        """The settings of a run's job, the training template with the trigger in a folder of its own."""
        elsewhere = replace(self, out=folder)
        elsewhere.write_template(model)
        return replace(self.train_config(model), mix=elsewhere.train_config(model).mix)

    # Before anything is sent

    def check(self) -> None:
        say("checking all prompts and rows under every template")
        with settings_group("eval"):
            check_settings(self.config.eval)
            find_tools(self.config.eval, self.tasks, self.device)
            for template, _ in self.templates.values():
                check_api_template(template)
            for template in self.asked_templates.values():
                for key in self.tasks:
                    check_prompts(key, self.tasks, template, self.family)
        if self.config.at_epochs:
            cause = (Setting("at_epochs"), " has no effect on jobs at an endpoint, which are tested at their end")
            raise UserError(cause, "leave it out")

    def agree(self) -> None:
        """Ask once for all jobs that are still to be started, with their sum. Raises UserError unless somebody at a
        terminal, or the setting `yes`, agrees."""
        new = {run: plan for run, plan in self.plans.items() if not self._has_job(run)}
        if not new:
            return
        for run, plan in new.items():
            console.print(f"job {run}: {plan.rows:,} rows, {plan.tokens:,} tokens{_cost(plan.cost)}")
        left = [self.size(cell.asked, cell.task) for cell in self.cells if not self.is_measured(cell)]
        asked = Usage(sum(u.replies for u in left), sum(u.tokens_in for u in left), sum(u.tokens_out for u in left))
        price = self.config.eval.api_price
        costs = [*(plan.cost for plan in new.values()), None if price is None else asked.cost(price)]
        trained = sum(plan.tokens for plan in new.values())
        known = [cost for cost in costs if cost is not None]
        total = sum(known) if len(known) == len(costs) else None
        console.print(
            f"answers: {asked.replies:,} requests, {asked.tokens_in + asked.tokens_out:,} tokens{_cost(costs[-1])}"
        )
        told = "no prices were given" if total is None else _cost(total).removeprefix(", ")
        console.print(f"in all at {self.url}: {len(new)} jobs of {trained:,} tokens, and the answers: {told}")
        console.print(f"(tokens: {self.counter.name}; answers at their longest)")
        if self.config.yes:
            return
        question, refused = "Send the files and start these jobs?", "nothing was sent, and no job was started"
        ask_consent(f"jobs at {self.url} cost money", "the plan", question, refused)

    def _has_job(self, run: str) -> bool:
        """Whether a job goes on that was agreed to."""
        record = find_record(self.out / "runs" / run, HostedRecord)
        return record is not None and record.job is not None and not self.config.new_job

    @cached_property
    def counter(self) -> "TokenCounter":
        from ptst.hosted.tokens import find_counter

        return find_counter(hosted_model(self.config.model) or "")

    def size(self, asked: str, task: str) -> Usage:
        """Requests and tokens of a cell, the answers at their longest."""
        if (asked, task) not in self._sizes:
            loaded, data = self.tasks[task]
            template = self.asked_templates[asked]
            prompts = [messages_of(p, template, self.family) for p in loaded.prompts(data.items)]
            times = len(decodings(self.config.eval, loaded, data))
            new = len(prompts) * sampling_for(self.config.eval, data).max_new_tokens
            self._sizes[asked, task] = Usage(times * len(prompts), times * sum(self.counter.rows(prompts)), times * new)
        return self._sizes[asked, task]

    @cached_property
    def _sizes(self) -> dict[tuple[str, str], Usage]:
        return {}

    # Afterwards

    def figures(self) -> dict[str, Any]:
        price = self.config.eval.api_price
        counts = {name: each.to_json(price) for name, each in self._served().items()}
        return {"endpoint": self.url, "format": FORMAT, "served": counts}

    def notes(self) -> list[str]:
        price = self.config.eval.api_price
        return [line for name, each in self._served().items() for line in each.notes(name, price)]

    def _served(self) -> dict[str, Served]:
        """Of all answers of each model, by its name at the endpoint."""
        files: dict[str, list[Path]] = {}
        for cell in self.cells:
            files.setdefault(self.name_of(cell.model), []).append(self.cell_file(cell, "answers.jsonl"))
        return {name: served(of_model) for name, of_model in files.items()}


def _cost(cost: float | None) -> str:
    return "" if cost is None else f", cost at most {cost:,.4f}"


def _tuned(name: str, where: str, url: str) -> HostedTuned:
    model, run = hosted_model(where), None
    if model is None:
        if record_kind(Path(where)) != HostedRecord.kind:
            cause = f"{where} is no run of a job at an endpoint, and the base model of this grid is behind one"
            raise UserError(cause, ("give ", Setting("tuned"), f" NAME={HOSTED}MODEL, or such a run's folder"))
        run = read_hosted(Path(where))
        model = run.tuned_model or ""
        if run.endpoint != url:
            raise UserError(f"{where} was trained at {run.endpoint}, and the grid's endpoint is {url}")
    if not model:
        raise UserError((Setting("tuned"), f" {name} names no model"), f"it must be NAME={HOSTED}MODEL")
    return HostedTuned(name, model, model_weights(url, model), run)
