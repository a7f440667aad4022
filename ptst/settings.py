"""Settings that several commands share, each defined once. A command's configuration inherits the groups that it takes
and adds its own, so that a setting has the same name, type, meaning and check everywhere, in Python as on the command
line. Nothing here imports torch: a command line is parsed, and a typo answered, without it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg

from ptst.api.names import HOSTED, hosted_model
from ptst.data.columns import ColumnRules
from ptst.errors import Setting, UserError
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.detect import DERIVED
from ptst.text.templates import FAMILIES, TEMPLATES

EMBEDDED_MODEL = "smollm2-135m-instruct"
_TEMPLATE_HELP = f"{', '.join(TEMPLATES)}. A bare name means chat:."
_FAMILY_HELP = f"How a question is wrapped: {', '.join(FAMILIES)}."
_HUB_HELP = "a hub id (org/name, org/name@revision)"
_LOCAL_HELP = f"Model: {EMBEDDED_MODEL} (embedded), a Hugging Face folder, or {_HUB_HELP}."
_MODEL_HELP = (
    f"Model: {EMBEDDED_MODEL} (embedded), a Hugging Face folder, {_HUB_HELP}, or {HOSTED}NAME, one behind an "
    "OpenAI-compatible endpoint (docs/endpoints.md)."
)
_FORMAT_HELP = (
    f"Chat format, how the model family spells roles: {', '.join(CHAT_FORMATS)}, or {DERIVED} (from its chat template)."
)

# Of an Optional, tyro shows the help of the whole type, not that of its part in `| None`. Local: not openai:NAME.
TrainTemplate = Annotated[str, arg(help=f"Training template: {_TEMPLATE_HELP}")]
OptionalTrainTemplate = Annotated[str | None, arg(help=f"Training template: {_TEMPLATE_HELP}")]
TestTemplate = Annotated[str, arg(help=f"Test template: {_TEMPLATE_HELP}")]
OptionalTestTemplate = Annotated[str | None, arg(help=f"Test template: {_TEMPLATE_HELP}")]
ModelName = Annotated[str, arg(help=_MODEL_HELP)]
OptionalModel = Annotated[str | None, arg(help=_MODEL_HELP)]
LocalModel = Annotated[str, arg(help=_LOCAL_HELP)]
OptionalLocalModel = Annotated[str | None, arg(help=_LOCAL_HELP)]
_ADAPTER_HELP = "LoRA adapter of --model in PEFT's layout, whoever made it: a folder, or a hub id (docs/adapters.md)."
AdapterName = Annotated[str | None, arg(help=_ADAPTER_HELP)]
FamilyName = Annotated[str | None, arg(help=f"{_FAMILY_HELP} Default: that of the data.")]
FormatName = Annotated[str | None, arg(help=f"{_FORMAT_HELP} Default: that of the model folder.")]
Precision = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["none", "nf4", "int8"]
LoggerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]

# What a setting means for whether two runs are the same (ptst.runs); without a mark it must agree.
NO_EFFECT = {"effect": "none"}  # where, how fast and how results are written
ROUNDING = {"effect": "rounding"}  # the order of floating-point sums alone


def content(of: str) -> dict[str, str]:
    """A name of something: what must agree is the content, which the record's field `of` fingerprints."""
    return {"effect": "content", "of": of}


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """How a command reads its settings and prints its result."""

    config: Path | None = None
    """TOML file of settings, or the run.json of an earlier run. Flags on the command line take precedence."""
    print_config: bool = False
    """Print the settings as TOML and exit."""
    debug: bool = False
    """Show the traceback of every error."""
    json: bool = False
    """Print the result as one JSON object on standard output."""


@dataclass(frozen=True, kw_only=True)
class RevisionSettings:
    """Which state of a model on the hub: a part of its name, so that a record of the name has it."""

    revision: str | None = None
    """Branch, tag or commit of a hub model: short for --model org/name@revision."""

    def __post_init__(self) -> None:
        if self.revision is not None:
            if hosted_model(getattr(self, "model", None)) is not None:
                raise UserError((Setting("revision"), f" has no effect on a model behind an endpoint ({HOSTED}NAME)"))
            object.__setattr__(self, "model", f"{getattr(self, 'model', None) or ''}@{self.revision}")
            object.__setattr__(self, "revision", None)


@dataclass(frozen=True, kw_only=True)
class ThreadSettings:
    """What computing on a CPU may take."""

    threads: int | None = field(default=None, metadata=NO_EFFECT)  # a record's environment has the number
    """CPU threads to compute with; the last digits of results depend on it. Default: OMP_NUM_THREADS, that of the run
    to resume, or what is fastest just now (measured)."""


@dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """Which template; each command has its own default."""

    template: TestTemplate = field(default="chat:llama", metadata=content("template"))
    template_file: Path | None = field(default=None, metadata=content("template"))
    """Template of your own, in TOML, instead of --template (docs/templates.md)."""


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """In which other tools' forms results are written, too."""

    inspect_log: bool = field(default=False, metadata=NO_EFFECT)
    """Write .eval logs, too, one per model and task, for inspect_ai's viewer and scorers (docs/inspect.md)."""


@dataclass(frozen=True, kw_only=True)
class FormatSettings:
    """How template and model family are put together."""

    template_family: FamilyName = field(default=None, metadata=content("family"))
    chat_format: FormatName = field(default=None, metadata=content("chat_format"))
    allow: tuple[str, ...] = field(default=(), metadata=NO_EFFECT)
    """Checks that may fail: chat-template, for a chat format that is not the one of the folder's chat template."""


@dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """How the columns of data are read (docs/data.md)."""

    columns: tuple[str, ...] = ()
    """Names of columns that no rule knows: question=prompt,answer=reply reads the column prompt as the question."""
    ignore_columns: tuple[str, ...] = ()
    """Columns, and keys of messages, to leave out. Without this, one that may belong to the prompt or the loss is
    refused."""
    use_chosen: bool = False
    """Of preference pairs (chosen, rejected), read the chosen answer."""

    @property
    def column_rules(self) -> ColumnRules:
        """What they say of columns. Raises UserError for what is no name."""
        return ColumnRules.of(self.columns, self.ignore_columns, self.use_chosen)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How answers are drawn."""

    max_new_tokens: int | None = None
    """Maximum length of an answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this total probability (nucleus sampling)."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What answering may take."""

    batch_size: int = field(default=64, metadata=NO_EFFECT)
    """Maximum number of concurrent sequences (affects speed and memory, not results)."""
    kv_memory: float | None = field(default=None, metadata=NO_EFFECT)
    """Gigabytes for the KV cache. Default: half of the free memory on a CPU, 85 % on a GPU."""

    @property
    def kv_bytes(self) -> int | None:
        """`kv_memory` in bytes."""
        return None if self.kv_memory is None else int(self.kv_memory * 1e9)


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """Where the model openai:NAME is. The key comes from the environment alone (PTST_MODEL_API_KEY, else
    OPENAI_API_KEY)."""

    base_url: str | None = field(default=None, metadata=content("weights"))
    """Address of the OpenAI-compatible endpoint of --model openai:NAME. Default: OPENAI_BASE_URL, or OpenAI's."""

    def check_endpoint(self, model: str | None) -> None:
        """Raise UserError for `openai:` without a name."""
        if hosted_model(model) == "":
            raise UserError((Setting("model"), f" is {model}"), f"it must be {HOSTED}NAME, as in {HOSTED}gpt-4o-mini")


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How the model openai:NAME is fine-tuned, by a job at its endpoint (docs/hosted-training.md)."""

    lr_multiplier: float | None = None
    """openai:NAME: the job's learning-rate multiplier, in place of --lr. Default: the endpoint chooses."""
    api_price_train: float | None = field(default=None, metadata=NO_EFFECT)
    """openai:NAME: price of a million trained tokens, to tell the cost before and after."""

    def check_job(self) -> None:
        """Raise UserError for a value out of range."""
        check_above_zero(self, "lr_multiplier")
        check_at_least(self, 0, "api_price_train")


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """Whether a job at an endpoint is started."""

    yes: bool = field(default=False, metadata=NO_EFFECT)
    """openai:NAME: start the job, which costs money, without asking."""
    new_job: bool = field(default=False, metadata=NO_EFFECT)
    """openai:NAME: start another job where the one of these settings has failed or was cancelled."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """How models behind an API are asked: judges (api:MODEL), and the model under test (openai:NAME). Keys come from
    the environment alone (OPENAI_API_KEY; docs/endpoints.md)."""

    api_base_url: str | None = None
    """Address of the judge's OpenAI-compatible endpoint. Default: OPENAI_BASE_URL, or OpenAI's."""
    api_max_tokens: int | None = None
    """Room for a judge's reply, in tokens, where it thinks before it answers. Default: what the grader needs."""
    api_concurrency: int = field(default=8, metadata=NO_EFFECT)
    """Maximum number of requests at once."""
    api_timeout: float = field(default=60.0, metadata=NO_EFFECT)
    """Seconds to wait for one reply."""
    api_retries: int = field(default=6, metadata=NO_EFFECT)
    """How often a request is repeated after a timeout, status 429 or a server's error."""
    api_price: tuple[float, float] | None = field(default=None, metadata=NO_EFFECT)
    """Price of a million tokens in, and of a million out, to count the cost."""

    def check_api(self) -> None:
        """Raise UserError for a value out of range."""
        check_at_least(self, 1, "api_max_tokens", "api_concurrency")
        check_at_least(self, 0, "api_retries")
        check_above_zero(self, "api_timeout")
        price = self.api_price
        if price is not None and (len(price) != 2 or not all(0 <= each < math.inf for each in price)):
            raise UserError((Setting("api_price"), f" is {price}"), "it is two prices, each at least 0")


Config = TypeVar("Config", bound=CommandSettings)


def with_recipes(
    values: Callable[[str, Mapping[str, Any]], Mapping[str, Any]],
) -> Callable[[type[Config]], type[Config]]:
    """Class decorator: `Config(recipe=NAME)` starts from `values(NAME, settings given)`; settings given win over it."""

    def decorate(cls: type[Config]) -> type[Config]:
        plain = cls.__init__

        def __init__(self: Config, **given: Any) -> None:
            recipe = given.get("recipe")
            plain(self, **({**values(recipe, given), **given} if recipe else given))

        cls.__init__ = __init__  # type: ignore[assignment, method-assign]
        return cls

    return decorate


def to_dict(config: Any) -> dict[str, Any]:
    """All settings as JSON values, paths as text; how a command was asked to print is left out."""
    own = {f.name for f in dataclasses.fields(CommandSettings)}
    return {k: to_json(v) for k, v in dataclasses.asdict(config).items() if k not in own}


def to_json(value: Any) -> Any:
    """A setting's value as JSON has it."""
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise UserError for a setting that is given and below `least`, or not finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str) and not least <= value < math.inf:
            raise UserError((Setting(name), f" is {value}"), f"it must be at least {least}")


def check_above_zero(config: Any, *names: str) -> None:
    """Raise UserError for a setting that is given and not above 0, or not finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError((Setting(name), f" is {value}"), "it must be above 0")


def check_share(config: Any, *names: str) -> None:
    """Raise UserError for a share outside of 0 (included) to 1 (excluded)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError((Setting(name), f" is {getattr(config, name)}"), "it must be at least 0 and below 1")
