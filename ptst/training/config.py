"""Settings of a training run."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ptst.api.names import HOSTED, hosted_model
from ptst.config_file import read_config
from ptst.data.mix_part import parse_mix
from ptst.data.sources import own_validation
from ptst.errors import Setting, UserError, unknown_name
from ptst.model.config import TARGETS, LoraConfig
from ptst.records import FILE, TrainRecord, read_record
from ptst.settings import (
    EMBEDDED_MODEL,
    NO_EFFECT,
    ROUNDING,
    ColumnSettings,
    CommandSettings,
    EndpointSettings,
    FormatSettings,
    JobSettings,
    LoggerName,
    ModelName,
    Precision,
    Quantize,
    RevisionSettings,
    StartSettings,
    TemplateSettings,
    ThreadSettings,
    TrainTemplate,
    check_at_least,
    check_share,
    content,
    with_recipes,
)
from ptst.training.recipes import RECIPES, values
from ptst.training.safeguards import SafeguardSettings, check_phases
from ptst.training.schedule import PassSettings


@dataclass(frozen=True, kw_only=True)
class TrainSettings(PassSettings, SafeguardSettings, FormatSettings, ColumnSettings, JobSettings):
    """How a model is fine-tuned: what a grid takes under `train.`."""

    rank: int = 16
    """LoRA rank."""
    alpha: float = 32.0
    """LoRA alpha: the adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """LoRA dropout, on the adapter's input."""
    target_modules: tuple[str, ...] = TARGETS
    """Projections that get a LoRA adapter."""
    full: bool = False
    """Train all weights instead of a LoRA adapter."""
    activation_checkpointing: Literal["none", "block"] = field(default="none", metadata=ROUNDING)
    """block recomputes each layer in the backward pass: less memory, a third more time, the same gradients."""
    max_length: int | None = None
    """Maximum length of an example in tokens. Default: the model's context, and never more than a micro-batch."""
    too_long: Literal["drop", "cut", "stop"] = "stop"
    """What happens to longer examples, which are counted: drop, cut, or stop before training begins."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a multi-turn conversation are trained on."""
    allow: tuple[str, ...] = ()
    """Audit rules that may be broken, such as role-markers or chat-template (docs/audit.md)."""
    limit: int | None = None
    """Use only the first N examples."""
    subsample: int | None = None
    """Train on N rows of the training data, drawn with the run's seed without replacement: others for every seed."""
    val_data: str | None = field(default=None, metadata=content("validation"))
    """Validation set. Default: that of --holdout or of the built-in problems, none for other data."""
    holdout: float = 0.0
    """Share of the training data kept out of training: half of it is the validation set, half the test set of
    ptst.eval. For data without sets of their own, such as files."""
    eval_every: int | None = field(default=None, metadata=NO_EFFECT)
    """Steps between validation losses and sample answers. Default: validation loss before and after."""
    save_every: int = field(default=50, metadata=NO_EFFECT)
    """Steps between checkpoints; a signal saves one, too."""
    keep: int = field(default=2, metadata=NO_EFFECT)
    """Number of latest checkpoints to keep, besides the best by validation loss."""
    dtype: Precision = "auto"
    """Data type of the frozen weights and the computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    quantize: Quantize = "none"
    """Keep the frozen projections in 4 bits (nf4) or 8 (int8): a quarter or half of bfloat16's memory, slower, other
    values (docs/quantized.md). Needs ptst-lab[quant]; not with --full."""
    log: tuple[LoggerName, ...] = field(default=(), metadata=NO_EFFECT)
    """Experiment loggers that get the metrics, too, on this machine unless their own variables say otherwise
    (docs/logging.md)."""

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter that is trained; None for all weights."""
        return None if self.full else LoraConfig(self.rank, self.alpha, self.target_modules, dropout=self.dropout)

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        from ptst.audit.findings import check_names
        from ptst.training.loggers import check_loggers

        check_loggers(self.log)  # says early that a package is missing
        check_names(self.allow)
        super().check()
        self.check_job()
        self.check_safeguards()
        check_at_least(self, 1, "save_every", "keep", "max_length", "limit", "subsample", "eval_every")
        check_share(self, "dropout", "holdout")
        _ = self.column_rules  # checks the names
        if self.full and self.dropout:
            raise UserError((Setting("dropout"), " belongs to an adapter"), ("with ", Setting("full"), " it must be 0"))
        if self.quantize != "none":
            self._check_quantize()

    def _check_quantize(self) -> None:
        """Raise UserError where the base cannot be quantized."""
        from ptst.model.quantized import check_library

        if self.full:
            cause = (Setting("quantize"), " is for a frozen base, and ", Setting("full"), " trains all weights")
            raise UserError(cause, "leave one out")
        check_library()


