"""Settings of an audit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ptst.data.order import OrderName
from ptst.errors import Setting, UserError
from ptst.settings import (
    CommandSettings,
    FormatSettings,
    OptionalLocalModel,
    OptionalTestTemplate,
    OptionalTrainTemplate,
    RevisionSettings,
    check_above_zero,
    check_at_least,
    check_share,
)

NOT_OF_BATCHES = (
    *("data", "test_template", "test_data", "safety_data", "checkpoint", "mix", "val_data", "holdout"),
    *("epochs", "examples_per_step", "tokens_per_step", "max_steps", "phases", "seed", "order"),
)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(CommandSettings, RevisionSettings, FormatSettings):
    """Check what reaches the loss, before or after training. With --checkpoint, the run's settings are the defaults."""

    template: OptionalTrainTemplate = None
    template_file: Path | None = None
    """Template of your own, in TOML, instead of --template."""
    test_template: OptionalTestTemplate = None
    model: OptionalLocalModel = None
    data: Annotated[str | None, arg(help="Training data, as for ptst.train.")] = None
    test_data: str | None = None
    """Test questions to look for in the training data. Default: the built-in problems' own test split."""
    safety_data: Path | None = None
    """Prompts of the safety test to look for in the training data, besides the built-in ones."""
    checkpoint: Path | None = None
    """Finished run: would its data be encoded the same today?"""
    max_length: int | None = None
    """Maximum length of an example in tokens. Default: the model's context."""
    too_long: Literal["drop", "cut", "stop"] | None = None
    """What happens to longer examples."""
    train_on: Literal["all", "last"] | None = None
    """Which answers of a multi-turn conversation are trained on."""
    micro_batch_tokens: int | None = None
    """Tokens in a micro-batch."""
    mix: tuple[str, ...] | None = None
    """Other data, each with its epochs and perhaps a template, as for ptst.train: safety.jsonl:1:chat:llama."""
    val_data: str | None = None
    """Validation set, as for ptst.train."""
    holdout: float | None = None
    """Share of the data kept out of training, as for ptst.train."""
    epochs: float | None = None
    """Passes over the data."""
    examples_per_step: int | None = None
    """Examples in an optimizer step."""
    tokens_per_step: int | None = None
    """Maximum number of tokens in an optimizer step, instead of a number of examples."""
    max_steps: int | None = None
    """Maximum number of optimizer steps."""
    phases: tuple[int, ...] | None = None
    """Steps on the data mixed in, and on the main data, in turn, as for ptst.train."""
    seed: int | None = None
    """Seed of the order of examples."""
    order: OrderName | None = None
    """Order of the examples, as for ptst.train: random or file."""
    columns: tuple[str, ...] | None = None
    """Names of columns that no rule knows, as for ptst.train."""
    ignore_columns: tuple[str, ...] | None = None
    """Columns to leave out, as for ptst.train."""
    use_chosen: bool | None = None
    """Of preference pairs, read the chosen answer."""
    limit: int | None = None
    """Use only the first N rows of the data."""
    subsample: int | None = None
    """Of the data, N rows drawn with the seed, as for ptst.train."""
    batches: Path | None = None
    """Batches that any trainer is about to feed its model, instead of --data: JSONL, Parquet, npz, safetensors or a
    folder of datasets.save_to_disk (docs/audit.md)."""
    messages: str | None = None
    """The conversations that --batches were made from, in the order of its rows: data as for ptst.train."""
    labels: Literal["told", "aligned", "shifted"] = "told"
    """Of --batches: whether labels are aligned with the tokens, or shifted already. Default: told by the labels."""
    rows: int = 1
    """Number of rows whose tokens are shown; those with findings come first."""
    allow: tuple[str, ...] = ()
    """Rules that may be broken: their findings become notes."""
    html: Path | None = None
    """File for the report as one HTML page, which needs no network."""

    junit: Path | None = None
    """File for the report as JUnit XML, for GitLab or Jenkins."""
    sarif: Path | None = None
    """File for the report as SARIF, for GitHub."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        from ptst.audit.findings import check_names

        check_names(self.allow)
        if self.batches is None and (self.messages is not None or self.labels != "told"):
            name = "labels" if self.messages is None else "messages"
            raise UserError((Setting(name), " is of ", Setting("batches"), ", which is not given"), "give both")
        for name in NOT_OF_BATCHES if self.batches else ():
            if getattr(self, name) is not None:
                without_effect = (Setting(name), " has no effect on ", Setting("batches"))
                raise UserError(without_effect, ("leave it out; the conversations are given as ", Setting("messages")))
        steps = ("examples_per_step", "tokens_per_step", "max_steps")
        check_at_least(self, 1, "max_length", "micro_batch_tokens", "limit", "subsample", *steps)
        check_above_zero(self, "epochs")
        if self.holdout is not None:
            check_share(self, "holdout")
        for name in ("html", "junit", "sarif"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                cause = (Setting(name), f" {path}: there is no folder {path.parent} to write it into")
                raise UserError(cause, "make it, or choose another path")
