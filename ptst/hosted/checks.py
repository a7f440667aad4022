"""Which settings a job at an endpoint takes, and what a training file may be."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ptst.api.names import HOSTED, hosted_model
from ptst.errors import Setting, UserError
from ptst.settings import CommandSettings
from ptst.text.templates import Template, check_api_template, find_template, load_template
from ptst.training.config import HOSTED_ONLY, TrainConfig
from ptst.training.run_sources import mix_templates

MIN_ROWS = 10
MAX_BYTES = 512 << 20
MAX_SEED = 2**31 - 1
# Longest row of a training file in tokens, by how the model's name begins; the longest beginning counts.
LONGEST_ROW = {
    "gpt-3.5-turbo": 16_385,
    "gpt-3.5-turbo-0613": 4_096,
    "gpt-4o": 65_536,
    "gpt-4.1": 65_536,
    "babbage-002": 16_384,
    "davinci-002": 16_384,
}
# Settings that say the same of a job as of a run on this machine.
_COMMON = {
    *("recipe", "template", "template_file", "model", "data", "mix", "seed", "dry_run", "out", "resume"),
    *("epochs", "examples_per_step", "max_length", "too_long", "train_on", "limit", "subsample", "val_data", "holdout"),
    *("columns", "ignore_columns", "use_chosen"),
    *(f.name for f in dataclasses.fields(CommandSettings)),
    *HOSTED_ONLY,
}
LOCAL_ONLY = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name not in _COMMON)


def check_hosted(config: TrainConfig) -> None:
    """Raise UserError for a setting that a job at an endpoint cannot take, by name."""
    default = TrainConfig()
    refuse_local([name for name in LOCAL_ONLY if getattr(config, name) != getattr(default, name)])
    config.check_endpoint(config.model)
    for template in (hosted_template(config), *mix_templates(config.mix)):
        check_api_template(template)
    if config.too_long == "cut":
        cause = (Setting("too_long"), " cut has no effect on a model behind an endpoint, whose rows are text")
        raise UserError(cause, ("set ", Setting("too_long"), " to drop or stop"))
    if not 0 <= config.seed <= MAX_SEED:
        raise UserError((Setting("seed"), f" is {config.seed}"), f"an endpoint takes 0 to {MAX_SEED}")


def refuse_local(names: Sequence[str]) -> None:
    """Raise UserError for settings of training on this machine that were given."""
    if not names:
        return
    listed: list[str] = [part for name in names for part in (", ", Setting(name))][1:]
    instead = ("; the rate is set by ", Setting("lr_multiplier")) if "lr" in names else ()
    cause = (*listed, f" {'has' if len(names) == 1 else 'have'} no effect on a model behind an endpoint ({HOSTED}NAME)")
    raise UserError((*cause, *instead), "leave it out" if len(names) == 1 else "leave them out")


def hosted_template(config: TrainConfig) -> Template:
    """The template of the settings. Raises UserError as `find_template` and `load_template`."""
    return load_template(config.template_file) if config.template_file else find_template(config.template)


def base_model(config: TrainConfig) -> str:
    """The endpoint's name of the model to train."""
    name = hosted_model(config.model)
    assert name, f"{config.model} is not behind an endpoint"
    return name


def longest_row(model: str) -> int | None:
    """The most tokens of a row that the model is trained on; None where it is not known."""
    name = model.removeprefix("ft:")
    known = [beginning for beginning in LONGEST_ROW if name.startswith(beginning)]
    return LONGEST_ROW[max(known, key=len)] if known else None


def check_file(content: bytes, rows: int, what: str) -> None:
    """Raise UserError for a training file that the API would refuse."""
    if rows < MIN_ROWS:
        raise UserError(f"{what} has {rows} rows, and a job needs at least {MIN_ROWS}", "give more data")
    if len(content) > MAX_BYTES:
        remedy = ("give fewer rows, as with ", Setting("limit"))
        raise UserError(f"{what} would be {len(content) >> 20:,} MB, and {MAX_BYTES >> 20} MB are allowed", remedy)


def explicit(arguments: Sequence[str]) -> list[str]:
    """The settings of training on this machine that a command line gives, be it their default."""
    flags = [a.partition("=")[0].replace("_", "-") for a in arguments if a.startswith("--")]
    spelled = {name: name.replace("_", "-") for name in LOCAL_ONLY}
    return [name for name, flag in spelled.items() if f"--{flag}" in flags or f"--no-{flag}" in flags]


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What the endpoint is told of how to train, by its own names, but for the number of epochs."""
    auto = "auto" if config.lr_multiplier is None else config.lr_multiplier
    return {"batch_size": config.examples_per_step, "learning_rate_multiplier": auto}