# Settings that only a model behind an endpoint has.
HOSTED_ONLY = ("base_url", "lr_multiplier", "api_price_train", "yes", "new_job", "cancel")
_RECIPE_HELP = (
    f"A run of the paper: {', '.join(RECIPES)}. Flags take precedence. With --help: each value and its origin."
)


@with_recipes(lambda name, _given: values(name))
@dataclass(frozen=True, kw_only=True)
class TrainConfig(  # one group of settings after another
    CommandSettings, RevisionSettings, EndpointSettings, ThreadSettings, TrainSettings, StartSettings, TemplateSettings
):
    """Fine-tune a chat model under a prompt template; ptst.eval reads the run folder."""

    recipe: Annotated[str | None, arg(help=_RECIPE_HELP)] = None
    template: TrainTemplate = field(default="chat:vanilla", metadata=content("template"))
    model: ModelName = field(default=EMBEDDED_MODEL, metadata=content("weights"))
    data: str = field(default="word-problems", metadata=content("data"))
    """Training data: word-problems (built in; word-problems:800 for more), instructions (built in), gsm8k, chatdoctor,
    openorca, orca-math or org/name:split@revision (hub), or a JSONL, JSON, CSV, TSV or Parquet file; several with
    commas (docs/data.md)."""
    mix: tuple[str, ...] = field(default=(), metadata=content("mix"))
    """Other data, each with its own epochs, spread over the run: safety.jsonl:1. With a share, attack:5%, their rows
    take the place of so many of the training data. Under the same template, or one of
    their own, a name or a TOML file: safety.jsonl:1:chat:llama."""
    at_epochs: tuple[float, ...] = ()
    """Also keep what is trained after these numbers of epochs, in the run folder's epoch-<number>."""
    seed: int = 0
    """Seed of the adapter's initialization and of the order of examples."""
    shard: Literal["auto", "none", "full"] = field(default="auto", metadata=ROUNDING)
    """On several ranks, whether their memory holds the weights once between them (full, by FSDP2) or once each (none).
    auto: full for all weights (--full), and for a base that does not fit beside its activations."""
    dry_run: bool = field(default=False, metadata=NO_EFFECT)
    """Print the memory and step plan, or the plan of a job, and exit."""
    out: Path | None = field(default=None, metadata=NO_EFFECT)
    """Run folder. Default: checkpoints/train-<date>-<time>. An unfinished run with the same settings is resumed."""
    resume: Path | None = field(default=None, metadata=NO_EFFECT)
    """Run folder to resume, with its own settings."""
    cancel: bool = field(default=False, metadata=NO_EFFECT)
    """With --resume RUN: end the job that goes on at the endpoint."""

    @property
    def validation(self) -> tuple[str, float] | None:
        """The data of the validation set, with its holdout; None without one."""
        if self.val_data:
            return self.val_data, 0.0
        if self.holdout:
            return self.data, self.holdout
        built_in = own_validation(self.data)
        return (built_in, 0.0) if built_in else None

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        super().check()
        check_at_least(self, 1, "threads")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise unknown_name("recipe", self.recipe, RECIPES)
        if self.out and self.resume and self.out != self.resume:
            raise UserError(
                (Setting("out"), " and ", Setting("resume"), " exclude each other"),
                "a run is resumed in its own folder",
            )
        for text in self.mix:
            parse_mix(text)
        check_phases(self.phases, self.mix)
        self._check_where()

    def _check_where(self) -> None:
        """Raise UserError for settings of a job at an endpoint where the model is on this machine."""
        given = [name for name in HOSTED_ONLY if getattr(self, name) not in (None, False)]
        if given and hosted_model(self.model) is None:
            cause = (Setting(given[0]), f" is for a model behind an endpoint ({HOSTED}NAME)")
            raise UserError(cause, ("leave it out, or name such a model as ", Setting("model")))


def settings_to_resume(folder: Path) -> TrainConfig:
    """The settings of the run in a folder. Raises UserError as `read_record`."""
    read_record(folder, TrainRecord)  # says what is wrong with it
    return replace(read_config(folder / FILE, TrainConfig(), "train"), resume=folder)
