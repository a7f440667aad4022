"""Settings of an export."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ptst.errors import Setting, UserError
from ptst.settings import (
    AdapterName,
    CommandSettings,
    FormatSettings,
    OptionalLocalModel,
    RevisionSettings,
    TestTemplate,
    ThreadSettings,
    check_above_zero,
    check_at_least,
)
from ptst.text.templates import TEMPLATES

StoredDtype = Literal["float32", "bfloat16", "float16"]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TEMPLATE_HELP = (
    f"Test template to bake into chat_template.jinja: {', '.join(TEMPLATES)}. A bare name means chat:. Default: the "
    "chat template of the base model stays."
)


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a model card says and no file tells."""

    base_name: str | None = None
    """Hub id of the base model, org/name or org/name@revision, where it is not known."""
    license: str | None = None
    """Licence for the model card, by its identifier on the hub (apache-2.0, llama3.1). It is never guessed."""

    def check_license(self) -> None:
        """Raise UserError for what is no identifier."""
        if self.license is not None and not re.fullmatch(r"[\w.+-]{1,64}", self.license):
            remedy = "give an identifier of the hub, such as apache-2.0, llama3.1 or other"
            raise UserError((Setting("license"), f" is {self.license!r}"), remedy)


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How large a file of weights may be."""

    max_shard_size: str = "5GB"
    """Largest file of weights, in KB, MB, GB or TB (powers of 1000); larger models are written in several."""

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes. Raises UserError for what is no size."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", self.max_shard_size.upper())
        size = float(found[1]) * _UNITS[found[2]] if found else 0.0
        if not 1 <= size < math.inf:
            raise UserError((Setting("max_shard_size"), f" is {self.max_shard_size!r}"), "give a size as 500MB or 5GB")
        return int(size)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CommandSettings, RevisionSettings, CardSettings, ThreadSettings, FormatSettings, ShardSettings):
    """Write a run, an adapter or a model as a folder that transformers, peft, vLLM and llama.cpp load: merged weights,
    or with --adapter-only a portable adapter. Without --checkpoint and --model: the latest run."""

    checkpoint: Path | None = None
    """Run folder of ptst.train, or a checkpoint in it: RUN/state/step-00000050."""
    model: OptionalLocalModel = None
    adapter: AdapterName = None
    out: Path | None = None
    """Folder to write, which must not exist or be empty."""
    template: Annotated[TestTemplate | None, arg(help=_TEMPLATE_HELP)] = None
    template_file: Path | None = None
    """Template of your own, in TOML, instead of --template (docs/templates.md)."""
    adapter_only: bool = False
    """Write the adapter alone, in PEFT's layout, with its base named by its hub id."""
    template_only: bool = False
    """Write chat_template.jinja alone, with a README: no weights."""
    dtype: StoredDtype | None = None
    """Data type of the weights written: float32, bfloat16 or float16. Default: that of the base model's files."""
    check: bool = True
    """Load what was written, and compare logits and greedy answers with the run's. --no-check skips it."""
    tolerance: float | None = None
    """Largest change of a logit that is accepted. Default: what rounding to the data type explains (docs/export.md)."""

    def check_settings(self) -> None:
        """Raise UserError for values that make no sense, alone or together."""
        _ = self.shard_bytes
        check_above_zero(self, "tolerance")
        check_at_least(self, 1, "threads")
        if self.out is None:
            raise UserError((Setting("out"), " is missing"), "name the folder to write")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError((Setting("dtype"), f" is {self.dtype!r}"), "it must be float32, bfloat16 or float16")
        self.check_license()
        if self.template is not None and self.template_file is not None:
            raise UserError((Setting("template"), " and ", Setting("template_file"), " exclude each other"), "give one")
        templated = self.template is not None or self.template_file is not None
        if self.template_only and not templated:
            raise UserError((Setting("template_only"), " needs ", Setting("template")), "name the template to bake")
        if self.template_family is not None and not templated:
            remedy = ("give ", Setting("template"), ", or leave it out")
            raise UserError((Setting("template_family"), " is of the template to bake, and there is none"), remedy)
        if self.tolerance is not None and (not self.check or self.adapter_only or self.template_only):
            unused = (Setting("tolerance"), " is of a comparison that is not made")
            raise UserError(unused, "leave it out, or let the weights be compared")
        for name in ("adapter_only", "template_only"):
            if getattr(self, name) and self.dtype is not None:
                cause = (Setting("dtype"), " is of merged weights, and with ", Setting(name), " there are none")
                raise UserError(cause, "leave one out")
        if self.adapter_only and self.template_only:
            cause = (Setting("adapter_only"), " and ", Setting("template_only"), " exclude each other")
            raise UserError(cause, "give one")
        if self.model is not None and self.adapter is None and self.checkpoint is None:
            if self.adapter_only:
                cause = (Setting("adapter_only"), " needs an adapter, and ", Setting("model"), " has none")
                raise UserError(cause, ("give ", Setting("checkpoint"), " or ", Setting("adapter")))
            if not templated and self.dtype is None:
                wanted = ("give ", Setting("template"), ", ", Setting("dtype"), ", ", Setting("adapter"), " or a run")
                raise UserError((Setting("model"), " alone would be copied as it is"), wanted)
