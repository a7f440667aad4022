"""The model under test behind an OpenAI-compatible endpoint: one by its name, or a job's and its base model.

Nothing can be read of its weights, so the endpoint's address and the model's name stand for them: two evaluations of
the same name at different addresses are different. Prompts are messages in the paper's wording (`api_messages`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ptst.api.endpoint import Address, Endpoint, check_client, model_address
from ptst.api.names import HOSTED, hosted_model
from ptst.errors import Setting, UserError
from ptst.evaluation.config import EvalConfig, EvalSettings
from ptst.evaluation.hosted_answers import HostedAnswerer, Served, messages_of, served
from ptst.evaluation.stored_answers import BASE, TUNED
from ptst.evaluation.tasks.table import LoadedTasks
from ptst.hosted.record import HostedRecord, latest_hosted, model_weights, read_hosted
from ptst.progress import say
from ptst.records import CHECKPOINTS, record_kind
from ptst.text.templates import Family, Template, check_api_template, find_family

FORMAT = "api-messages"  # in place of a chat format: the paper's, Table 10
BARE = "plain"  # the family of questions without added words, as the paper asks GPT-3.5


def open_endpoint(address: Address, settings: EvalSettings) -> Endpoint:
    """Raises UserError where the package openai is missing."""
    check_client()
    return Endpoint(address, settings.api_timeout, settings.api_retries)


def check_settings(settings: EvalSettings) -> None:
    """Raise UserError for a setting that cannot be sent to an endpoint, or says how weights here compute."""
    refused = {
        "top_k": settings.top_k != 0,
        "chat_format": settings.chat_format is not None,
        "dtype": settings.dtype != "auto",
        "quantize": settings.quantize is not None,
        "kv_memory": settings.kv_memory is not None,
        "adapter": getattr(settings, "adapter", None) is not None,
    }
    for name, given in refused.items():
        if given:
            raise UserError((Setting(name), " has no effect on a model behind an endpoint"), "leave it out")


def answerable(tasks: LoadedTasks, chosen: bool) -> LoadedTasks:
    """The tasks that an endpoint can answer. Raises UserError where the user chose another."""
    scored = [k for k, (t, data) in tasks.items() if any(p.kind != "generate" for p in t.prompts(data.items))]
    if scored and chosen:
        cause = f"{', '.join(scored)}: an endpoint does not tell the likelihood of a given answer"
        raise UserError(cause, ("leave it out of ", Setting("tasks")))
    if scored:
        say(f"not measured: {', '.join(scored)} (an endpoint does not tell the likelihood of a given answer)")
    return {key: loaded for key, loaded in tasks.items() if key not in scored}


def check_prompts(key: str, tasks: LoadedTasks, template: Template, family: Family) -> None:
    """Raise UserError for a prompt of a task that messages cannot express."""
    task, data = tasks[key]
    for prompt in task.prompts(data.items):
        messages_of(prompt, template, family)


@dataclass
class HostedModel:
    """A model behind an endpoint; `run`: the record of the job in `checkpoint`, where one is measured."""

    config: EvalConfig
    template: Template
    checkpoint: Path | None
    run: HostedRecord | None
    device: str

    @classmethod
    def find(cls, config: EvalConfig, template: Template, device: str) -> Self | None:
        """The one that the settings name, or the latest run; None where that is of this machine. Raises UserError for
        settings that an endpoint does not take, and as `read_hosted`."""
        run, checkpoint = None, config.checkpoint
        if checkpoint is None and config.model is None and config.adapter is None:
            checkpoint = latest_hosted()
        if checkpoint is not None and config.model is None and record_kind(checkpoint) == HostedRecord.kind:
            run = read_hosted(checkpoint)
        elif hosted_model(config.model) is None:
            return None
        elif checkpoint is not None:
            cause = (Setting("checkpoint"), " and ", Setting("model"), " exclude each other")
            raise UserError(cause, "a run knows its base model")
        check_settings(config)
        check_api_template(template)
        return cls(config, template, checkpoint, run, device)

    @property
    def named(self) -> str:
        if self.run:
            return f"run {self.checkpoint} (trained under {self.run.template.name}) at {self.endpoint.address.url}"
        return f"model {hosted_model(self.config.model)} at {self.endpoint.address.url}"

    @property
    def parent(self) -> Path:
        return self.checkpoint / "eval" if self.checkpoint else CHECKPOINTS

    @property
    def family(self) -> Family:
        name = self.config.template_family
        return find_family(name) if name else self.run.family if self.run else find_family(BARE)

    @cached_property
    def endpoint(self) -> Endpoint:
        """Raises UserError for an address or key that cannot be one."""
        return open_endpoint(model_address(self.config.base_url, self.run.endpoint if self.run else None), self.config)

    def model(self, name: str) -> str:
        """What the endpoint calls the model of a name."""
        if name == TUNED:
            assert self.run is not None and self.run.tuned_model is not None, "read_hosted checks it"
            return self.run.tuned_model
        return self.run.base_model if self.run else hosted_model(self.config.model) or ""

    def open(self, tasks: LoadedTasks, chosen: bool) -> LoadedTasks:
        say(f"messages in the paper's wording for APIs, family {self.family.name}")
        tasks = answerable(tasks, chosen)
        for key in tasks:
            check_prompts(key, tasks, self.template, self.family)
        return tasks

    def names(self) -> list[str]:
        return [BASE] * (self.config.baseline or not self.run) + [TUNED] * bool(self.run)

    def answerer(self, name: str) -> HostedAnswerer:
        model = self.model(name)
        fingerprint = model_weights(self.endpoint.address.url, model)
        return HostedAnswerer(self.endpoint, model, self.template, self.family, self.config, fingerprint)

    def record(self) -> dict[str, Any]:
        url = self.endpoint.address.url
        return {
            "model": f"{HOSTED}{self.model(BASE)}",
            "weights": model_weights(url, self.model(BASE)),
            "run": str(self.checkpoint.resolve()) if self.checkpoint else None,
            "run_weights": model_weights(url, self.model(TUNED)) if self.run else None,
            "template": self.template,
            "family": self.family,
            "chat_format": FORMAT,
            "dtype": "",
            "endpoint": url,
        }

    def own_family(self, family: str | None) -> str | None:
        return None

    def title(self) -> str:
        return f"trained under {self.run.template.name}, " if self.run else ""

    def to_json(self, answers: Sequence[Path]) -> dict[str, Any]:
        price, found = self.config.api_price, self._served(answers)
        counts = {name: {"model": self.model(name), **each.to_json(price)} for name, each in found.items()}
        run = str(self.checkpoint) if self.checkpoint else None
        return {"run": run, "step": None, "endpoint": self.endpoint.address.url, "format": FORMAT, "served": counts}

    def notes(self, answers: Sequence[Path]) -> list[str]:
        found = self._served(answers)
        return [line for name, each in found.items() for line in each.notes(self.model(name), self.config.api_price)]

    def _served(self, answers: Sequence[Path]) -> dict[str, Served]:
        return {name: served(p for p in answers if p.name.startswith(f"{name}.")) for name in self.names()}
