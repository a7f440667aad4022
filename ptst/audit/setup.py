"""What the audit knows of a training setup."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ptst.audit.reference.formats import Oracle
from ptst.text.prompt_format import PromptFormat


@dataclass(frozen=True)
class Setup:
    """A training setup: the prompt format, which answers are trained (all or last), the length limit in tokens and what
    happens to longer examples (drop, cut or stop). `template_file`: where a user's own template was read from."""

    prompt_format: PromptFormat
    train_on: str = "all"
    max_length: int | None = None
    too_long: str = "drop"
    template_file: Path | None = None

    @cached_property
    def oracle(self) -> Oracle:
        """The reference formats under this prompt format."""
        return Oracle(self.prompt_format, self.template_file)
