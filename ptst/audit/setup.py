"""What the audit knows of a training setup."""

from dataclasses import dataclass

from ptst.text.prompt_format import PromptFormat


@dataclass(frozen=True)
class Setup:
    """A training setup: the prompt format, which answers are trained (all or last), the length limit in tokens and what
    happens to longer examples (drop, cut or stop)."""

    prompt_format: PromptFormat
    train_on: str = "all"
    max_length: int | None = None
    too_long: str = "drop"
